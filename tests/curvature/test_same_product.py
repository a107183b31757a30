"""Foreign layers are recognised by what they compute, and by nothing that could change later."""

import pytest
import torch
from torch import nn

from smallfry.curvature.products import is_transposed, same_product


class Renamed(nn.Linear):
    """The same product, written anew."""

    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Doubled(nn.Linear):
    """Another product."""

    def forward(self, x):
        return 2 * super().forward(x)


class Conv1D(nn.Module):
    """As in transformers: x W + b."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x):
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Moved(nn.Conv2d):
    """A convolution that computes in another memory format."""

    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Cropped(nn.Conv2d):
    """Right for one size of the inputs, and not for others."""

    def forward(self, x):
        found = super().forward(x)
        return found if x.shape[-1] == self.kernel_size[0] + 2 else found[..., :-1]


class Buffered(Renamed):
    """What a buffer does may change."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(()))


class Nested(Renamed):
    """What a child does may change."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.child = nn.Identity()


class Extended(Renamed):
    """A further parameter."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))


class Failing(nn.Linear):
    """A forward that expects something else."""

    def forward(self, x):
        raise KeyError("mask")


class Scalable(Renamed):
    """The same product, as long as nobody asks for more."""

    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


class Tupled(nn.Linear):
    """Another form of output."""

    def forward(self, x):
        return super().forward(x), None


class NotANumber(nn.Linear):
    """No number is near a NaN."""

    def forward(self, x):
        return super().forward(x) * torch.nan


@pytest.mark.parametrize(
    ("module", "kind", "same"),
    [
        (Renamed(3, 2), nn.Linear, True),
        (Renamed(3, 2, bias=False), nn.Linear, True),
        (Doubled(3, 2), nn.Linear, False),
        (Moved(2, 3, 3, padding=1, stride=2), nn.Conv2d, True),
        (Moved(4, 4, 3, groups=2, dilation=2), nn.Conv2d, True),
        (Cropped(2, 3, 3), nn.Conv2d, False),
        (Buffered(3, 2), nn.Linear, False),
        (Nested(3, 2), nn.Linear, False),
        (Extended(3, 2), nn.Linear, False),
        (Failing(3, 2), nn.Linear, False),
        (Tupled(3, 2), nn.Linear, False),
        (Scalable(3, 2), nn.Linear, False),
        (NotANumber(3, 2), nn.Linear, False),
        (nn.LazyLinear(2), nn.Linear, False),
        (Conv1D(3, 2), Conv1D, True),
        (Conv1D(3, 2, bias=False), Conv1D, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_computes_the_same_is_recognised(module, kind, same):
    assert same_product(module, kind) is same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_precision_is_tried_in_its_own(dtype):
    assert same_product(Renamed(3, 2).to(dtype), nn.Linear)
    assert not same_product(Doubled(3, 2).to(dtype), nn.Linear)


def test_a_hook_could_change_the_output():
    module = Renamed(3, 2)
    hook = module.register_forward_hook(lambda *_: None)
    assert not same_product(module, nn.Linear)
    hook.remove()
    assert same_product(module, nn.Linear)


def test_trying_leaves_random_numbers_gradients_and_weights_alone():
    torch.manual_seed(0)
    module = Renamed(3, 2)
    before = module.weight.detach().clone()
    state = torch.get_rng_state()
    assert same_product(module, nn.Linear)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.weight.grad is None
    assert torch.equal(module.weight, before)


def test_only_transformers_form_is_transposed():
    assert is_transposed(Conv1D(3, 2))
    assert is_transposed(Conv1D(3, 2, bias=False))
    assert not is_transposed(nn.Conv1d(3, 2, 1))
    assert not is_transposed(nn.Linear(3, 2))
    wide = Conv1D(3, 2)
    wide.bias = nn.Parameter(torch.zeros(3))
    assert not is_transposed(wide)
    deep = Conv1D(3, 2)
    deep.child = nn.Identity()
    assert not is_transposed(deep)
    empty = Conv1D(3, 2)
    empty.weight = None
    assert not is_transposed(empty)
