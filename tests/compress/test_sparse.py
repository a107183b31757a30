"""Sparse training: masks, schedules, each method's rule, resume, and the report."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry import compress, cost
from smallfry.compress.sparse.masks import largest
from smallfry.compress.sparse.report import sparsity_report
from smallfry.compress.sparse.schedules import (
    cubic_sparsity,
    kernel_densities,
    n_of_m,
    update_fraction,
)
from smallfry.errors import UsageError
from smallfry.optim import KFAC
from smallfry.training.method import Running, Setting
from smallfry.transforms import ModelSpec, build

SMALL = {"embed_dim": 32, "num_heads": 4, "mlp_hidden_dim": 24, "depth": 2, "latent_steps": 1}
SPEC = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 4, "drop_rate": 0.0, **SMALL})
STEPS = 24
METHODS = {
    "gradual": compress.GradualMagnitude(0.8, every=3),
    "layerwise": compress.GradualMagnitude(0.8, every=5, scope="layer"),
    "snip": compress.SNIP(0.8),
    "rigl": compress.RigL(0.8, every=4),
    "n_of_m": compress.NofM(),
    "keep_zeros": compress.KeepZeros(),
}
OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.01, 0.9, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 2e-3),
    "kfac": lambda m: KFAC(m, 0.05, likelihood="categorical", check="off"),
}


def begin(method, optimizer="adamw", steps=STEPS):
    torch.manual_seed(0)
    model = build(SPEC).train()
    if isinstance(method, compress.KeepZeros):
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight[::2] = 0
    inner = OPTIMIZERS[optimizer](model)
    running = Running([method], model, Setting(SPEC, torch.randn(2, 1, 8, 8), (), steps))
    running.attach(inner)
    return model, running, inner


def train(model, optimizer, start, end, after=None):
    for number in range(start, end):
        torch.manual_seed(number)
        images, labels = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if after is not None:
            after(number)


def masked(running):
    (method,) = running._started
    return method


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "optimizer", ["adamw", "sgd", pytest.param("kfac", marks=pytest.mark.slow)]
)
def test_masked_weights_are_zero_after_every_step_and_in_the_result(name, optimizer):
    model, running, inner = begin(METHODS[name], optimizer)
    method = masked(running)

    def check(_):
        for key, mask in method.masks.items():
            assert not method.weights[key][~mask].any()

    train(model, inner, 0, STEPS, check)
    assert method.masks
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(0.01)
    assert running.finish() == SPEC
    method.settle(average)
    zeros = {key: (~mask).sum() for key, mask in method.masks.items()}
    for each in (model, average):
        for key, parameter in each.named_parameters():
            assert (parameter == 0).sum() >= zeros.get(key, 0)
    assert sum(zeros.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_continues_to_the_bit(name):
    whole, running, inner = begin(METHODS[name])
    saved = {}
    for start, stop in pairwise((0, 2, 13, STEPS)):
        train(whole, inner, start, stop)
        saved[stop] = copy.deepcopy([part.state_dict() for part in (running, inner, whole)])
    for stop in (2, 13):
        torch.manual_seed(5)
        again, resumed, other = begin(METHODS[name])
        for part, state in zip((resumed, other, again), saved[stop], strict=True):
            part.load_state_dict(state)
        train(again, other, stop, STEPS)
        for key, tensor in whole.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[key]), key
        for key, mask in masked(running).masks.items():
            assert torch.equal(mask, masked(resumed).masks[key])


def test_rigl_keeps_the_number_of_active_weights_at_every_step():
    method = compress.RigL(0.9, every=1, end=1.0)
    model, running, inner = begin(method, "sgd", 100)
    state = masked(running)
    first = {key: mask.clone() for key, mask in state.masks.items()}
    before = {key: mask.clone() for key, mask in first.items()}
    moved = []

    def check(step):
        for key, mask in state.masks.items():
            assert mask.sum() == first[key].sum()
            moved.append(int((mask & ~before[key]).sum()))
            fraction = update_fraction(0.3, step, 100)
            active = int(first[key].sum())
            assert step == 0 or moved[-1] == min(int(fraction * active), int((~mask).sum()))
            before[key] = mask.clone()

    train(model, inner, 0, 100, check)
    assert sum(moved) > 0
    total = sum(mask.numel() for mask in first.values())
    kept = sum(int(mask.sum()) for mask in first.values())
    assert abs(kept - 0.1 * total) <= len(first)


def test_rigl_grows_where_the_gradient_is_large_and_drops_the_smallest():
    model, running, inner = begin(compress.RigL(0.5, every=1, alpha=0.2), "sgd")
    train(model, inner, 0, 1)
    state = masked(running)
    key = next(iter(state.weights))
    weight, mask = state.weights[key], state.masks[key].clone()
    inner.zero_grad()
    F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(4, (8,))).backward()
    sizes, gradient = weight.detach().abs().clone(), weight.grad.abs().clone()
    state.before_step(inner, 1)
    dropped, grown = mask & ~state.masks[key], state.masks[key] & ~mask
    assert dropped.sum() == grown.sum() > 0
    assert sizes[dropped].max() <= sizes[mask & ~dropped].min()
    assert gradient[grown].min() >= gradient[~mask & ~grown].max()
    assert not weight[grown].any()
    assert not inner.state[weight]["momentum_buffer"][grown].any()


def test_without_moves_the_random_masks_stay():
    model, running, inner = begin(compress.RigL(0.9, alpha=0.0, every=1))
    first = {key: mask.clone() for key, mask in masked(running).masks.items()}
    train(model, inner, 0, 5)
    for key, mask in masked(running).masks.items():
        assert torch.equal(mask, first[key])


def test_a_trained_model_keeps_its_largest_weights():
    model, running, _ = begin(compress.RigL(0.5, first="magnitude", distribution="uniform"))
    torch.manual_seed(0)
    fresh = dict(build(SPEC).named_parameters())
    for key, mask in masked(running).masks.items():
        sizes = fresh[key].detach().abs()
        assert sizes[mask].min() >= sizes[~mask].max()
        assert abs(int(mask.sum()) - mask.numel() / 2) <= 1
        assert torch.equal(dict(model.named_parameters())[key], fresh[key] * mask)


def test_gradual_sparsity_follows_the_cubic_and_never_lets_a_weight_return():
    method = compress.GradualMagnitude(0.9, initial=0.1, begin=2, end=20, every=3)
    model, running, inner = begin(method)
    state, shares = masked(running), []

    def note(_):
        total = sum(w.numel() for w in state.weights.values())
        zeros = sum(int((~m).sum()) for m in state.masks.values())
        shares.append(zeros / total)

    train(model, inner, 0, STEPS, note)
    assert shares == sorted(shares)
    assert shares[0] == 0
    for t in (2, 5, 8, 20, 23):
        expected = cubic_sparsity(0.1, 0.9, (t - 2) // 3 / 6)
        assert shares[t - 1] == pytest.approx(expected, abs=1e-3), t


def test_snip_keeps_what_the_loss_feels():
    model, running, inner = begin(compress.SNIP(0.9, one_a_row=False))
    torch.manual_seed(3)
    images, labels = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
    F.cross_entropy(model(images), labels).backward()
    state = masked(running)
    assert state.weights["halt_head.weight"].grad is None  # stays dense
    reached = {key: w for key, w in state.weights.items() if w.grad is not None}
    scores = {key: (w * w.grad).detach().abs().clone() for key, w in reached.items()}
    inner.step()
    kept = torch.cat([scores[key][mask] for key, mask in state.masks.items()])
    gone = torch.cat([scores[key][~mask] for key, mask in state.masks.items()])
    assert kept.min() >= gone.max()
    assert len(kept) == round(0.1 * (len(kept) + len(gone)))


def test_snip_leaves_no_row_empty_unless_told():
    for one_a_row in (True, False):
        model, running, inner = begin(compress.SNIP(0.98, one_a_row))
        train(model, inner, 0, 1)
        empty = [int((~mask.flatten(1).any(1)).sum()) for mask in masked(running).masks.values()]
        assert (sum(empty) == 0) == one_a_row


def test_straight_through_gradients_reach_unused_weights_which_decay():
    method = compress.NofM(decay=0.5)
    model, running, inner = begin(method, "sgd")
    train(model, inner, 0, 2)
    state = masked(running)
    key = next(iter(state.weights))
    weight = state.weights[key]
    dense, mask = state._dense[key].clone(), state.masks[key].clone()
    assert torch.equal(weight, dense * mask)
    assert dense[~mask].any()
    inner.zero_grad()
    F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(4, (8,))).backward()
    gradient = weight.grad.clone()
    state.before_step(inner, 2)
    assert torch.equal(weight, dense)
    torch.testing.assert_close(weight.grad, gradient + 0.5 * dense * ~mask)


def test_first_layer_classifier_biases_and_norms_stay_dense():
    model, running, _ = begin(compress.RigL(0.9))
    assert model.get_classifier() is model.head
    names = set(masked(running).weights)
    assert "head.weight" not in names
    assert not any("patch" in name or "norm" in name or "bias" in name for name in names)
    _, running, _ = begin(compress.RigL(0.9, ends=True))
    assert "head.weight" in masked(running).weights
    assert len(masked(running).weights) == len(names) + 2


def test_a_tied_weight_has_one_mask():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x))))

    running = Running([compress.RigL(0.5)], Tied(), Setting(SPEC, torch.zeros(1, 8), (), 3))
    assert list(masked(running).weights) == ["b.weight"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress.RigL(1.0), r"rigl.sparsity must be in \[0, 1\)"),
        (lambda: compress.RigL(first="best"), "first must be one of random, magnitude"),
        (lambda: compress.RigL(distribution="even"), "distribution must be one of kernel, uniform"),
        (lambda: compress.RigL(every=0), "at least 1"),
        (lambda: compress.SNIP(-0.1), r"snip.sparsity must be in \[0, 1\)"),
        (lambda: compress.NofM(4, 4), "1 to below m"),
        (lambda: compress.GradualMagnitude(0.5, initial=0.6), "at most sparsity"),
        (lambda: compress.GradualMagnitude(begin=0.6), "begin must come before end"),
        (lambda: begin(compress.GradualMagnitude(end=100)), "after the run's 24 steps"),
        (lambda: begin(compress.RigL(include=("nothing",))), "matches no linear layer"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# The pieces


def test_densities_sum_to_the_budget_and_none_is_above_one():
    torch.manual_seed(0)
    for _ in range(300):
        shapes = [
            torch.randint(1, 60, (2,)).tolist() + ([3, 3] if torch.rand(()) < 0.5 else [])
            for _ in range(int(torch.randint(1, 8, ())))
        ]
        density = float(torch.rand(()))
        found = kernel_densities(shapes, density)
        sizes = [math.prod(shape) for shape in shapes]
        kept = sum(size * share for size, share in zip(sizes, found, strict=True))
        assert kept == pytest.approx(density * sum(sizes), rel=1e-9)
        assert max(found) <= 1 + 1e-12
        assert min(found) >= 0
    two = kernel_densities([(10, 10), (1000, 1000)], 0.01)
    assert two[0] == pytest.approx(100 * two[1])  # (20/100) / (2,000/1,000,000)


def test_the_largest_are_marked_exactly():
    scores = [torch.tensor([[5.0, 4.0], [0.1, 0.2]]), torch.tensor([[3.0, 0.0]])]
    assert largest(scores, 3)[0].tolist() == [[True, True], [False, False]]
    forced = largest(scores, 3, one_a_row=True)
    assert [each.tolist() for each in forced] == [[[True, False], [False, True]], [[True, False]]]
    assert sum(int(each.sum()) for each in largest(scores, 1, one_a_row=True)) == 3


def test_n_of_m_keeps_the_largest_of_each_group_and_what_is_left_over():
    torch.manual_seed(0)
    weight = torch.randn(6, 11)
    mask = n_of_m(weight, 2, 4)
    for row, kept in zip(weight, mask, strict=True):
        for start in (0, 4):
            group = row[start : start + 4].abs()
            chosen = kept[start : start + 4]
            assert chosen.sum() == 2
            assert group[chosen].min() >= group[~chosen].max()
        assert kept[8:].all()
    convolution = n_of_m(torch.randn(3, 4, 3, 3), 1, 4)
    assert (convolution.flatten(1).view(3, 9, 4).sum(2) == 1).all()


# The report


def test_the_report_equals_counting_one_by_one():
    torch.manual_seed(0)
    model = build(SPEC).eval()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[torch.rand(48, 32) < 0.7] = 0
        model.blocks[0].mlp.fc1.weight[3] = 0
        model.blocks[1].attn.proj.weight[:, 5] = 0
        second = model.blocks[1].mlp.fc1.weight
        second.mul_(n_of_m(second, 2, 4))
    example = torch.zeros(1, 1, 8, 8)
    report = sparsity_report(model, example)
    by_name = {each.name: each for each in report.layers}
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(by_name) == set(modules)
    for name, module in modules.items():
        values = module.weight.flatten(1).tolist()
        found = by_name[name]
        assert found.weights == sum(map(len, values))
        assert found.zeros == sum(value == 0 for row in values for value in row)
        assert found.zero_rows == sum(not any(row) for row in values)
        two = all(
            sum(value != 0 for value in row[i : i + 4]) <= 2
            for row in values
            for i in range(0, len(row) // 4 * 4, 4)
        )
        assert found.is_2_of_4 == two
        nonzero = found.weights - found.zeros
        assert found.dense_bytes == 4 * found.weights
        assert found.csr_bytes == 8 * nonzero + 4 * (len(values) + 1)
        assert found.bitmask_bytes == math.ceil(found.weights / 8) + 4 * nonzero
    assert by_name["blocks.1.attn.proj"].zero_columns == 1
    assert by_name["blocks.1.mlp.fc1"].two_four_bytes < by_name["blocks.1.mlp.fc1"].dense_bytes
    assert by_name["blocks.0.mlp.fc1"].two_four_bytes is None
    # attention's own products are the only others
    assert 0.8 * cost(model, example).macs < report.macs <= cost(model, example).macs
    assert report.zeros == sum(each.zeros for each in report.layers)
    assert report.zero_macs < report.macs
    assert report.smallest_bytes() < sum(each.dense_bytes for each in report.layers)
    assert [line.partition(":")[0] for line in report.advice()] == [
        *("files", "CPU", "GPU", "structure")
    ]


def test_sparse_rows_pay_above_half_of_zeros_only():
    for share, pays in ((0.4, False), (0.6, True)):
        layer = nn.Linear(200, 100)
        with torch.no_grad():
            layer.weight.view(-1)[: int(share * 20_000)] = 0
        (found,) = sparsity_report(nn.Sequential(layer), torch.zeros(1, 200)).layers
        assert (found.csr_bytes < found.dense_bytes) == pays


def test_macs_of_the_report_are_those_of_convolutions_with_groups():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1, stride=2))
    example = torch.zeros(2, 4, 9, 9)
    assert sparsity_report(model, example).macs == cost(model, example).macs
