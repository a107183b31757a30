"""One canonical form for all layers, against autograd and a dense Fisher."""

import pytest
import torch
from dense_fisher import dense_fisher, dense_of, observe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smallfry.curvature import Categorical, Taps, cover
from smallfry.curvature.taps import Observation

D = torch.float64


class Pooled(nn.Module):
    """A layer, something non-linear, the mean over positions, a classifier."""

    def __init__(self, layer, channels, inplace=False):
        super().__init__()
        self.layer, self.act = layer, nn.ReLU(inplace=inplace)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        h = self.act(self.layer(x))
        if not isinstance(self.layer, nn.Linear):
            h = h.flatten(2).transpose(1, 2)
        return self.head(h.flatten(1, -2).square().mean(1) if h.ndim > 2 else h)


CONV = {
    "plain": (nn.Conv2d(2, 4, 3), (2, 6, 5)),
    "stride, padding": (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 6, 5)),
    "uneven kernel, stride, padding": (nn.Conv2d(2, 4, (3, 2), (1, 2), (2, 1)), (2, 6, 5)),
    "dilation": (nn.Conv2d(2, 4, 3, dilation=2, padding=2), (2, 6, 5)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3, bias=False), (3, 5, 5)),
    "same": (nn.Conv2d(2, 4, (4, 3), padding="same"), (2, 6, 5)),
    "same, dilated": (nn.Conv2d(2, 4, 2, padding="same", dilation=3), (2, 6, 5)),
    "valid": (nn.Conv2d(2, 4, 2, padding="valid"), (2, 6, 5)),
    "reflect": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 5)),
    "replicate": (nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="replicate"), (2, 6, 5)),
    "circular": (nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), (2, 6, 5)),
    "1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "1d same": (nn.Conv1d(2, 4, 4, padding="same", padding_mode="reflect"), (2, 9)),
    "1d groups": (nn.Conv1d(4, 4, 3, groups=2), (4, 7)),
    "transposed": (nn.ConvTranspose2d(2, 4, 3), (2, 3, 4)),
    "transposed, stride, padding": (nn.ConvTranspose2d(2, 4, 3, 2, 1), (2, 3, 4)),
    "transposed, output padding": (
        nn.ConvTranspose2d(2, 4, (3, 2), 3, (1, 0), output_padding=(2, 1)),
        (2, 3, 4),
    ),
    "transposed, large padding, dilation": (
        nn.ConvTranspose2d(2, 4, 3, 2, 3, dilation=2),
        (2, 5, 4),
    ),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), (4, 3, 2)),
}


class Viewed(nn.Linear):
    """A product whose result is a view, as PyTorch 2.11's own is on more than two dimensions."""

    def forward(self, x):
        return super().forward(x).view(*x.shape[:-1], self.out_features)


LINEAR = {
    "vectors": (nn.Linear(3, 4), (3,)),
    "tokens": (nn.Linear(3, 4, bias=False), (5, 3)),
    "two token dimensions": (nn.Linear(3, 4), (2, 3, 3)),
    "a view": (Viewed(3, 4), (5, 3)),
}


@pytest.mark.parametrize("case", CONV | LINEAR)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_taps_give_the_gradient_and_the_exact_fisher(case, inplace):
    layer, shape = (CONV | LINEAR)[case]
    channels = layer.out_features if case in LINEAR else layer.out_channels
    model = Pooled(layer, channels, inplace).to(D)
    x = torch.randn(3, *shape, dtype=D)
    coverage = cover(model)
    assert not coverage.uncovered
    block = coverage.blocks[0]
    seen = observe(model, coverage, x, Categorical())
    rows = seen.rows(block, D)
    groups = rows.inputs.shape[0]
    expected = dense_fisher(model, x, "categorical", block.parameters)
    found = dense_of(block, rows)
    assert groups == (1 if case in LINEAR else layer.groups)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_gradient_becomes_a_matrix_and_comes_back_unchanged():
    for layer, _ in (CONV | LINEAR).values():
        block = cover(layer).blocks[0]
        tensors = {n: torch.randn_like(p) for n, p in block.parameters.items()}
        matrix = block.to_matrix(tensors)
        assert matrix.shape == block.shape
        assert block.size == sum(p.numel() for p in layer.parameters())
        for name, tensor in block.from_matrix(matrix).items():
            assert torch.equal(tensor, tensors[name]), name


@settings(deadline=None, max_examples=60)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    transposed=st.booleans(),
    data=st.data(),
)
def test_any_convolution_is_a_matrix_times_its_patches(
    kernel, stride, padding, dilation, groups, mode, transposed, data
):
    if transposed:
        extra = data.draw(st.integers(0, max(stride, dilation) - 1))
        layer = nn.ConvTranspose2d(2, 4, kernel, stride, padding, extra, groups, dilation=dilation)
        size = data.draw(st.integers(3, 5))
        if (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1 < 1:
            return
    else:
        layer = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, padding_mode=mode)
        size = data.draw(st.integers(dilation * (kernel - 1) + 3, dilation * (kernel - 1) + 6))
    layer.to(D)
    block = cover(layer).blocks[0]
    x = torch.randn(2, 2, size, size + 1, dtype=D)
    taps = Taps([block])
    taps.open(watch_backward=True)
    output = layer(x)
    seen = Observation(2, taps.close())
    seen.draws.append([torch.zeros_like(output)])
    inputs = seen.rows(block, D).inputs
    matrix = block.to_matrix({n: p.detach() for n, p in block.parameters.items()})
    made = torch.einsum("hoi,hnti->nhot", matrix, inputs).reshape(output.shape)
    torch.testing.assert_close(made, output.detach())
    (output**2).sum().backward()
    expected = block.to_matrix({n: p.grad for n, p in block.parameters.items()})
    seen.training.update(number for call in seen.calls for number in call.passes)
    torch.testing.assert_close(seen.training_matrix(block, D)[0], expected)


def test_the_size_asked_of_a_transposed_convolution_counts():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return self.up(x, output_size=(8, 9)).square().flatten(1)[:, :4]

    model = Model().to(D)
    x = torch.randn(2, 2, 4, 5, dtype=D)
    coverage = cover(model)
    rows = observe(model, coverage, x, Categorical()).rows(coverage.blocks[0], D)
    expected = dense_fisher(model, x, "categorical")
    torch.testing.assert_close(dense_of(coverage.blocks[0], rows), expected)


def test_a_sequence_may_come_first():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return torch.tanh(self.layer(x.transpose(0, 1))).mean(0)

    model = Transposed().to(D)
    x = torch.randn(4, 5, 3, dtype=D)
    coverage = cover(model)
    rows = observe(model, coverage, x, Categorical()).rows(coverage.blocks[0], D)
    expected = dense_fisher(model, x, "categorical")
    torch.testing.assert_close(dense_of(coverage.blocks[0], rows), expected)


def test_rows_that_belong_to_no_sample_are_dealt_out_with_zeros_behind():
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x[:, :2].flatten(0, 1)[:5]).sum() + torch.zeros(len(x), 3)

    coverage = cover(model := Ragged())
    seen = observe(model, coverage, torch.randn(4, 2, 3), Categorical())
    block = coverage.blocks[0]
    rows = seen.rows(block, torch.float32)
    assert seen.anonymous(block) == "layer"
    assert rows.inputs.shape == (1, 4, 2, 4)
    assert rows.weights.tolist() == [[1, 1], [1, 1], [1, 0], [0, 0]]
    flat = rows.inputs.flatten(0, 2)
    torch.testing.assert_close(flat[:5, :3], seen.calls[0].inputs)
    assert not flat[5:, :3].any()


@pytest.mark.parametrize("case", CONV | LINEAR)
def test_some_uses_are_the_same_as_those_uses_of_all(case):
    layer, shape = (CONV | LINEAR)[case]
    layer = layer.to(D)
    block = cover(layer).blocks[0]
    taps = Taps([block])
    taps.open()
    outputs = [layer(torch.randn(3, *shape, dtype=D)) for _ in range(2)]
    seen = Observation(3, taps.close())
    seen.draws.append([torch.randn_like(z) for z in outputs])
    everything = seen.rows(block, D)
    kept = torch.tensor(
        sorted({0, everything.uses // 3, everything.uses // 2, everything.uses - 1})
    )
    some = seen.rows(block, D, lambda uses: kept)
    assert torch.equal(some.inputs, everything.inputs[:, :, kept])
    scale = (everything.uses / len(kept)) ** 0.5
    torch.testing.assert_close(some.gradients, everything.gradients[:, :, :, kept] * scale)
