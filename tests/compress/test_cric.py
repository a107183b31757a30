"""CRIC against the authors' code, and its limits."""

import pytest
import torch
from pruning_golden import (
    GOLDEN,
    Net,
    assert_parameters,
    attach,
    by_family,
    families,
    optimizer,
    setting,
)

from smallfry.compress import CRIC

RUN = GOLDEN["hesso_cric"]["run"]
SETS = {
    "active_violating_idxes": "active",
    "historical_violating_idxes": "history",
    "trial_violating_idxes": "trial",
    "active_redundant_idxes": "redundant",
    "pruned_idxes": "gone",
}


def test_every_number_of_the_authors_code_is_met():
    settings, model = RUN["settings"], Net()
    cric = CRIC(
        settings["target_group_sparsity"],
        begin=settings["start_cric_step"],
        shrinking=settings["hybrid_training_steps"],
        sampling_steps=settings["sampling_steps"],
        cycles=settings["max_cycle_period"],
        divisible=settings["group_divisible"],
    )
    method = cric.start()
    method.use(model, families(), setting(60))
    inner = optimizer(model, settings)
    attach(inner, method)
    for t in range(1, 1 + max(map(int, RUN["steps"]))):
        model.set_gradients(t)
        expected = RUN["steps"][str(t)]
        loss = model.loss(t)
        assert abs(float(loss) - expected["loss"]) < 1e-9, t
        method.observe(loss)
        inner.step()
        assert_parameters(model, expected)
        assert method.cycle == expected["cycle"], t
        for theirs, ours in SETS.items():
            assert by_family(getattr(method, ours)) == expected[theirs], (t, theirs)
    assert by_family(method.losses).keys() == RUN["loss_ratios"].keys()
    for family, ratios in zip("AB", method.losses, strict=True):
        assert ratios == pytest.approx(RUN["loss_ratios"][family], abs=1e-9)
    for family, scores in zip("AB", method.final_scores(), strict=True):
        expected = torch.tensor(RUN["accumulated_scores"][family], dtype=torch.float64)
        torch.testing.assert_close(scores, expected, atol=1e-9, rtol=0)
    assert_parameters(model, RUN["final"])
