"""Quantised weights as torchao's tensors, for PyTorch programs with its kernels."""

import importlib
from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from smallfry.errors import UsageError
from smallfry.layers.quantized import QuantizedWeight


def to_torchao(model: nn.Module) -> nn.Module:
    """Convert quantised linear layers to ``nn.Linear`` with torchao's integer tensors.

    Codes and scales are ours; a shared layer stays one layer. Quantised convolutions, for which
    torchao has no tensors, and layers with quantised inputs stay as they are.

    Args:
        model: With layers of ``smallfry.layers.quantized``; left as it is.

    Raises:
        UsageError: torchao is not installed, or no layer can be converted.
    """
    try:
        tensors: Any = importlib.import_module(
            "torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor"
        )
    except ImportError as error:
        raise UsageError(
            f"torchao's tensors need torchao: pip install 'smallfry[torchao]' ({error})"
        ) from error
    small = deepcopy(model)
    made: dict[int, nn.Module] = {}
    for parent in list(small.modules()):
        for name, child in list(parent._modules.items()):  # a shared one by every name
            if _is_convertible(child):
                layer = cast(QuantizedWeight, child)
                if id(layer) not in made:
                    made[id(layer)] = _converted(tensors.IntxUnpackedToInt8Tensor, layer)
                parent._modules[name] = made[id(layer)]
    if not made:
        raise UsageError(
            "no layer can have torchao's tensors: they are of linear layers with quantised weights "
            "and inputs in floating point, whose group divides the number of inputs"
        )
    return small


def _is_convertible(child: nn.Module | None) -> bool:
    return (
        isinstance(child, QuantizedWeight)
        and not child.is_convolution
        and child.input_bits is None
        and (child.group is None or child.codes.shape[1] % child.group == 0)
    )


def _converted(tensor: Any, layer: QuantizedWeight) -> nn.Module:
    dense = layer.dense()
    outputs, inputs = layer.codes.shape
    scales = layer.scales.detach().view(outputs, -1)
    weight = tensor(
        qdata=layer.codes.detach().clone(),
        scale=scales.clone(),
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{layer.bits}"),
        block_size=(1, inputs if layer.group is None else layer.group),
        dtype=scales.dtype,
        activation_quantization=None,
    )
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return dense.eval()
