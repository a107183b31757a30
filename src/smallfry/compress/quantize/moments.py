"""First and second moments of a layer's inputs, over all rows and all calls.

Rows are those that the weight multiplies: patches of a convolution. With them the error of a layer
over all calibration rows is exact, whatever their number:

    mean ‖W x − Ŵ x̂‖² = tr(W S Wᵀ) − 2 tr(W C Ŵᵀ) + tr(Ŵ Ŝ Ŵᵀ),  S = E[x xᵀ], C = E[x x̂ᵀ].
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from smallfry.compress.quantize.calls import visit
from smallfry.curvature.layers import canonical_inputs

CHUNK = 8  # images whose patches are in memory at once


class Moments(NamedTuple):
    """Means over rows, in float64; ``groups`` as of a grouped convolution."""

    square: Tensor  # E[x xᵀ], (groups, inputs, inputs)
    cross: Tensor  # E[x x̂ᵀ]
    rounded_square: Tensor  # E[x̂ x̂ᵀ]


def input_means(
    model: nn.Module, layers: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Compute the mean input row of layers, each (groups, inputs) in float64.

    Args:
        model: In evaluation mode.
        layers: Names of linear layers and convolutions.
        batches: Batches of images.
    """
    modules, names = dict(model.named_modules(remove_duplicate=False)), list(layers)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, call: int, inputs: Tensor, output: Tensor) -> None:
        rows = _rows(modules[name], inputs, output)
        total = rows.double().sum(1)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + rows.shape[1]

    visit(model, names, batches, add)
    return {name: sums[name] / counts[name] for name in sums}


def moments(
    model: nn.Module, rounded: nn.Module, layers: Sequence[str], batches: Iterable[Tensor]
) -> Moments:
    """Compute the moments of a weight's inputs in a model and in one that is partly quantised.

    Args:
        model: In floating point, in evaluation mode.
        rounded: The same with some layers quantised; those of the weight are still dense.
        layers: Names of the layers that have the weight.
        batches: Batches of images.
    """
    sums: list[Tensor] = []
    count = 0
    for batch in batches:
        pairs = zip(_calls(model, layers, batch), _calls(rounded, layers, batch), strict=True)
        for (name, inputs, output), (_, other, _) in pairs:
            module = model.get_submodule(name)
            for start in range(0, len(inputs), CHUNK):
                part = slice(start, start + CHUNK)
                x, y = (_rows(module, each[part], output[part]) for each in (inputs, other))
                # products in the rows' precision: sums of chunks are in float64
                found = [x.mT @ x, x.mT @ y, y.mT @ y]
                wide = [each.double() for each in found]
                sums = [a + b for a, b in zip(sums, wide, strict=True)] if sums else wide
                count += x.shape[1]
    return Moments(*(each / count for each in sums))


def _calls(
    model: nn.Module, layers: Sequence[str], batch: Tensor
) -> list[tuple[str, Tensor, Tensor]]:
    found: list[tuple[str, Tensor, Tensor]] = []
    visit(model, layers, [batch], lambda name, _, *tensors: found.append((name, *tensors)))
    return found


def _rows(module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
    """Return the rows of a call, (groups, rows, inputs)."""
    return canonical_inputs(module, inputs, output, len(inputs)).flatten(1, 2)
