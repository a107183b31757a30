"""Third-party layers with one of PyTorch's products, recognised by their results."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from smallfry._torch import has_forward_hooks


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is x W + b with W (inputs, outputs), as transformers' ``Conv1D``."""
    if type(module).__name__ != "Conv1D" or isinstance(module, nn.Conv1d):
        return False
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    return (
        weight is not None
        and weight.ndim == 2
        and (bias is None or bias.shape == weight.shape[1:])
        and not any(module.children())
    )


def computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a layer of a kind has its forward, or declares or computes the same.

    Args:
        module: The layer.
        kind: Its class, or a parent of that.
    """
    own = type(module).forward is not kind.forward or "forward" in module.__dict__
    return not own or getattr(module, "acts_as", None) is kind or same_product(module, kind)


def same_product(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a subclass that overrides forward computes the same as its parent.

    It is tried on a few numbers. A module with buffers, children or further parameters may compute
    something else later, and one that takes further arguments with them; these do not count.

    Args:
        module: The module.
        kind: Its parent, or the class of the parent where ``is_transposed``.
    """
    names = {name for name, p in module._parameters.items() if p is not None}
    further = len(signature(module.forward).parameters) >= len(signature(kind.forward).parameters)
    if (
        further  # the parent's include itself
        or not names <= {"weight", "bias"}
        or module._buffers
        or module._modules
        or has_forward_hooks(module)
    ):
        return False
    weight: Any = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or isinstance(
        weight, nn.parameter.UninitializedParameter
    ):
        return False
    reference: Any = kind.forward
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for x in _examples(module, weight):
                expected = _transposed(module, x) if is_transposed(module) else reference(module, x)
                found = module.forward(x)
                if not isinstance(found, Tensor) or found.shape != expected.shape:
                    return False
                scale = expected.abs().max().clamp_min(1e-30)
                tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps)
                if not bool((found - expected).abs().max() <= tolerance * scale):
                    return False
    except Exception:  # whatever a foreign forward does with numbers that it does not expect
        return False
    return True


def _examples(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """Make inputs of two sizes, as padding may depend on them."""
    layer: Any = module
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]]
    if isinstance(module, nn.Linear) or is_transposed(module):
        inputs = weight.shape[0] if is_transposed(module) else weight.shape[1]
        shapes = [(3, inputs), (1, 2, inputs)]
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shapes = [(1, layer.in_channels, *(r + more for r in reach)) for more in (2, 3)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(weight.device, weight.dtype) for x in drawn]


def _transposed(module: nn.Module, x: Tensor) -> Tensor:
    layer: Any = module
    product: Tensor = x @ layer.weight
    return product if layer._parameters.get("bias") is None else product + layer.bias
