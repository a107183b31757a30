"""HESSO against the authors' code, exact resume, and its result."""

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

from smallfry.compress import HESSO
from smallfry.compress.prune.saliency import EQUAL, SCORES

RUNS = GOLDEN["hesso"]["runs"]


def golden_method(settings, model):
    first = settings["start_pruning_step"]
    hesso = HESSO(
        settings["target_group_sparsity"],
        begin=first,
        end=first + settings["pruning_steps"],
        periods=settings["pruning_periods"],
        divisible=settings["group_divisible"],
        weights=EQUAL,
        reference_selection=True,
    )
    method = hesso.start()
    method.use(model, families(), setting(30))
    return method


@pytest.mark.parametrize("name", RUNS)
def test_every_number_of_the_authors_code_is_met(name):
    run, model = RUNS[name], Net()
    method = golden_method(run["settings"], model)
    inner = optimizer(model, run["settings"])
    attach(inner, method)
    for t in range(1, 31):
        model.set_gradients(t)
        inner.step()
        expected = run["steps"][str(t)]
        assert by_family(method.active) == expected["active"], t
        assert by_family(method.gone) == expected["pruned"], t
        assert_parameters(model, expected)
        for family, scores in zip("AB", method.scores, strict=False):
            theirs = expected.get("scores", {}).get(family)
            if theirs:
                listed = [theirs[key] for key in theirs if key != "overall"]
                assert len(listed) == len(SCORES)
                torch.testing.assert_close(
                    scores, torch.tensor(listed, dtype=torch.float64), atol=1e-9, rtol=0
                )
    assert_parameters(model, run["final"])
