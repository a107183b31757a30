"""Rows that belong to no sample, to another than their place says, or to either."""

import pytest
import torch
from dense_fisher import dense_fisher, inverted_fisher
from torch import nn
from torch.nn import functional as F

from smallfry.curvature.kronecker import unpack
from smallfry.errors import UsageError
from smallfry.optim import EKFAC, KFAC, KPSVD, SNGD, ExactNG, TwoLevel

D = torch.float64


class Experts(nn.Module):
    """Tokens go to one of two experts."""

    def __init__(self, norm=False):
        super().__init__()
        self.router, self.experts = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 3) for _ in "ab"])
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        chosen, h = shares.argmax(-1), x.new_zeros(*x.shape[:2], 3)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            h = h.index_put((mine,), torch.tanh(expert(x[mine])) * shares[mine][:, number, None])
        return self.head(h.mean(1))


class Recurrent(nn.Module):
    """Sequence first inside."""

    def __init__(self, first=True):
        super().__init__()
        self.layer, self.head, self.first = nn.Linear(2, 3), nn.Linear(3, 3), first

    def forward(self, x):
        h = torch.tanh(self.layer(x.transpose(0, 1) if self.first else x))
        return self.head(h.mean(0 if self.first else 1))


class Windows(nn.Module):
    """Positions folded into the batch, position first or sample by sample."""

    def __init__(self, first, norm=False):
        super().__init__()
        self.layer, self.head, self.first = nn.Conv1d(2, 3, 1), nn.Linear(3, 3), first
        self.norm = nn.BatchNorm1d(3, affine=False) if norm else nn.Identity()

    def forward(self, x):
        samples, length = x.shape[:2]
        folded = x.transpose(0, 1) if self.first else x
        h = torch.tanh(self.norm(self.layer(folded.reshape(samples * length, 2, 1))))
        h = h.reshape(*folded.shape[:2], 3)
        return self.head(h.mean(0 if self.first else 1))


def once(model, kind, samples=6, length=5, fisher="exact", **settings):
    torch.manual_seed(2)
    x, y = torch.randn(samples, length, 2, dtype=D), torch.arange(samples) % 3
    optimizer = kind(model, lr=0.0, fisher=fisher, **settings)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer, x, y


def made(kind, *arguments, **settings):
    torch.manual_seed(1)
    return kind(*arguments, **settings).to(D)


@pytest.mark.parametrize("kind", [KFAC, SNGD])
def test_routed_rows_need_no_sample_where_uses_are_summed(kind):
    model = made(Experts)
    optimizer, x, _ = once(model, kind)
    chosen = model.router(x).argmax(-1)
    assert {int((chosen == n).sum()) % 6 for n in (0, 1)} != {0}
    for number in (0, 1):
        mine = x[chosen == number]
        a = torch.cat([mine, torch.ones(len(mine), 1, dtype=D)], 1)
        state = optimizer.curvature[f"experts.{number}.weight"]
        found = unpack(state["a" if kind is KFAC else "metric"])[0]
        torch.testing.assert_close(found, a.T @ a / len(mine))


def test_routed_rows_sum_to_the_gradients_of_sampled_targets():
    """G of an expert is the mean over samples of the sum over its rows."""
    model = made(Experts)
    optimizer, x, _ = once(model, KFAC)
    block = next(b for b in optimizer.blocks if b.name == "experts.0.weight")
    g = optimizer.approximation.factors(optimizer.curvature[block.name])[1][0]
    p = model(x).softmax(-1).detach()
    total = torch.zeros_like(g)
    for k in range(3):
        captured = []

        def capture(module, inputs, output, into=captured):
            into.append(output)

        handle = model.experts[0].register_forward_hook(capture)
        z = model(x)
        handle.remove()
        column = (p - F.one_hot(torch.tensor(k), 3)) * p[:, k : k + 1].sqrt()
        rows = torch.autograd.grad(z, captured[0], column)[0]
        total += rows.T @ rows / 6
    torch.testing.assert_close(g, total)


@pytest.mark.parametrize("kind", [EKFAC, KPSVD, ExactNG, TwoLevel])
def test_methods_that_need_the_sample_refuse_routed_rows(kind):
    settings = {"fine": "ekfac"} if kind is TwoLevel else {}
    with pytest.raises(
        UsageError, match=r"'experts\.\d'.*needs the sample of each row.*exclude=\['experts\.\d'\]"
    ):
        once(made(Experts), kind, **settings)
    once(made(Experts), kind, exclude=["experts.*"], **settings)


@pytest.mark.parametrize("kind", [EKFAC, KPSVD, ExactNG])
def test_routed_rows_that_are_a_multiple_by_chance_are_found(kind):
    model = made(Experts)
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias.copy_(torch.tensor([9.0, 0.0]))  # all to one
    model.experts[0].register_forward_pre_hook(lambda m, i: (i[0].flip(0),))
    model.experts[0].register_forward_hook(lambda m, i, o: o.flip(0))
    with pytest.raises(
        UsageError, match=r"layer 'experts.0': its rows are not in the order of the samples"
    ):
        once(model, kind)


@pytest.mark.parametrize("lengths", [(4,), (5, 4), (4, 5)])
@pytest.mark.parametrize("first", [True, False])
def test_a_sequence_as_long_as_the_batch_is_large_is_told_apart(first, lengths):
    model = made(Recurrent, first)
    optimizer = ExactNG(model, lr=0.0, fisher="exact", scope="block", burn_in=0)
    for length in lengths:
        torch.manual_seed(length)
        x, y = torch.randn(4, length, 2, dtype=D), torch.arange(4) % 3
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = inverted_fisher(optimizer, optimizer.blocks[0])[:6, :6]
    expected = dense_fisher(model, x, "categorical", ["layer.weight"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_exact_columns_do_not_add_up_through_the_statistics_of_a_batch():
    """In front of a batch norm the sampled Fisher's mean is that of the exact columns."""
    model = made(Windows, False, norm=True)
    traces = {}
    for fisher, draws in (("exact", 1), ("mc", 3000)):
        found = []
        for seed in range(200 if fisher == "exact" else 1):
            optimizer, _, _ = once(model, KFAC, fisher=fisher, draws=draws, seed=seed)
            found.append(optimizer.approximation.factors(optimizer.curvature["layer.weight"])[1])
        traces[fisher] = torch.stack(found).mean(0)[0]
    torch.testing.assert_close(traces["exact"], traces["mc"], rtol=0.1, atol=3e-4)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("length", [2, 3, 8])
@pytest.mark.parametrize("kind", [EKFAC, KPSVD, ExactNG])
def test_windows_folded_position_first_are_found(kind, length, norm):
    size = {"samples": 24, "length": length}
    once(made(Windows, False, norm), kind, **size)
    with pytest.raises(UsageError, match=r"layer 'layer'.*position first.*sample by sample"):
        once(made(Windows, True, norm), kind, **size)
    once(made(Windows, True, norm), KFAC, **size)
    once(made(Windows, True, norm), kind, exclude=["layer"], **size)
