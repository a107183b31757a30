"""Zeros of a model: stored, computed and removable ones, with their savings."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smallfry.compress.select import dense_layers
from smallfry.compress.sparse.schedules import n_of_m
from smallfry.errors import UsageError
from smallfry.transforms.modes import evaluating

INDEX_BYTES = 4  # of a column, and of a row's begin, in compressed sparse rows


class LayerZeros(NamedTuple):
    """Zeros of a linear layer or convolution."""

    name: str
    weights: int
    zeros: int
    macs: int  # of all calls for the example, with the zeros
    zero_macs: int  # products with a zero among them
    rows: int  # outputs
    zero_rows: int  # outputs whose weights are all zero: removable if the bias is, too
    columns: int  # inputs
    zero_columns: int  # inputs that no output uses
    is_2_of_4: bool  # at most two of four consecutive inputs are used, everywhere
    dense_bytes: int
    csr_bytes: int  # compressed sparse rows
    bitmask_bytes: int  # a bit for each weight, and the others than zero
    two_four_bytes: int | None  # two of four values and two bits for each; None if not 2:4

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights


class SparsityReport(NamedTuple):
    """Zeros of a model, and advice."""

    layers: tuple[LayerZeros, ...]

    @property
    def weights(self) -> int:
        """Weights of these layers."""
        return sum(each.weights for each in self.layers)

    @property
    def zeros(self) -> int:
        """Zeros among them."""
        return sum(each.zeros for each in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of these layers, all calls."""
        return sum(each.macs for each in self.layers)

    @property
    def zero_macs(self) -> int:
        """Those with a zero weight; dense kernels compute them all the same."""
        return sum(each.zero_macs for each in self.layers)

    def smallest_bytes(self) -> int:
        """Return the bytes of the weights with the smallest format for each layer."""
        return sum(
            min(filter(None, (e.dense_bytes, e.csr_bytes, e.bitmask_bytes, e.two_four_bytes)))
            for e in self.layers
        )

    def advice(self) -> tuple[str, ...]:
        """Return a sentence for each use of the zeros, with a negative one where it doesn't pay."""
        share = self.zeros / self.weights if self.weights else 0.0
        dense = sum(each.dense_bytes for each in self.layers)
        removable = sum(each.zero_rows + each.zero_columns for each in self.layers)
        half = [each for each in self.layers if each.is_2_of_4 and each.sparsity > 0.4]
        saved = 1 - self.smallest_bytes() / dense if dense else 0.0
        return (
            f"files: bitmasks or sparse rows would save {saved:.0%} of these weights; a plain file "
            "stores the zeros",
            f"CPU: dense kernels compute all products; sparse ones are slower below about 90 % of "
            f"zeros without pattern, and these are {share:.0%}",
            f"GPU: {len(half)} of {len(self.layers)} layers are 2:4, which compute capability 8.0 "
            "and above multiplies faster in half precision and int8",
            f"structure: {removable} rows and columns are all zero and could be cut, which saves "
            "everywhere",
        )


@torch.no_grad()
def sparsity_report(model: nn.Module, example: Tensor) -> SparsityReport:
    """Count the zeros of a model's linear layers and convolutions.

    Args:
        model: Left as it is.
        example: A batch of inputs; multiply-accumulates are those of the whole batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from smallfry.compress.sparse.report import sparsity_report
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
        >>> _ = model[0].weight.data[0].zero_()
        >>> report = sparsity_report(model, torch.zeros(1, 4))
        >>> report.zeros, report.zero_macs, report.layers[0].zero_rows
        (4, 4, 1)
    """
    names = dense_layers(model)
    positions: Counter[str] = Counter()

    def count(name: str) -> object:
        def hook(module: nn.Module, _: object, output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            positions[name] += output.numel() // len(weight)

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(count(name))  # type: ignore[arg-type]
        for name in names
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return SparsityReport(
        tuple(_layer(name, model.get_submodule(name), positions[name]) for name in names)
    )


def zero_sums(model: nn.Module, example: Tensor) -> dict[str, int] | None:
    """Return the sums of the report for JSON; None for a model without dense layers."""
    try:
        report = sparsity_report(model, example)
    except UsageError:
        return None
    names = ("weights", "zeros", "macs", "zero_macs")
    return {name: getattr(report, name) for name in names} | {
        "dense_bytes": sum(each.dense_bytes for each in report.layers),
        "smallest_bytes": report.smallest_bytes(),
        "zero_rows": sum(each.zero_rows for each in report.layers),
    }


def _layer(name: str, layer: nn.Module, calls: int) -> LayerZeros:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    used = weight.detach().flatten(1) != 0
    inputs = (weight.detach() != 0).movedim(1, 0).flatten(1)
    nonzero, total, size = int(used.sum()), weight.numel(), weight.element_size()
    whole = used.shape[1] // 4 * 4  # inputs in groups of four; those left over stay dense
    is_2_of_4 = whole > 0 and bool((n_of_m(weight, 2, 4).flatten(1) | ~used).all())
    kept = len(used) * whole // 2
    return LayerZeros(
        name,
        *(total, total - nonzero, total * calls, (total - nonzero) * calls),
        *(len(used), int((~used.any(1)).sum()), len(inputs), int((~inputs.any(1)).sum())),
        is_2_of_4,
        total * size,
        nonzero * (size + INDEX_BYTES) + (len(used) + 1) * INDEX_BYTES,
        -(-total // 8) + nonzero * size,
        (total - kept) * size + -(-kept // 4) if is_2_of_4 else None,
    )
