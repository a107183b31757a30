"""DHSPG against the authors' code, its bounds, exact resume, and its result."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered_steps import train
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

from smallfry import compress
from smallfry.compress.prune.dhspg import penalty, redundancy
from smallfry.costing import macs
from smallfry.errors import UsageError
from smallfry.training.method import Running, Setting
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.resize import tensors_of

RUNS = GOLDEN["dhspg"]["runs"]
SIZES = {"embed_dim": 32, "num_heads": 4, "mlp_hidden_dim": 24, "depth": 2, "latent_steps": 1}
SPEC = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 4, "drop_rate": 0.0, **SIZES})
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 2e-3),
}
STRENGTH = {"sgd": 5.0, "adamw": 400.0}


@pytest.mark.parametrize("name", RUNS)
def test_every_number_of_the_authors_code_is_met(name):
    run = RUNS[name]
    settings = run["settings"]
    model = Net(list(run["final"]))
    method = compress.DHSPG(
        settings["target_group_sparsity"],
        begin=settings["start_pruning_steps"],
        tolerance=settings["tolerance_group_sparsity"],
        strength=settings["lmbda"],
        amplify=settings["lmbda_amplify"],
        cap=settings["hat_lmbda_coeff"],
        epsilon=settings["epsilon"],
        divisible=settings["group_divisible"],
        reference_selection=True,
    ).start()
    method.use(model, families(), setting(30))
    inner = optimizer(model, settings)
    attach(inner, method)
    for t in range(1, 31):
        model.set_gradients(t)
        inner.step()
        expected = run["steps"][str(t)]
        assert by_family(method.gone) == expected["zero"], t
        if "penalised" in expected:
            assert by_family(method.penalised) == expected["penalised"], t
        assert_parameters(model, expected)
    assert_parameters(model, run["final"])


def begin(name="sgd", steps=30, **changes):
    torch.manual_seed(0)
    model = build(SPEC).train()
    settings = {"begin": 3, "divisible": 4, "strength": STRENGTH[name], **changes}
    inner = OPTIMIZERS[name](model)
    method = compress.DHSPG(**{"sparsity": 0.5, **settings})
    running = Running([method], model, Setting(SPEC, torch.randn(2, 1, 8, 8), (), steps))
    running.attach(inner)
    return model, running, inner


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_channels_reach_zero_and_the_cut_model_equals_the_trained_one(name):
    model, running, inner = begin(name)
    train(model, inner, 0, 30, batch=16)
    (method,) = running._started
    total = sum(group.channels for group in method.groups)
    zero = sum(map(len, method.gone))
    assert 0.45 * total <= zero <= 0.6 * total
    tensors = tensors_of(model)
    for group, out in zip(method.groups, method.gone, strict=True):
        for each in group.zeroed:
            assert not tensors[each.tensor].index_select(0, each.entries[out].flatten()).any()
    model.eval()
    images = torch.randn(4, 1, 8, 8)
    before, expected = macs(model, images[:1]), model(images)
    spec = running.finish()
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert macs(model, images[:1]) < before
    assert torch.equal(build(spec, model.state_dict())(images), model(images))
    for group in method.groups:
        if not group.counts:
            assert model.get_submodule(group.name).out_features // 2 % 4 == 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "stop"),
    [pytest.param("sgd", 2, marks=SLOW), ("adamw", 8), pytest.param("sgd", 12, marks=SLOW)],
)
def test_a_stopped_run_continues_to_the_bit(name, stop):
    whole, running, inner = begin(name)
    train(whole, inner, 0, stop, batch=16)
    saved = copy.deepcopy([part.state_dict() for part in (running, inner, whole)])
    train(whole, inner, stop, 16, batch=16)
    again, resumed, other = begin(name)
    for part, state in zip((resumed, other, again), saved, strict=True):
        part.load_state_dict(state)
    train(again, other, stop, 16, batch=16)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert running._started[0].gone == resumed._started[0].gone
    assert any(resumed._started[0].gone)


numbers = st.floats(-3, 3, allow_nan=False, width=32)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6), st.floats(1e-4, 2))
def test_between_the_bounds_a_step_lowers_the_loss_and_the_norm(pairs, strength):
    x, d = torch.tensor(pairs, dtype=torch.float64).T
    inner, norm = float((x * d).sum()), float(x.norm())
    found = penalty(x, d, strength, amplify=1.1, cap=10.0)
    if inner >= -1e-6 or norm < 1e-3:
        return
    low, high = -inner / norm, -float(d.square().sum()) * norm / inner
    assert found <= high * (1 + 1e-9)
    if low * 1.001 < found < high * 0.999:
        v = d + found * x / norm
        assert float((v * d).sum()) > 0
        assert float((v * x).sum()) > 0


def test_channels_outside_their_half_space_alone_become_zero():
    model, running, inner = begin(epsilon=0.0, strength=2.0)
    (method,) = running._started
    project, checked = method._project, []

    def checking(optimizer):
        before = {name: tensor.clone() for name, tensor in method._before.items()}
        trial = {name: method.tensors[name].detach().clone() for name in before}
        earlier = copy.deepcopy(method.gone)
        project(optimizer)
        for group, old, new in zip(method.groups, earlier, method.gone, strict=True):
            for channel in set(new) - set(old):
                rows = [(s.tensor, s.entries[channel]) for s in group.zeroed]
                products = [(before[n][r] * trial[n][r]).sum() for n, r in rows]
                checked.append(float(sum(products)))

    method._project = checking
    train(model, inner, 0, 20, batch=16)
    assert checked
    assert max(checked) < 0


def test_redundant_are_those_that_shrink_and_are_small():
    x = [torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.1, 0.1]])]
    d = [torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])]
    (scores,) = redundancy(x, d)
    assert scores.argsort(descending=True).tolist() == [2, 0, 1]


def test_a_group_keeps_the_share_asked_for():
    model, running, inner = begin(upper=0.25, sparsity=0.8)
    train(model, inner, 0, 30, batch=16)
    (method,) = running._started
    for group, out in zip(method.groups, method.gone, strict=True):
        assert len(out) <= group.channels // 4
    assert any(method.gone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"dhspg.sparsity must be in \[0, 1\)"),
        ({"strength": 0.0}, "strength is above 0"),
        ({"amplify": 1.0}, "amplify is above 1"),
        ({"cap": 0.5}, "cap at least 1"),
        ({"epsilon": 1.0}, "epsilon is in"),
        ({"upper": 0.0}, "upper in"),
        ({"begin": 500.0}, "leaves no step of 30"),
        ({"divisible": 0}, "dhspg.divisible"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        begin(**settings)
