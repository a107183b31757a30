"""What HESSO and CRIC share: any optimizer, exact resume, the number removed, zeroed equals cut."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from smallfry import compress
from smallfry.compress.prune.saliency import directions, is_decoupled
from smallfry.compress.prune.selection import give_back, lowest, lowest_blocks, without
from smallfry.costing import cost, macs
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import EKFAC, KFAC, SNGD
from smallfry.training.method import Running, Setting
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.groups import mask
from smallfry.transforms.resize import tensors_of

pytest.importorskip("torch_pruning", reason="finding channels of convolutions needs Torch-Pruning")

SMALL = {"embed_dim": 32, "num_heads": 4, "mlp_hidden_dim": 24, "depth": 2, "latent_steps": 1}
MICRO = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 4, "drop_rate": 0.0, **SMALL})
LOOPNET = ModelSpec("loopnet_70k", {"num_classes": 4})
MODELS = {
    "vitrm": (MICRO, (1, 8, 8)),
    "loopnet": (LOOPNET, (3, 16, 16)),
    "resnet8": (ModelSpec("resnet8_mlperf_tiny", {"num_classes": 4}), (3, 16, 16)),
    "cct": (ModelSpec("cct_2_3x2_32", {"num_classes": 4}), (3, 32, 32)),
    "mobilenet": (ModelSpec("mobilenetv3_small_050", {"num_classes": 4}), (3, 32, 32)),
}
SLOW = ("cct", "mobilenet", "resnet8")
STEPS = 34
HESSO = compress.HESSO(0.5, begin=2, end=26, periods=3, divisible=4)
CRIC = compress.CRIC(0.5, begin=2, shrinking=4, sampling_steps=3, cycles=1, divisible=4)
OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.005, 0.9, weight_decay=1e-3),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
    "muon": lambda m: create_optimizer_v2(m, "nmuon", 1e-3),
    "kfac": lambda m: KFAC(m, 0.05, likelihood="categorical", check="off"),
    "ekfac": lambda m: EKFAC(m, 0.05, likelihood="categorical", check="off"),
    "sngd": lambda m: SNGD(m, 0.05, likelihood="categorical", check="off"),
}


def begin(method, name="vitrm", optimizer="adamw", steps=STEPS):
    spec, shape = MODELS[name]
    torch.manual_seed(0)
    model = build(spec).train()
    inner = OPTIMIZERS[optimizer](model)
    running = Running([method], model, Setting(spec, torch.randn(2, *shape), (), steps))
    running.attach(inner)
    return model, running, inner


def train(model, running, optimizer, start, end, shape=(1, 8, 8)):
    for number in range(start, end):
        torch.manual_seed(number)
        images, labels = torch.randn(16, *shape), torch.randint(4, (16,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        running.observe(loss.detach)
        optimizer.step()


def channels(running):
    (method,) = running._started
    return method.groups, method.gone


@pytest.mark.parametrize(
    "optimizer", [pytest.param(o, marks=pytest.mark.slow) if "f" in o else o for o in OPTIMIZERS]
)
def test_half_of_the_channels_go_under_any_optimizer(optimizer):
    model, running, inner = begin(HESSO, optimizer=optimizer)
    train(model, running, inner, 0, STEPS)
    groups, gone = channels(running)
    total = sum(group.channels for group in groups)
    assert abs(sum(map(len, gone)) - total // 2) <= 2
    for group, out in zip(groups, gone, strict=True):
        left = group.channels - len(out)
        assert left % (1 if group.counts else 4) == 0
        assert left >= 1


@pytest.mark.parametrize("method", [HESSO, CRIC], ids=["hesso", "cric"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS]
)
def test_the_trained_model_equals_the_cut_one(method, name):
    _, shape = MODELS[name]
    model, running, inner = begin(method, name, "adamw", 170)
    train(
        model, running, inner, 0, STEPS if method is HESSO else 168 if name in SLOW else 60, shape
    )
    model.eval()
    groups, gone = channels(running)
    assert any(gone)
    tensors = tensors_of(model)
    for group, out in zip(groups, gone, strict=True):
        for each in group.zeroed:
            entries = each.entries[out].flatten()
            assert not tensors[each.tensor].index_select(each.dim, entries).any()
    images = torch.randn(4, *shape)
    before = cost(model, images[:1])
    expected = model(images)
    small = running.finish()
    pairs = zip(groups, gone, strict=True)
    kept = [
        f"{group.name}: {group.channels - len(out)} of {group.channels}" for group, out in pairs
    ]
    assert running.reports[0]["lists"]["channels kept"] == kept
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert cost(model, images[:1]).macs < before.macs
    assert torch.equal(build(small, model.state_dict())(images), model(images))


@pytest.mark.parametrize("method", [HESSO, CRIC], ids=["hesso", "cric"])
@pytest.mark.parametrize(
    ("optimizer", "stops"),
    [pytest.param("adamw", (7, 28, 33), marks=pytest.mark.slow), ("sgd", (13, 26))],
)
def test_a_stopped_run_continues_to_the_bit(method, optimizer, stops):
    whole, running, inner = begin(method, optimizer=optimizer, steps=60)
    saved = {}
    for start, stop in pairwise((0, *stops, 36)):
        train(whole, running, inner, start, stop)
        saved[stop] = copy.deepcopy([part.state_dict() for part in (running, inner, whole)])
    for stop in stops:
        again, resumed, other = begin(method, optimizer=optimizer, steps=60)
        for part, state in zip((resumed, other, again), saved[stop], strict=True):
            part.load_state_dict(state)
        train(again, resumed, other, stop, 36)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        assert channels(running)[1] == channels(resumed)[1]
    assert any(channels(running)[1])


def test_a_share_of_the_arithmetic_is_met_from_below():
    method = compress.HESSO(0.5, of="macs", begin=2, end=20, periods=2, divisible=4)
    model, running, inner = begin(method, "loopnet", "sgd")
    example = torch.zeros(1, 3, 16, 16)
    before = macs(model, example)
    train(model, running, inner, 0, 22, (3, 16, 16))
    running.finish()
    assert 0.42 * before < macs(model, example) <= 0.5 * before


def test_macs_of_a_shared_block_count_at_every_call():
    model, running, _ = begin(compress.HESSO(0.1, of="macs", include=("*.mlp.fc1",)))
    (method,) = running._started
    none = [[] for _ in method.groups]
    one = [[0], *none[1:]]
    saved = method.cost_without(none) - method.cost_without(one)
    fc1, rows = model.get_submodule(method.groups[0].name), []
    fc1.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0][..., 0].numel()))
    model.eval()(torch.zeros(1, 1, 8, 8))
    assert len(rows) > 1
    assert saved == sum(rows) * 3 * fc1.in_features  # value row, gate row and column


def test_an_average_of_weights_is_cut_where_the_last_weights_are_zero():
    model, running, inner = begin(HESSO)
    average = copy.deepcopy(model).eval()
    train(model, running, inner, 0, STEPS)
    groups, gone = channels(running)
    running.detach()
    (method,) = running._started
    masked = copy.deepcopy(average)
    for group, out in zip(groups, gone, strict=True):
        mask(masked, group, torch.tensor(out, dtype=torch.int64))
    method.finish(average)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(average(images), masked(images), atol=1e-5, rtol=1e-5)


def test_moments_of_removed_channels_are_cleared():
    model, running, inner = begin(HESSO)
    train(model, running, inner, 0, 26)
    groups, gone = channels(running)
    tensors = tensors_of(model)
    slices = [(s, out) for g, out in zip(groups, gone, strict=True) for s in g.zeroed if out]
    for each, out in slices:
        state = inner.state[tensors[each.tensor]]
        entries = each.entries[out].flatten()
        assert state["exp_avg"].any()
        # the last step's gradient is there again, but nothing from before
        assert state["exp_avg"].index_select(each.dim, entries).abs().max() < 1


def test_steps_that_are_left_out_delay_nothing():
    """Deep supervision leaves a batch early, and numbers of steps have gaps."""
    model, running, inner = begin(HESSO)
    for number in (0, 1, 2, 9, 10, 17, 30, 33):
        running.step = number
        train(model, running, inner, number, number + 1)
    groups, gone = channels(running)
    assert abs(sum(map(len, gone)) - sum(g.channels for g in groups) // 2) <= 2


def test_a_run_that_ends_early_says_so():
    for method, steps, end, message in (
        (HESSO, STEPS, 12, "period 2 of 3"),
        (CRIC, 60, 5, "5 steps"),
    ):
        model, running, inner = begin(method, steps=steps)
        train(model, running, inner, 0, end)
        with pytest.warns(SmallfryWarning, match=message):
            running.finish()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress.HESSO(1.0), r"hesso.sparsity must be in \[0, 1\)"),
        (lambda: compress.HESSO(begin=0.6, end=0.6), "begin must come before end"),
        (lambda: compress.HESSO(periods=0), "periods at least 1"),
        (lambda: compress.HESSO(weights=(1.0,)), "5 numbers"),
        (lambda: compress.HESSO(cosine_sign=0), "1 or -1"),
        (lambda: compress.HESSO(of="bytes"), "of must be one of channels, macs, ms"),
        (lambda: compress.HESSO(of="macs", reference_selection=True), "goes with of channels"),
        (lambda: compress.CRIC(divisible=0), "cric.divisible"),
        (lambda: compress.CRIC(cycles=0), "at least 1"),
        (lambda: compress.CRIC(shrinking=0.0), "above 0"),
        (lambda: begin(compress.HESSO(end=500)), "2? and 500 of 34|of 34 steps"),
        (lambda: begin(compress.HESSO(0.99, of="macs")), "out of reach: the groups allow 0"),
        (lambda: begin(compress.HESSO(include=("nothing",))), "matches no group"),
        (lambda: begin(compress.HESSO(divisible=1000, exclude=("*qkv",))), "no group|matches"),
        (lambda: begin(compress.CRIC()), "cric needs .* steps for 4 groups, and the run has 34"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_cric_needs_the_loss():
    model, _, inner = begin(CRIC, steps=60)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    inner.step()
    with pytest.raises(UsageError, match=r"session.observe\(loss\)"):
        inner.step()


def test_methods_need_an_example():
    session = pytest.raises(UsageError, match="hesso needs example inputs")
    with session:
        compress.Session(nn.Linear(2, 2), [compress.HESSO()], torch.empty(0), 10)


# The pieces


def test_directions_are_gradients_of_sgd_and_leave_decoupled_decay_out():
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    still = nn.Parameter(torch.ones(2))
    gradient = torch.randn_like(weight)
    for kind, decoupled in ((torch.optim.SGD, False), (torch.optim.AdamW, True)):
        with torch.no_grad():
            optimizer = kind([weight], lr=0.1, weight_decay=0.5)
            before = {"w": weight.detach().clone(), "still": still.detach().clone()}
            weight.grad = gradient.clone()
            optimizer.step()
        found = directions(optimizer, before, {"w": weight, "still": still})
        assert is_decoupled(optimizer, optimizer.param_groups[0]) == decoupled
        expected = gradient.sign() if decoupled else gradient + 0.5 * before["w"]
        torch.testing.assert_close(found["w"], expected, atol=1e-6, rtol=1e-6)
        assert not found["still"].any()
    optimizer.param_groups[0]["lr"] = 0.0
    assert torch.equal(directions(optimizer, {"w": weight}, {"w": weight})["w"], gradient)


def test_the_lowest_go_and_a_block_of_each_group_stays():
    scores = [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([5.0, 6.0, 7.0, 8.0])]
    assert lowest(scores, [[0, 1, 3], [0, 2]], 4) == [[0, 1, 3], [0]]
    assert lowest(scores, [[1, 3], [2]], 99) == [[1, 3], [2]]
    assert lowest_blocks(scores, [[], []], 4, [2, 2]) == [[0, 1], [0, 1]]
    assert lowest_blocks(scores, [[0], []], 3, [2, 1]) == [[1], [0]]
    assert lowest_blocks(scores, [[], []], 0, [2, 2]) == [[], []]
    assert lowest_blocks(scores, [[], []], 99, [3, 4]) == [[0], []]
    assert without([1, 2], 4).tolist() == [0, 3]


def test_the_most_salient_blocks_come_back_while_the_rest_fits():
    scores = [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([5.0, 6.0, 7.0, 8.0])]
    chosen = [[0, 1, 2], [0, 1]]

    def least(number):
        return lambda trial: sum(map(len, trial)) >= number

    assert give_back(scores, chosen, [1, 1], least(3)) == [[0, 1, 2], []]
    assert give_back(scores, chosen, [1, 2], least(4)) == [[0, 1], [0, 1]]
    assert give_back(scores, chosen, [1, 1], least(0)) == [[], []]
    assert give_back(scores, chosen, [1, 1], least(9)) == chosen
    assert give_back(scores, chosen, [4, 4], least(0)) == chosen  # of which no block is whole


def test_random_choices_meet_their_number_within_half_a_block():
    torch.manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(3, 40, (4,)).tolist()
        steps = [min(size, s) for size, s in zip(sizes, (1, 2, 4, 8), strict=True)]
        scores = [torch.rand(size) for size in sizes]
        most = sum(size - step for size, step in zip(sizes, steps, strict=True))
        number = int(torch.randint(0, most + 1, ()))
        plan = lowest_blocks(scores, [[] for _ in sizes], number, steps)
        gone = lowest(scores, plan, len(plan) // 2)
        more = lowest_blocks(scores, gone, number, steps)
        both = [sorted(a + b) for a, b in zip(gone, more, strict=True)]
        for size, step, out in zip(sizes, steps, both, strict=True):
            assert len(set(out)) == len(out)
            left = size - len(out)
            assert left >= step
            assert not out or left % step == 0
        assert abs(sum(map(len, both)) - number) <= 8


def test_zero_sparsity_changes_nothing():
    model, running, inner = begin(compress.HESSO(0.0, begin=2, end=8, periods=2))
    plain, nothing, other = begin(compress.HESSO(0.0, begin=2, end=8, periods=2))
    nothing.detach()
    train(model, running, inner, 0, 10)
    train(plain, nothing, other, 0, 10)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert running.finish() == MICRO


def test_the_report_has_the_channels_that_stay_and_the_recurrent_layers_of_a_crnn():
    spec, reports = ModelSpec("crnn_dw_s", {"num_classes": 5}), []
    images = torch.randn(2, 1, 32, 128)
    with pytest.warns(SmallfryWarning, match=r"recurrent layers keep all .* \(mixer.rnn\)"):
        small, found = compress.apply_to_model(
            build(spec), [compress.Magnitude(0.5)], spec=spec, example=images, reports=reports
        )
    lists = reports[0]["lists"]
    assert lists["recurrent layers, kept whole"] == ["mixer.rnn"]
    names = [f"cnn.{number}" for number in (39, 36, 33, 27, 21, 15, 9, 3)]
    widths = {name: build(spec).get_submodule(name).out_channels for name in names}
    kept = {name: small.get_submodule(name).out_channels for name in names}
    assert lists["channels kept"] == [f"{name}: {kept[name]} of {widths[name]}" for name in names]
    assert sum(kept.values()) < 0.7 * sum(widths.values())
    assert small.mixer.rnn.input_size == kept["cnn.39"]
    assert torch.equal(build(found, small.state_dict()).eval()(images), small.eval()(images))
