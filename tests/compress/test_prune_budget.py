"""Pruning to a cost: multiply-accumulates, or a table of measured latencies."""

import json

import pytest
import torch
from numbered_steps import train

from smallfry import compress
from smallfry.compress.prune.budget import LatencyBudget, LatencyTable, MacsBudget, prices
from smallfry.compress.prune.saliency import channel_vectors
from smallfry.costing import macs
from smallfry.errors import UsageError
from smallfry.training.method import Running, Setting
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.find import find_groups
from smallfry.transforms.groups import cut

SIZES = {"embed_dim": 32, "num_heads": 4, "mlp_hidden_dim": 24, "depth": 2, "latent_steps": 1}
SPEC = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 4, "drop_rate": 0.0, **SIZES})
MLPS = ("*.mlp.fc1",)
FIRST, SECOND = "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"
# the first MLP saves nothing before half of it is gone, the second one evenly
TABLE = {
    "whole": 4.0,
    "groups": {
        FIRST: {"4": 3.0, "12": 4.0, "24": 4.0},
        SECOND: {"4": 2.0, "24": 4.0},
    },
}


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "latencies.json"
    file.write_text(json.dumps(TABLE))
    return str(file)


def begin(table, share=0.25, steps=12, **changes):
    torch.manual_seed(0)
    model = build(SPEC).train()
    settings = {"begin": 2, "end": 10, "periods": 2, "divisible": 4, "include": MLPS}
    method = compress.HESSO(share, of="ms", table=table, **{**settings, **changes})
    inner = torch.optim.AdamW(model.parameters(), 1e-3)
    running = Running([method], model, Setting(SPEC, torch.randn(2, 1, 8, 8), (), steps))
    running.attach(inner)
    return model, running, inner


def test_savings_lie_between_the_measured_ones_and_never_fall():
    table = LatencyTable(4.0, {"a": {"8": 2.0, "16": 3.0, "24": 4.2}, "b": {"1": 4.0, "2": 3.0}})
    assert table.saving("a", 8, 24) == 2.0
    assert table.saving("a", 12, 24) == 1.5
    assert table.saving("a", 20, 24) == 0.5
    assert table.saving("a", 24, 24) == 0.0
    assert table.saving("a", 24, 32) == 0.0  # slower than the whole: noise
    assert table.saving("a", 4, 24) == 2.0  # below what was measured
    assert table.saving("b", 1, 3) == table.saving("b", 2, 3) == 1.0


def test_savings_of_several_groups_add_up():
    model = build(SPEC)
    groups = [g for g in find_groups(model, torch.randn(2, 1, 8, 8)) if "mlp" in g.name]
    budget = LatencyBudget(LatencyTable(**TABLE), groups)
    assert budget.without([0, 0]) == 4.0
    assert budget.without([20, 20]) == pytest.approx(4.0 - 1.0 - 2.0)
    assert budget.without([12, 10]) == pytest.approx(3.0)
    assert prices(budget, [0, 0], [4, 4], [24, 24]) == [
        1e-3,
        1.0,
    ]  # a channel of the first saves nothing
    assert prices(budget, [12, 0], [4, 4], [24, 24]) == [1.0, pytest.approx(0.8)]
    with pytest.raises(UsageError, match=f"lacks the group '{SECOND}'"):
        LatencyBudget(LatencyTable(4.0, {FIRST: {"4": 3.0}}), groups)


def test_macs_are_those_of_the_cut_model_and_a_channel_has_its_share():
    model = build(SPEC)
    example = torch.randn(2, 1, 8, 8)
    groups = find_groups(model, example)
    budget = MacsBudget(model, example, groups)
    removed = [1 if group.counts else 8 for group in groups]
    found = budget.without(removed)
    keep = {g.name: torch.arange(r, g.channels) for g, r in zip(groups, removed, strict=True)}
    cut(model, groups, keep)
    assert found == macs(model, example[:1])
    sizes = [group.channels for group in groups]
    shares = prices(
        MacsBudget(build(SPEC), example, groups), [0] * len(groups), [1] * len(groups), sizes
    )
    assert max(shares) == 1.0
    assert min(shares) < 0.5  # a hidden unit saves less than a head
    one_left = [size - 1 if group.counts else 0 for group, size in zip(groups, sizes, strict=True)]
    shares = prices(budget, one_left, [1] * len(groups), sizes)
    heads = [share for group, share in zip(groups, shares, strict=True) if group.counts]
    assert heads == [1.0, 1.0]


def test_pruning_takes_what_saves_measured_time(table):
    model, running, inner = begin(table)
    train(model, inner, 0, 12)
    running.finish()
    first, second = (model.get_submodule(n).out_features // 2 for n in (FIRST, SECOND))
    assert first == 24  # its channels would save nothing
    assert second == 12  # saves 1.2 of 4 ms; 16 would save 0.8, and 1.0 is asked for


def test_the_table_is_part_of_the_state_of_a_run(table, tmp_path):
    whole, _, inner = begin(table)
    train(whole, inner, 0, 12)
    half, stopped, other = begin(table)
    train(half, other, 0, 4)
    states = [part.state_dict() for part in (stopped, other, half)]
    with open(table, "w") as file:  # measured anew, on another machine
        file.write(json.dumps({**TABLE, "whole": 40.0}))
    again, resumed, other = begin(table)
    for part, state in zip((resumed, other, again), states, strict=True):
        part.load_state_dict(state)
    train(again, other, 4, 12)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_channels_of_frozen_weights_are_judged_by_the_weights_that_are_applied_to_them():
    model = build(SPEC)
    model.blocks[0].mlp.fc1.requires_grad_(False)
    method = compress.HESSO(0.2, begin=2, end=5, divisible=4, include=MLPS).start()
    method.begin(model, Setting(SPEC, torch.randn(2, 1, 8, 8), (), 6))
    frozen, trained = method.scored
    assert [each.tensor for each in frozen.zeroed] == ["blocks.0.mlp.fc2.weight"]
    assert trained is not None
    assert [each.tensor for each in trained.zeroed] == [f"{SECOND}.weight", f"{SECOND}.bias"]
    columns = channel_vectors(frozen, method.tensors)
    torch.testing.assert_close(columns, model.blocks[0].mlp.fc2.weight.T.double())
    # the gradient of a channel's factor is that of its columns times their values
    factor = torch.ones(24, requires_grad=True)
    fc2 = model.blocks[0].mlp.fc2
    fc2.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor,))
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    products = (columns * fc2.weight.grad.T).sum(1)
    torch.testing.assert_close(products.float(), factor.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such table of latencies"),
        ("{", "not a table"),
        ("[]", "not a table"),
        ('{"whole": 0, "groups": {"a": {"1": 2}}}', "positive numbers"),
        ('{"whole": 1, "groups": {}}', "positive numbers"),
        ('{"whole": 1, "groups": {"a": {"1": "2"}}}', "positive numbers"),
        ('{"whole": 1, "groups": {"a": {"1": 2}}}', "lacks the group"),
        (json.dumps({**TABLE, "whole": 40.0}), None),
    ],
)
def test_wrong_tables_are_refused(tmp_path, content, message):
    file = tmp_path / "t.json"
    if content is not None:
        file.write_text(content)
    if message is None:
        begin(str(file))
        return
    with pytest.raises(UsageError, match=message):
        begin(str(file))


def test_settings_that_do_not_go_together_are_refused(table):
    with pytest.raises(UsageError, match="of ms goes with table"):
        compress.HESSO(0.5, of="ms")
    with pytest.raises(UsageError, match="of ms goes with table"):
        compress.CRIC(0.5, of="macs", table=table)
    with pytest.raises(UsageError, match=r"0\.9 of the ms is out of reach"):
        begin(table, share=0.9)


def test_a_cost_resumes_with_the_groups_of_the_state():
    def start(include):
        torch.manual_seed(0)
        model = build(SPEC).train()
        method = compress.HESSO(0.05, of="macs", divisible=4, include=include).start()
        method.begin(model, Setting(SPEC, torch.randn(2, 1, 8, 8), (), 12))
        return method

    whole, resumed = start(MLPS), start((FIRST,))  # as if weights had other groups
    resumed.load_state_dict(whole.state_dict())
    assert resumed.groups == whole.groups
    for gone in ([[], []], [[0, 1], []], [[], [3]]):
        assert resumed.cost_without(gone) == whole.cost_without(gone)
