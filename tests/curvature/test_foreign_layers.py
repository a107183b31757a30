"""Attention of PyTorch, and layers of other packages: covered where they are a known product."""

import warnings

import pytest
import timm
import torch
from dense_fisher import dense_fisher, dense_of, observe
from torch import nn
from torch.nn import functional as F

from smallfry.curvature import Categorical, Taps, cover
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim import EKFAC, KFAC, ExactNG

D = torch.float64


class Conv1D(nn.Module):
    """As the one of transformers."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Attending(nn.Module):
    def __init__(self, cross=False, masked=False, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **settings)
        self.cross, self.masked, self.first = cross, masked, not settings.get("batch_first")

    def forward(self, x):
        key, value = (torch.tanh(x[:, :2]), x[:, 1:]) if self.cross else (x, x)
        mask = torch.tensor([[False, False, True]]).expand(len(x), 3) if self.masked else None
        parts = [p.transpose(0, 1) if self.first else p for p in (x, key, value)]
        z, _ = self.attention(*parts, key_padding_mask=mask)
        return z.mean(0 if self.first else 1)


class Scaled(nn.Linear):
    """Not its parent's product."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class Adapted(nn.Linear):
    """Its parent's product at first, as LoRA's."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.low = nn.Parameter(torch.zeros(sizes[1], sizes[0]))

    def forward(self, x):
        return F.linear(x, self.weight + self.low, self.bias)


COVERED = {
    "attention": (lambda: Attending(batch_first=True), (3, 4)),
    "attention, sequence first": (Attending, (3, 4)),
    "attention, cross": (lambda: Attending(cross=True, batch_first=True), (3, 4)),
    "attention, masked": (lambda: Attending(masked=True, batch_first=True), (3, 4)),
    "attention, no bias": (lambda: Attending(bias=False, batch_first=True), (3, 4)),
    "Conv1D": (
        lambda: nn.Sequential(Conv1D(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
        (3, 4),
    ),
    "timm's Linear": (lambda: timm.layers.Linear(4, 3), (4,)),
}


@pytest.mark.parametrize("case", COVERED)
def test_the_block_is_the_exact_fisher(case):
    torch.manual_seed(1)
    build, shape = COVERED[case]
    model = build().to(D)
    x = torch.randn(5, *shape, dtype=D)
    coverage = cover(model)
    assert not coverage.uncovered
    expected = model(x)
    seen = observe(model, coverage, x, Categorical())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)  # the forward is PyTorch's again
    for block in coverage.blocks:
        names = list(block.parameters)
        dense = dense_fisher(model, x, "categorical", names)
        torch.testing.assert_close(dense_of(block, seen.rows(block, D)), dense)


def test_an_attention_spelled_out_gives_what_it_gave():
    torch.manual_seed(1)
    settings = {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.2}
    model = nn.MultiheadAttention(4, 2, batch_first=True, **settings).to(D)
    x, mask = torch.randn(5, 3, 4, dtype=D), torch.ones(3, 3, dtype=torch.bool).triu(1)
    coverage = cover(model)
    assert set(coverage.uncovered) == {"bias_k", "bias_v"}
    ends = []
    for tapped in (False, True):
        from smallfry.curvature import Taps

        taps = Taps(coverage.blocks)
        if tapped:
            taps.open()
        torch.manual_seed(3)
        z, weights = model(x, x, x, attn_mask=mask, average_attn_weights=False)
        ends.append((z, weights, torch.rand(1)))
        assert [call.layer for call in taps.close()] == ["in_proj", "out_proj"] * tapped
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)
    assert "forward" not in model.__dict__


def test_a_transformer_encoder_is_covered_but_for_its_norms():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    coverage = cover(model)
    assert {name for name in coverage.uncovered if "norm" not in name} == set()
    head = nn.Sequential(model, nn.Flatten(), nn.Linear(24, 3))
    for kind in (KFAC, EKFAC, ExactNG):
        optimizer = kind(head, lr=0.1, statistics_every=2)
        before = [p.detach().clone() for p in head.parameters()]
        for _ in range(3):
            loss = F.cross_entropy(head(torch.randn(6, 3, 8)), torch.arange(6) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(not torch.equal(p, q) for p, q in zip(head.parameters(), before, strict=True))


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_behind_attention_draws_the_same_with_taps_and_without(batch_first):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=batch_first).to(D)
    x, taps = torch.randn(5, 3, 8, dtype=D), Taps(cover(model).blocks)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(model(x).detach())
        taps.open()
    taps.close()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled(4, 3), "Scaled has a forward of its own"),
        (Adapted(4, 3), "Adapted has a forward of its own"),
        (timm.layers.Conv2dSame(2, 3, 3, stride=2), "Conv2dSame has a forward of its own"),
        (nn.MultiheadAttention(4, 2, kdim=3), "MultiheadAttention"),
        (nn.LSTMCell(3, 4), "LSTMCell is not covered"),
    ],
)
def test_what_is_no_known_product_is_announced(layer, reason):
    coverage = cover(nn.ModuleList([layer]))
    assert not coverage.blocks
    assert reason in " ".join(coverage.uncovered.values())


def test_trying_a_layer_leaves_random_numbers_and_gradients_alone():
    layer = timm.layers.Linear(4, 3)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    cover(layer)
    assert torch.equal(torch.rand(3), expected)
    assert layer.weight.grad is None


def test_an_excluded_attention_is_left_alone():
    model = Attending(batch_first=True)
    coverage = cover(nn.Sequential(model, nn.Linear(4, 3)), exclude=["0.attention"])
    assert [block.name for block in coverage.blocks] == ["1.weight"]
    assert set(coverage.uncovered.values()) == {"excluded"}


def test_one_part_of_an_attention_may_be_excluded():
    torch.manual_seed(1)
    model, x = Attending(batch_first=True).to(D), torch.randn(5, 3, 4, dtype=D)
    coverage = cover(model, exclude=["attention.in_proj"])
    assert coverage.uncovered == dict.fromkeys(
        ("attention.in_proj_weight", "attention.in_proj_bias"), "excluded"
    )
    (block,) = coverage.blocks
    dense = dense_fisher(model, x, "categorical", list(block.parameters))
    seen = observe(model, coverage, x, Categorical())
    torch.testing.assert_close(dense_of(block, seen.rows(block, D)), dense)


def test_an_output_projection_that_attention_would_not_call_is_left_out():
    attention = nn.MultiheadAttention(4, 2)
    attention.out_proj = Adapted(4, 4)
    coverage = cover(nn.ModuleList([attention]))
    assert not coverage.blocks
    assert coverage.uncovered["0.in_proj_weight"] == "MultiheadAttention is not covered"


def test_little_coverage_is_announced_with_the_largest():
    embedding = nn.EmbeddingBag(100, 24)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(24, 9))
    with pytest.warns(
        SmallfryWarning, match=r"only 9% .*'0.weight' \(2,400: EmbeddingBag is not c"
    ):
        KFAC(model)
    embedding.weight.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KFAC(model)


def test_a_lazy_layer_is_named():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(UsageError, match=r"layer '0' .* lazy .* call the model once"):
        KFAC(model)
    model(torch.randn(2, 5))
    KFAC(model)


@pytest.mark.slow
def test_gpt_2_from_its_configuration_is_covered_and_learns():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallfryWarning)
        optimizer = KFAC(
            model,
            lr=0.1,
            likelihood={"logits": "categorical"},
            loss_scale="mean",
            fallback_lr=1e-2,  # of the embeddings, which hold most of what is to be learned here
        )
    assert {"transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"} <= {
        block.name for block in optimizer.blocks
    }
    tokens, losses = torch.arange(48).view(6, 8) % 11, []
    for _ in range(60):
        loss = model(input_ids=tokens, labels=tokens).loss  # the last position has no label
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
