"""Parameter groups of natural gradient and of the AdamW inside."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from smallfry.errors import UsageError
from smallfry.optim import KFAC
from smallfry.optim.groups import build_adamw, natural_groups, split_groups
from smallfry.optim.numerics import finite, statistics_dtype

DEFAULTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "fallback_lr": 1e-3}


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))


def groups_of(net, params=None, **given):
    return natural_groups(net, params, **(DEFAULTS | given))


def test_without_groups_all_trained_parameters_are_one(net):
    net[0].weight.requires_grad_(False)
    (group,) = groups_of(net)
    assert {k: v for k, v in group.items() if k != "params"} == DEFAULTS
    assert len(group["params"]) == 5
    assert all(p.requires_grad for p in group["params"])


@pytest.mark.parametrize("form", ["list", "iterator", "named", "tensor"])
def test_parameters_may_be_given_in_any_form_of_torch(net, form):
    weight = net[0].weight
    given = {
        "list": [weight, net[0].bias],
        "iterator": iter([weight, net[0].bias]),
        "named": list(net[0].named_parameters()),
        "tensor": [{"params": weight}, {"params": net[0].bias}],
    }[form]
    found = groups_of(net, given)
    assert [p for group in found for p in group["params"]] == [weight, net[0].bias]


def test_a_groups_own_settings_win(net):
    one, two = groups_of(net, [{"params": [net[0].weight], "lr": 7.0}, {"params": [net[0].bias]}])
    assert (one["lr"], two["lr"]) == (7.0, 0.1)
    assert one["momentum"] == 0.9


def test_the_rate_of_adamw_follows_that_of_its_group(net):
    given = [
        {"params": list(net[0].parameters()), "lr": 0.2},
        {"params": list(net[1].parameters()), "lr": 0.0},
        {"params": list(net[2].parameters()), "lr": 0.2, "fallback_lr": 0.7},
    ]
    assert [g["fallback_lr"] for g in groups_of(net, given)] == [2e-3, 0.0, 0.7]
    assert groups_of(net, given[:1], lr=0.0)[0]["fallback_lr"] == 1e-3  # of none nothing follows


def test_groups_of_frozen_parameters_vanish(net):
    net[2].requires_grad_(False)
    assert (
        len(groups_of(net, [{"params": net[0].parameters()}, {"params": net[2].parameters()}])) == 1
    )
    net.requires_grad_(False)
    assert groups_of(net) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda net: nn.Linear(2, 2).parameters(), "a parameter of another model"),
        (lambda net: [net[0].weight, net[0].weight], "a parameter twice"),
        (lambda net: [{"params": net[0].weight}, {"params": net[0].weight}], "a parameter twice"),
        (lambda net: [], "there are no parameters to train"),
        (lambda net: [{"params": []}], "there are no parameters to train"),
    ],
)
def test_wrong_parameters_are_refused(net, given, message):
    with pytest.raises(UsageError, match=message):
        groups_of(net, given(net))


def test_covered_and_other_parameters_part(net):
    covered = {net[0].weight, net[2].weight}
    natural, rest = split_groups(groups_of(net, lr=0.5), covered)
    assert natural[0]["params"] == [net[0].weight, net[2].weight]
    assert natural[0]["momentum"] == 0.9
    assert "fallback_lr" not in natural[0]
    (adam,) = rest
    assert len(adam["params"]) == 4
    assert (adam["lr"], adam["fallback_scale"], adam["weight_decay"]) == (1e-3, 1e-3 / 0.5, 0.01)
    assert "momentum" not in adam


def test_a_scale_of_the_rate_stays_beside_that_of_adamw(net):
    _, (adam,) = split_groups(
        groups_of(net, [{"params": net.parameters(), "lr_scale": 3.0}]), set()
    )
    assert (adam["lr_scale"], adam["fallback_scale"]) == (3.0, pytest.approx(1e-3 / 0.1))
    _, (adam,) = split_groups(groups_of(net, lr=0.0), set())
    assert adam["fallback_scale"] == 1.0  # of a rate of zero nothing follows


def test_schedules_of_timm_scale_each_rate_once():
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    optimizer = KFAC(net, lr=0.1)
    schedule = CosineLRScheduler(optimizer, t_initial=4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1e-3]
    schedule.step(2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 5e-4])


def test_a_state_with_the_former_name_of_the_scale_loads():
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    optimizer = KFAC(net, lr=0.1)
    state = optimizer.state_dict()
    state["param_groups"][1]["lr_scale"] = state["param_groups"][1].pop("fallback_scale")
    again = KFAC(net, lr=0.1)
    again.load_state_dict(state)
    group = again.param_groups[1]
    assert group["fallback_scale"] == pytest.approx(0.01)
    assert "lr_scale" not in group


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -3.0}, "lr of a group is 0 to below inf, got -3"),
        ({"lr": "0.1"}, "lr must be a number, not '0.1'"),
        ({"momentum": 1.0}, "momentum of a group is 0 to below 1, got 1"),
        ({"fallback_lr": float("nan")}, "fallback_lr of a group is 0 to below inf, got nan"),
        ({"damping": 3.0}, "damping is the same for all groups: give it to the optimizer"),
    ],
)
def test_settings_that_no_group_can_have_are_refused(net, group, message):
    with pytest.raises(UsageError, match=message):
        groups_of(net, [{"params": net.parameters(), **group}])


def test_a_group_needs_parameters(net):
    with pytest.raises(UsageError, match="each group of params= is a dictionary with 'params'"):
        groups_of(net, [{"lr": 0.1}])


def test_everything_or_nothing_is_covered(net):
    natural, rest = split_groups(groups_of(net), set(net.parameters()))
    assert len(natural) == 1
    assert rest == []
    assert build_adamw(rest) is None
    natural, rest = split_groups(groups_of(net), set())
    assert natural == []
    adamw = build_adamw(rest)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_statistics_are_float32_at_least(dtype, wanted):
    assert statistics_dtype(dtype) == wanted


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_number_that_is_not_finite_is_found_among_many_tensors(bad, dtype):
    tensors = [torch.ones(3), torch.zeros(2, 2, dtype=dtype), torch.ones(1)]
    assert finite(tensors)
    tensors[1][1, 0] = bad
    assert not finite(tensors)
    assert finite([])
    assert finite(iter([torch.zeros(())]))
