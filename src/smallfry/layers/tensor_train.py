"""Tensor trains: a matrix as a chain of small cores (Oseledets, 2011).

The modes O = Π O_k and I = Π I_k of a matrix (O, I) are paired, (O_k I_k), and the tensor of the
pairs is factored from left to right by singular value decompositions of its unfoldings:

    W[o_1 … o_N, i_1 … i_N] = G_1[o_1, i_1, :] G_2[:, o_2, i_2, :] … G_N[:, o_N, i_N]

Core k is (χ_{k−1}, O_k, I_k, χ_k) with χ_0 = χ_N = 1. Of the singular values σ of the unfoldings of
W, those that are left out bound the error, ‖W − Ŵ‖² ≤ Σ_k Σ σ_k², with equality for two cores,
where Ŵ = Σ_χ A_χ ⊗ B_χ is a sum of Kronecker products. CompactifAI (Tomut et al. 2024, arXiv
2401.14109) takes the layers of a language model this way.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry._torch import has_forward_hooks
from smallfry.io.json import Plain
from smallfry.layers.linear_map import register_layer, require_dense, sizes_of, to_dense
from smallfry.order import Stage

UNEVEN = 4  # ratio of factors above which a size is rounded up


class Modes(NamedTuple):
    """Factors of both sides of a matrix."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def full_ranks(self) -> tuple[int, ...]:
        """Ranks between the cores at which a train is exact."""
        pairs = [o * i for o, i in zip(self.outputs, self.inputs, strict=True)]
        cuts = range(1, len(pairs))
        return tuple(min(math.prod(pairs[:k]), math.prod(pairs[k:])) for k in cuts)

    def parameters(self, ranks: Sequence[int]) -> int:
        """Count the numbers in the cores."""
        ends = (1, *ranks, 1)
        pairs = zip(self.outputs, self.inputs, ends[:-1], ends[1:], strict=True)
        return sum(o * i * before * after for o, i, before, after in pairs)


def modes_of(outputs: int, inputs: int, cores: int) -> Modes:
    """Factor both sides of a matrix evenly; a prime is rounded up to a multiple of 4 first.

    Example:
        >>> from smallfry.layers.tensor_train import modes_of
        >>> modes_of(64, 10, cores=2), modes_of(13, 24, cores=2).outputs
        (Modes(outputs=(8, 8), inputs=(2, 5)), (4, 4))
    """
    return Modes(_factors(outputs, cores), _factors(inputs, cores))


def to_cores(matrix: Tensor, modes: Modes, ranks: Sequence[int]) -> list[Tensor]:
    """Factor a matrix (ΠO, ΠI) into cores (χ, O_k, I_k, χ') of the given ranks or fewer."""
    count = len(modes.outputs)
    paired = matrix.reshape(*modes.outputs, *modes.inputs)
    rest = paired.permute([axis + side for axis in range(count) for side in (0, count)])
    cores, before = list[Tensor](), 1
    for o, i, rank in zip(modes.outputs, modes.inputs, ranks, strict=False):
        u, s, v = torch.linalg.svd(rest.reshape(before * o * i, -1), full_matrices=False)
        kept = min(rank, len(s))
        cores.append(u[:, :kept].reshape(before, o, i, kept))
        rest, before = s[:kept, None] * v[:kept], kept
    cores.append(rest.reshape(before, modes.outputs[-1], modes.inputs[-1], 1))
    return cores


def to_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Multiply cores (χ, O_k, I_k, χ') into the matrix (ΠO, ΠI)."""
    product = cores[0][0]
    for core in cores[1:]:
        outputs, inputs, rank = product.shape
        before, o, i, after = core.shape
        grown = product.reshape(outputs * inputs, rank) @ core.reshape(before, -1)
        grown = grown.reshape(outputs, inputs, o, i, after).transpose(1, 2)
        product = grown.reshape(outputs * o, inputs * i, after)
    return product[..., 0]


@register_layer
class TensorTrain(nn.Module):
    """Tensor train in place of a linear layer or a convolution of 1 × 1.

    Each core is a linear layer, so that quantization and natural gradient treat it as any other.
    Where applying them in turn takes more multiplications than multiplying out the matrix and
    applying that, a call does the latter, unless a core is observed, quantized or exported: an
    export stores the cores.

    Args:
        layer: The layer whose shape it has.
        ranks: χ_1 to χ_{N−1}; one for two cores.

    Example:
        >>> import torch
        >>> from smallfry.layers.tensor_train import TensorTrain
        >>> small = TensorTrain.from_dense(torch.nn.Linear(64, 64), ranks=[16])
        >>> [tuple(core.weight.shape) for core in small.cores]
        [(8, 128), (128, 8)]
    """

    name: ClassVar[str] = "tensor_train"
    stage: ClassVar[Stage] = Stage.FACTOR
    bias: Tensor | None

    def __init__(self, layer: nn.Module, ranks: Sequence[int]) -> None:
        super().__init__()
        weight = cast(Tensor, layer.weight)
        self.out_features, self.in_features = weight.flatten(1).shape
        self.is_convolution = isinstance(layer, nn.Conv2d)
        vars(self).update(sizes_of(layer))
        self.modes = modes_of(self.out_features, self.in_features, len(ranks) + 1)
        self.ranks = (1, *ranks, 1)
        kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.cores = nn.ModuleList(
            nn.Linear(i * after, before * o, bias=False, **kind)
            for o, i, before, after in zip(
                *self.modes, self.ranks[:-1], self.ranks[1:], strict=True
            )
        )
        bias = None if layer.bias is None else torch.zeros(self.out_features, **kind)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def like(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the structure for a dense layer.

        Args:
            layer: ``nn.Linear``, or ``nn.Conv2d`` of 1 × 1 without padding.
            settings: ``ranks``, a list with one rank fewer than cores.

        Raises:
            ValueError: Another layer or other ranks.
        """
        _require_pointwise(layer)
        return cls(layer, _ranks(layer, settings))

    @classmethod
    @torch.no_grad()
    def from_dense(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Decompose a layer, its cores scaled to one norm; raises as ``like``."""
        made = cls.like(layer, **settings)
        matrix = cast(Tensor, layer.weight).flatten(1).double()
        rows, columns = (math.prod(side) for side in made.modes)
        matrix = F.pad(matrix, (0, columns - made.in_features, 0, rows - made.out_features))
        cores = to_cores(matrix, made.modes, made.ranks[1:-1])
        norms = torch.stack([core.norm() for core in cores])
        even = norms.log().mean().exp()
        for module, core, norm in zip(made.cores, cores, norms, strict=True):
            own = cast(Tensor, module.weight)
            own.copy_((core * (even / norm) if norm else core).reshape(own.shape))
        if made.bias is not None:
            made.bias.copy_(cast(Tensor, layer.bias))
        return made

    @property
    def matrix(self) -> Tensor:
        """Product of the cores, (outputs, inputs)."""
        shapes = zip(self.ranks[:-1], *self.modes, self.ranks[1:], strict=True)
        cores = [
            cast(Tensor, core.weight).reshape(shape)
            for core, shape in zip(self.cores, shapes, strict=True)
        ]
        return to_matrix(cores)[: self.out_features, : self.in_features]

    @property
    def weight(self) -> Tensor:
        """Matrix in the dense layer's shape."""
        return self.matrix[..., None, None] if self.is_convolution else self.matrix

    def dense(self) -> nn.Module:
        """Multiply the cores into one layer."""
        return to_dense(self)

    def forward(self, input: Tensor) -> Tensor:
        """Map the inputs of the dense layer to its outputs."""
        if not self.is_convolution:
            return self._apply_rows(input)
        down, across = cast(Any, self.stride)
        rows = input[..., ::down, ::across].movedim(-3, -1)
        return self._apply_rows(rows).movedim(-1, -3)

    def _apply_rows(self, rows: Tensor) -> Tensor:
        if self._multiplies_out(rows):
            return F.linear(rows, self.matrix, self.bias)
        outputs = self._contract(rows)
        return outputs if self.bias is None else outputs + self.bias

    def _multiplies_out(self, rows: Tensor) -> bool:
        plain = all(type(core) is nn.Linear and not has_forward_hooks(core) for core in self.cores)
        if not plain or torch.compiler.is_exporting():
            return False
        count = math.prod(rows.shape[:-1])
        dense = self.out_features * self.in_features
        in_turn, together = self._macs()
        return together + count * dense < count * in_turn

    def _macs(self) -> tuple[int, int]:
        """Count the multiplications of a row with the cores in turn, and of the cores."""
        in_turn = together = 0
        outputs, inputs = self.modes
        for k, (before, after) in enumerate(zip(self.ranks[:-1], self.ranks[1:], strict=True)):
            in_turn += math.prod(inputs[: k + 1]) * before * after * math.prod(outputs[k:])
            if k:
                done = math.prod(outputs[: k + 1]) * math.prod(inputs[: k + 1])
                together += done * before * after
        return in_turn, together

    def _contract(self, rows: Tensor) -> Tensor:
        """Apply the cores in turn to (…, inputs)."""
        outputs, inputs = self.modes
        padded = F.pad(rows, (0, math.prod(inputs) - self.in_features))
        left = math.prod(inputs[:-1])
        state = _split(padded, -1, (left, 1, inputs[-1]))  # (…, left, right, mode · rank)
        for k in range(len(inputs) - 1, 0, -1):
            state = _split(self.cores[k](state), -1, (self.ranks[k], outputs[k]))
            left //= inputs[k - 1]
            state = _split(state, -4, (left, inputs[k - 1]))  # (…, left, i, right, rank, o)
            state = state.movedim(-1, -4).transpose(-3, -2)  # (…, left, o, right, i, rank)
            state = state.flatten(-4, -3).flatten(-2)
        last: Tensor = self.cores[0](state)  # (…, 1, right, o_1)
        return last.transpose(-2, -1).flatten(-3)[..., : self.out_features]


def _split(tensor: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    split: Tensor = tensor.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split


def _factors(size: int, count: int) -> tuple[int, ...]:
    found = _even_factors(size, count)
    if found[-1] > UNEVEN * found[0]:
        found = _even_factors(-(-size // 4) * 4, count)
    return found


def _even_factors(size: int, count: int) -> tuple[int, ...]:
    """Factor a number into ``count`` rising factors, each the largest below the even one."""
    if count == 1:
        return (size,)
    even = math.floor(size ** (1 / count) + 1e-9)
    first = next(factor for factor in range(even, 0, -1) if size % factor == 0)
    return tuple(sorted((first, *_even_factors(size // first, count - 1))))


def _require_pointwise(layer: nn.Module) -> None:
    require_dense(layer)
    if isinstance(layer, nn.Conv2d) and (
        layer.kernel_size != (1, 1) or layer.padding not in ((0, 0), "valid", "same")
    ):
        raise ValueError("of convolutions, a tensor train stands for 1 × 1 without padding only")


def _ranks(layer: nn.Module, settings: Any) -> list[int]:
    ranks = settings.get("ranks")
    known = isinstance(ranks, list | tuple) and 1 <= len(ranks) <= 9
    if set(settings) != {"ranks"} or not known or any(type(rank) is not int for rank in ranks):
        raise ValueError(
            f"a tensor train needs exactly one setting, a list of one to 9 ranks; got {settings}"
        )
    rows, columns = cast(Tensor, layer.weight).flatten(1).shape
    modes = modes_of(rows, columns, len(ranks) + 1)
    most = modes.full_ranks
    if not all(1 <= rank <= full for rank, full in zip(ranks, most, strict=True)):
        raise ValueError(f"ranks are 1 to {list(most)} here, not {list(ranks)}")
    pairs = [o * i for o, i in zip(*modes, strict=True)][1:-1]
    for pair, before, after in zip(pairs, ranks, ranks[1:], strict=False):
        if not before <= pair * after <= pair * pair * before:
            raise ValueError(f"ranks {before} and {after} differ by more than a core of {pair}")
    return list(ranks)
