"""Taps and coverage: sharing, repeated calls, freezing, and what is left out."""

import copy

import pytest
import torch
from dense_fisher import dense_fisher, dense_of, observe
from torch import nn
from torch.nn import functional as F

from smallfry.curvature import Categorical, Taps, cover
from smallfry.errors import UsageError

D = torch.float64


class Recursive(nn.Module):
    """One layer used several times, and a weight shared with a module that has its own bias."""

    def __init__(self, steps=3, dim=4):
        super().__init__()
        self.first, self.inner = nn.Linear(2, dim), nn.Linear(dim, dim)
        self.twin = nn.Linear(dim, dim)
        self.twin.weight = self.inner.weight
        self.bare = nn.Linear(dim, dim, bias=False)
        self.bare.weight = self.inner.weight
        self.head, self.steps = nn.Linear(dim, 3), steps

    def forward(self, x):
        z = h = self.first(x)
        for _ in range(self.steps):
            z = torch.tanh(self.inner(z) + h)
        return self.head(self.bare(torch.tanh(self.twin(z))))


def test_a_shared_weight_is_one_block_with_the_exact_shared_fisher():
    model = Recursive().to(D)
    x = torch.randn(5, 2, dtype=D)
    coverage = cover(model)
    assert not coverage.uncovered
    inner = next(b for b in coverage.blocks if "inner.weight" in b.parameters)
    assert list(inner.layers) == ["inner", "twin", "bare"]
    assert list(inner.parameters) == ["inner.weight", "inner.bias", "twin.bias"]
    rows = observe(model, coverage, x, Categorical()).rows(inner, D)
    assert rows.uses == 5
    expected = dense_fisher(model, x, "categorical", inner.parameters)
    torch.testing.assert_close(dense_of(inner, rows), expected)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_weight_or_bias_leaves_the_other_covered(frozen):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(D)
    getattr(model[0], frozen).requires_grad_(False)
    x = torch.randn(5, 3, dtype=D)
    coverage = cover(model)
    block = coverage.blocks[0]
    left = "bias" if frozen == "weight" else "weight"
    assert list(block.parameters) == [f"0.{left}"]
    rows = observe(model, coverage, x, Categorical()).rows(block, D)
    expected = dense_fisher(model, x, "categorical", block.parameters)
    torch.testing.assert_close(dense_of(block, rows), expected)


def test_every_trained_parameter_is_in_one_block_or_has_a_reason():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict(
        {
            "odd": Odd(2, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "attention": nn.MultiheadAttention(4, 2),
            "embedding": nn.Embedding(5, 3),
            "tied": nn.Linear(3, 5, bias=False),
            "bag": nn.EmbeddingBag(5, 3),
            "norm": nn.LayerNorm(3),
            "plain": nn.Linear(2, 2),
            "frozen": nn.Linear(2, 2),
        }
    )
    model["tied"].weight = model["embedding"].weight
    model["frozen"].requires_grad_(False)
    blocks, uncovered = cover(model)
    attention = ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert [b.name for b in blocks] == [*attention, "embedding.weight", "plain.weight"]
    assert list(blocks[2].layers) == ["tied", "embedding"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {name for b in blocks for name in b.parameters} | set(uncovered) == trained
    assert "forward of its own" in uncovered["odd.weight"]
    assert "EmbeddingBag" in uncovered["bag.weight"]
    assert "computed from other" in uncovered["normed.bias"]


def test_modules_can_be_excluded_by_pattern_and_a_wrong_name_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    blocks, uncovered = cover(model, exclude=["1"])
    assert [b.name for b in blocks] == ["0.weight"]
    assert uncovered["1.0.weight"] == "excluded"
    with pytest.raises(UsageError, match="no such module"):
        cover(model, exclude=["heed"])


def test_closed_taps_leave_no_hooks_and_no_calls():
    model = nn.Linear(2, 2)
    taps = Taps(cover(model).blocks)
    taps.open()
    assert model._forward_hooks
    model(torch.zeros(1, 2))
    assert len(taps.close()) == 1
    assert not model._forward_hooks
    model(torch.zeros(1, 2))
    assert taps.close() == []


def test_calls_without_gradient_are_no_part_of_it():
    model = Recursive().to(D)
    coverage = cover(model)
    taps = Taps(coverage.blocks)
    taps.open()
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=D))
    assert taps.close() == []


def test_an_input_that_is_overwritten_later_is_refused_by_name():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            x = x.clone()
            y = self.layer(x)
            x += 1
            return y

    coverage = cover(model := Overwriting())
    seen = observe(model, coverage, torch.zeros(3, 2), Categorical())
    with pytest.raises(UsageError, match="input of layer 'layer' was overwritten"):
        seen.rows(coverage.blocks[0], torch.float32)


def test_another_weight_than_at_construction_is_noted_by_name():
    model = nn.Sequential(nn.Linear(2, 2))
    taps = Taps(cover(model).blocks)
    model[0].weight = nn.Parameter(torch.zeros(3, 2))
    model[0].bias = None
    taps.open()
    model(torch.zeros(1, 2))
    assert taps.close() == []
    assert taps.foreign == ["0"]


def test_a_copy_of_the_model_is_as_good_as_new():
    model = nn.Sequential(nn.Linear(2, 2))
    taps = Taps(cover(model).blocks)
    taps.open()
    taps.close()
    assert not copy.deepcopy(model)[0]._forward_hooks


def test_gradient_checkpointing_taps_each_call_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    model = Checkpointed().to(D)
    x = torch.randn(4, 2, dtype=D)
    coverage = cover(model)
    seen = observe(model, coverage, x, Categorical())
    for block in coverage.blocks:
        expected = dense_fisher(model.body, x, "categorical", _inner(block))
        torch.testing.assert_close(dense_of(block, seen.rows(block, D)), expected)


def _inner(block):
    return [name.removeprefix("body.") for name in block.parameters]


def test_uses_can_be_drawn_without_bias_in_the_factors():
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).to(D)
    x = torch.randn(3, 6, 2, dtype=D)
    coverage = cover(model)
    seen = observe(model, coverage, x, Categorical(), "mc", torch.Generator().manual_seed(0))
    block = coverage.blocks[0]
    everything = seen.rows(block, D)
    drawn = [seen.rows(block, D, lambda n, i=i: torch.tensor([i, (i + 1) % n])) for i in range(6)]
    whole = torch.einsum("hknto,hkntp->op", everything.gradients, everything.gradients)
    mean = sum(torch.einsum("hknto,hkntp->op", r.gradients, r.gradients) for r in drawn) / 6
    torch.testing.assert_close(mean, whole)
    assert F.mse_loss(drawn[0].inputs[:, :, 0], everything.inputs[:, :, 0]) == 0
