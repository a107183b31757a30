"""RNN, LSTM and GRU of PyTorch: each weight a layer, with the exact Fisher of all its steps."""

import pytest
import torch
from dense_fisher import dense_fisher, dense_of, observe
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from smallfry.curvature import Categorical, Taps, cover
from smallfry.optim import EKFAC, KFAC, KPSVD, SNGD, Deflation, ExactNG

D = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-13}


class Reading(nn.Module):
    """A recurrent module whose outputs and last states make a prediction."""

    def __init__(self, kind, packed=False, **settings):
        super().__init__()
        self.recurrent, self.packed = kind(3, 4, **settings), packed
        self.first = settings.get("batch_first", False)

    def forward(self, x):
        if self.packed:  # of unlike lengths, not sorted: one sample always has the same one
            ends = 2 + (x[:, 0, 0] > 0).long() + (x[:, 0, 1] > 0).long()
            x = pack_sequence([s[:n] for s, n in zip(x, ends, strict=True)], enforce_sorted=False)
        elif not self.first:
            x = x.transpose(0, 1)
        out, last = self.recurrent(x)
        if self.packed:
            out, _ = pad_packed_sequence(out)
        states = last if isinstance(last, tuple) else (last,)
        seen = out.sum(1 if self.first and not self.packed else 0)
        return torch.tanh(seen)[:, :3] + sum(s.sum(0)[:, :3] for s in states)


class ReadingOne(Reading):
    """The same, for a dense oracle that knows no packed sequence inside of torch.func."""

    def forward(self, x):
        n = 2 + int(x[0, 0, 0] > 0) + int(x[0, 0, 1] > 0)
        out, last = self.recurrent(x[0, :n, None])
        states = last if isinstance(last, tuple) else (last,)
        return torch.tanh(out.sum(0))[:, :3] + sum(s.sum(0)[:, :3] for s in states)


CASES = {
    "RNN": (nn.RNN, {}),
    "RNN, ReLU": (nn.RNN, {"nonlinearity": "relu"}),
    "LSTM": (nn.LSTM, {}),
    "LSTM, batch first": (nn.LSTM, {"batch_first": True}),
    "LSTM, two layers, both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 3, "num_layers": 2}),
    "LSTM, no bias": (nn.LSTM, {"bias": False}),
    "GRU": (nn.GRU, {"batch_first": True}),
    "GRU, two layers, both ways": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_weight_has_the_exact_fisher(case):
    torch.manual_seed(1)
    kind, settings = CASES[case]
    model = Reading(kind, **settings).to(D)
    x = torch.randn(5, 4, 3, dtype=D)
    coverage = cover(model)
    assert not coverage.uncovered
    expected = model(x)
    seen = observe(model, coverage, x, Categorical())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)  # the forward is PyTorch's again
    assert sum(b.size for b in coverage.blocks) == sum(p.numel() for p in model.parameters())
    for block in coverage.blocks:
        dense = dense_fisher(model, x, "categorical", block.parameters)
        torch.testing.assert_close(dense_of(block, seen.rows(block, D)), dense, **EXACT)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_have_the_exact_fisher(kind, bidirectional):
    torch.manual_seed(2)
    model = Reading(kind, packed=True, bidirectional=bidirectional).to(D)
    x = torch.randn(6, 4, 3, dtype=D)
    coverage = cover(model)
    seen = observe(model, coverage, x, Categorical())
    alone = ReadingOne(kind, bidirectional=bidirectional).to(D)
    alone.load_state_dict(model.state_dict())
    total = {block.name: 0.0 for block in coverage.blocks}
    for one in x:
        for block in coverage.blocks:
            dense = dense_fisher(alone, one[None], "categorical", block.parameters)
            total[block.name] = total[block.name] + dense / len(x)
    for block in coverage.blocks:
        found = dense_of(block, seen.rows(block, D))
        torch.testing.assert_close(found, total[block.name], **EXACT)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("how", ["plain", "batch first", "single", "packed", "with states"])
def test_a_forward_spelled_out_gives_what_it_gave(kind, how):
    torch.manual_seed(3)
    settings = {"num_layers": 2, "bidirectional": True}
    if how != "packed":
        settings["dropout"] = 0.3
    model = kind(3, 4, batch_first=how == "batch first", **settings).to(D)
    x, states = torch.randn(5, 6, 3, dtype=D), None
    if how == "single":
        x = x[0]
    if how == "packed":
        x = pack_sequence([x[0], x[1, :2], x[2, :4]], enforce_sorted=False)
    if how == "with states":
        states = torch.randn(4, 6, 4, dtype=D)
        states = (states, states.tanh()) if kind is nn.LSTM else states
    taps, found = Taps(cover(model).blocks), []
    for tapped in (False, True):
        if tapped:
            taps.open()
        torch.manual_seed(4)
        out, last = model(x, states)
        if how == "packed":
            found += [out.batch_sizes, out.sorted_indices, out.unsorted_indices, out.data]
        else:
            found += [out, torch.tensor(out.stride())]
        found += [*(last if kind is nn.LSTM else [last]), torch.rand(1)]
    steps = 5 if how == "with states" or how == "plain" else 6
    assert len(taps.close()) == 2 * 2 * (1 + steps)
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert "forward" not in model.__dict__


def test_what_is_no_plain_recurrent_module_is_left_out():
    class Own(nn.LSTM):
        def forward(self, x, hx=None):
            return super().forward(2 * x, hx)

    normed = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    for module, reason in ((Own(3, 4), "Own is not covered"), (normed, "is not covered")):
        coverage = cover(module)
        assert not coverage.blocks
        assert reason in " ".join(coverage.uncovered.values())
    assert not cover(nn.Sequential(nn.LSTM(3, 4), nn.Linear(2, 2)), exclude=["0"]).blocks[1:]


@pytest.mark.parametrize("method", [KFAC, EKFAC, KPSVD, Deflation, SNGD, ExactNG])
@pytest.mark.parametrize("kind", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.slow)])
def test_every_method_trains_them(method, kind):
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.head = kind(3, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.recurrent(x)[0][:, -1])

    model, x = Last(), torch.randn(12, 5, 3)
    y = x.sum(1).argmax(1)
    optimizer, losses = method(model, lr=0.1), []
    for _ in range(40):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not optimizer.uncovered


@pytest.mark.parametrize("settings", [{"adaptive_damping": True}, {"step_length": "quadratic"}])
def test_the_quadratic_model_in_single_precision_is_that_in_double(settings):
    found = []
    for dtype in (torch.float32, D):
        torch.manual_seed(0)
        model, x = Reading(nn.LSTM).to(dtype), torch.randn(6, 3, 3).to(dtype)
        optimizer = KFAC(model, lr=0.1, fisher="exact", kl_clip=None, **settings)
        F.cross_entropy(model(x), torch.arange(6) % 3).backward()
        optimizer.step()
        found.append((model.recurrent.weight_hh_l0.detach().double(), optimizer.reduction_ratio))
    (one, ratio), (other, expected) = found
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert (ratio is None) == ("step_length" in settings)
    assert ratio is None or ratio == pytest.approx(expected, rel=0.05)
