"""Canonical form of every layer: samples × uses × features.

A linear map W that is applied somewhere in a network sees, for each sample n, one or several inputs
a_nt (t counts its *uses*: tokens, positions, recursion steps, calls) and gets the gradients g_nt at
the matching outputs. With the bias as further columns of W, whose inputs are ones, the gradient of
one sample is

    W_n = Σ_t g_nt a_ntᵀ            (outputs, inputs)

and everything in this package is built from that. Shapes are

    inputs      (groups, samples, uses, inputs)
    gradients   (groups, samples, uses, outputs)
    matrix      (groups, outputs, inputs)

where ``groups`` is 1, except for grouped convolutions, which are one map per group. Which layers
are covered, and as which blocks, is said in ``smallfry.curvature.coverage``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.curvature.products import is_transposed
from smallfry.errors import UsageError

COVERED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)


def input_of(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Return the input that a module was called with, by whatever name; None without any."""
    given = {"input": arguments[0]} if arguments else keywords
    return given.get("input", next(iter(given.values()), None))


def is_linear(module: nn.Module) -> bool:
    """Return whether a covered layer is a linear map of the last dimension, not a convolution."""
    return isinstance(module, nn.Linear | nn.Embedding) or is_transposed(module)


def _inputs_first(module: nn.Module) -> bool:
    """Return whether a weight is (inputs, outputs)."""
    return isinstance(module, nn.Embedding) or is_transposed(module)


def groups_of(module: nn.Module) -> int:
    """Return the number of groups of a covered layer; 1 for linear layers."""
    return 1 if is_linear(module) else int(cast(Any, module).groups)


def outputs_of(module: nn.Module) -> int:
    """Return the number of output features or channels of a covered layer."""
    layer = cast(Any, module)
    if _inputs_first(module):
        return int(layer.weight.shape[1])
    return int(layer.out_features if isinstance(module, nn.Linear) else layer.out_channels)


def weight_to_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Reshape a weight, or its gradient, to (groups, outputs, inputs)."""
    groups = groups_of(module)
    if _inputs_first(module):
        return weight.T.unsqueeze(0)
    if isinstance(module, nn.ConvTranspose2d):
        inputs, outputs, height, width = weight.shape
        split = weight.reshape(groups, inputs // groups, outputs, height, width)
        turned = split.flip(-2, -1).transpose(1, 2)
        return turned.reshape(groups, outputs, -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def matrix_to_weight(module: nn.Module, matrix: Tensor) -> Tensor:
    """Invert ``weight_to_matrix``."""
    shape = cast(Any, module).weight.shape
    if _inputs_first(module):
        return matrix[0].T
    if isinstance(module, nn.ConvTranspose2d):
        groups, outputs, _ = matrix.shape
        split = matrix.reshape(groups, outputs, -1, *shape[2:])
        return split.transpose(1, 2).flip(-2, -1).reshape(shape)
    return matrix.reshape(shape)


def canonical_inputs(
    module: nn.Module,
    inputs: Tensor,
    outputs: Tensor,
    samples: int,
    kept: Tensor | None = None,
) -> Tensor:
    """Return the inputs a_nt that a layer's weight was multiplied by.

    Args:
        module: A covered layer.
        inputs: Inputs of the call.
        outputs: Outputs of the call, or their gradient; only the shape is used.
        samples: Number of samples in the network's batch.
        kept: Index of the uses wanted; None for all.

    Returns:
        (groups, samples, uses, inputs of the weight).

    Raises:
        UsageError: No dimension of the inputs can be the samples.
    """
    if is_linear(module):
        rows = _by_sample(inputs, samples, "Linear").unsqueeze(0)
        return rows if kept is None else rows.index_select(2, kept)
    batched = inputs.ndim == (3 if isinstance(module, nn.Conv1d) else 4)
    early = kept is not None and batched and len(inputs) == samples
    if isinstance(module, nn.ConvTranspose2d):
        early = False
        patches = _transposed_patches(module, inputs, outputs)
    else:
        patches = _patches(module, inputs, kept if early else None)
    groups = groups_of(module)
    count, features, positions = patches.shape
    patches = patches.reshape(count, groups, features // groups, positions).permute(1, 0, 3, 2)
    uses = _repeats(count, samples, type(module).__name__) * positions
    rows = patches.reshape(groups, samples, uses, features // groups)
    return rows if kept is None or early else rows.index_select(2, kept)


def canonical_gradients(module: nn.Module, gradients: Tensor, samples: int) -> Tensor:
    """Return the gradients g_nt at a layer's outputs, (groups, samples, uses, outputs).

    Args:
        module: A covered layer.
        gradients: Gradient at what it returned.
        samples: Number of samples in the network's batch.

    Raises:
        UsageError: No dimension of the gradients can be the samples.
    """
    if is_linear(module):
        return _by_sample(gradients, samples, "Linear").unsqueeze(0)
    spatial = 1 if isinstance(module, nn.Conv1d) else 2
    if gradients.ndim == spatial + 1:
        gradients = gradients.unsqueeze(0)
    groups = groups_of(module)
    count, channels = gradients.shape[:2]
    split = gradients.reshape(count, groups, channels // groups, -1).permute(1, 0, 3, 2)
    uses = _repeats(count, samples, type(module).__name__) * split.shape[2]
    return split.reshape(groups, samples, uses, -1)


def _by_sample(tensor: Tensor, samples: int, layer: str) -> Tensor:
    """Reshape (…, features) to (samples, uses, features)."""
    features = tensor.shape[-1]
    lead = tuple(tensor.shape[:-1])
    if not lead:
        lead = (1,)
        tensor = tensor.unsqueeze(0)
    if lead[0] != samples and len(lead) > 1 and lead[1] == samples:  # sequence first
        tensor = tensor.transpose(0, 1)
    else:
        _repeats(lead[0], samples, layer)
    return tensor.reshape(samples, -1, features)


def _repeats(leading: int, samples: int, layer: str) -> int:
    """Count the rows of the leading dimension per sample, such as windows."""
    if leading % samples:
        raise UsageError(
            f"a {layer} was called on {leading} rows while the network saw {samples} samples, so "
            f"rows can't be assigned to samples; expected the samples, or a multiple "
            "of them, in the first dimension (or the second, after a sequence). "
            "Exclude the layer: exclude=[name]"
        )
    return leading // samples


def _patches(module: nn.Module, inputs: Tensor, kept: Tensor | None) -> Tensor:
    """Extract the input patches of a convolution, (batch, channels · kernel, positions).

    Where only some positions are wanted, only these are copied.
    """
    layer = cast(Any, module)
    one_dimensional = isinstance(module, nn.Conv1d)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if inputs.ndim == len(kernel) + 1:
        inputs = inputs.unsqueeze(0)
    # both sides of each dimension, last dimension first; torch itself works with it for "same"
    # and for the modes, and an uneven "same" has its surplus at the end
    sides = tuple(layer._reversed_padding_repeated_twice)
    if layer.padding_mode == "zeros":
        inputs = F.pad(inputs, sides)
    else:
        inputs = F.pad(inputs, sides, mode=layer.padding_mode)
    if one_dimensional:
        inputs = inputs.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    if kept is None:
        return F.unfold(inputs, kernel, dilation=dilation, stride=stride)
    windows = inputs
    for d in (0, 1):
        windows = windows.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])
    windows = windows[..., :: dilation[0], :: dilation[1]]  # (batch, channels, rows, columns, k, k)
    width = windows.shape[3]
    chosen = windows[:, :, kept // width, kept % width]  # (batch, channels, kept, k, k)
    return chosen.permute(0, 1, 3, 4, 2).flatten(1, 3)


def _transposed_patches(module: nn.ConvTranspose2d, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Extract patches of a transposed convolution: zeros are inserted between its input pixels."""
    if inputs.ndim == 3:
        inputs = inputs.unsqueeze(0)
    kernel, stride = module.kernel_size, module.stride
    dilation, padding = module.dilation, cast(tuple[int, int], module.padding)
    batch, channels, height, width = inputs.shape
    stuffed = inputs.new_zeros(
        batch, channels, (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1
    )
    stuffed[..., :: stride[0], :: stride[1]] = inputs
    sides: list[int] = []
    for d in (1, 0):
        reach = dilation[d] * (kernel[d] - 1)
        before = reach - padding[d]
        # the output's size, not output_padding: output_size=… of the call may have changed it
        after = int(outputs.shape[d - 2]) + reach - before - stuffed.shape[d - 2]
        sides += [before, after]
    return F.unfold(F.pad(stuffed, sides), kernel, dilation=dilation)


def ones_column(rows: Tensor, columns: int, chosen: int | None) -> Tensor:
    """Append ``columns`` features to inputs, all 0 except the ``chosen``, which is 1.

    Modules that share a weight may each have a bias of their own: each bias is one column.
    """
    if columns == 0:
        return rows
    extra = rows.new_zeros(*rows.shape[:-1], columns)
    if chosen is not None:
        extra[..., chosen] = 1.0
    return torch.cat([rows, extra], dim=-1)
