"""Low-rank layers: W ≈ B A, with A (rank, inputs) and B (outputs, rank).

The nearest in the Frobenius norm comes from the singular value decomposition (Eckart and Young,
1936): W = U S Vᵀ, B = U √S, A = √S Vᵀ, of the largest singular values. A convolution is taken as
a matrix (outputs, inputs · height · width): a convolution to ``rank`` channels, then one of 1 × 1.
"""

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from smallfry.io.json import Plain
from smallfry.layers.linear_map import register_layer, require_dense, sizes_of, to_dense
from smallfry.order import Stage

_CONVOLUTION: Any = nn.Conv2d  # whose arguments are copied from another


@register_layer
class LowRank(nn.Module):
    """Product of two layers with a small inner width.

    Args:
        reduce: From the inputs to ``rank`` channels, without a bias.
        expand: From there to the outputs.

    Example:
        >>> import torch
        >>> from smallfry.layers.low_rank import LowRank
        >>> small = LowRank.from_dense(torch.nn.Linear(32, 16), rank=4)
        >>> small(torch.zeros(2, 32)).shape
        torch.Size([2, 16])
    """

    name: ClassVar[str] = "low_rank"
    stage: ClassVar[Stage] = Stage.FACTOR

    def __init__(self, reduce: nn.Module, expand: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = reduce, expand
        vars(self).update(sizes_of(reduce))
        if isinstance(expand, nn.Conv2d):
            self.out_channels = expand.out_channels
        else:
            self.out_features = expand.out_features

    @classmethod
    def like(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the structure for a dense layer.

        Args:
            layer: ``nn.Linear`` or ``nn.Conv2d``.
            settings: ``rank``, 1 to the smaller side of the matrix.

        Raises:
            ValueError: Another layer or rank.
        """
        require_dense(layer)
        rank = _rank(layer, settings)
        weight: Any = layer.weight
        kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        has_bias = layer.bias is not None
        if isinstance(layer, nn.Conv2d):
            shape: Any = (layer.stride, layer.padding, layer.dilation)
            outer: Any = (layer.in_channels, rank, layer.kernel_size)
            reduce: nn.Module = _CONVOLUTION(*outer, *shape, bias=False, **kind)
            expand: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=has_bias, **kind)
        else:
            reduce = nn.Linear(cast(int, layer.in_features), rank, bias=False, **kind)
            expand = nn.Linear(rank, cast(int, layer.out_features), bias=has_bias, **kind)
        return cls(reduce, expand)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the nearest layer of this rank in the Frobenius norm; raises as ``like``."""
        made = cls.like(layer, **settings)
        weight = cast(Tensor, layer.weight)
        rank = _rank(layer, settings)
        # in float64: the product is then the nearest to the last bit of the weight's own type
        u, s, v = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        root = s[:rank].sqrt()
        reduce, expand = cast(Tensor, made.reduce.weight), cast(Tensor, made.expand.weight)
        reduce.copy_((root[:, None] * v[:rank]).view_as(reduce))
        expand.copy_((u[:, :rank] * root).view_as(expand))
        if layer.bias is not None:
            cast(Tensor, made.expand.bias).copy_(cast(Tensor, layer.bias))
        return made

    @property
    def weight(self) -> Tensor:
        """Product of the factors, in the dense layer's shape."""
        expand, reduce = cast(Tensor, self.expand.weight), cast(Tensor, self.reduce.weight)
        return (expand.flatten(1) @ reduce.flatten(1)).view(-1, *reduce.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """Bias of the outputs."""
        return cast(Tensor | None, self.expand.bias)

    def dense(self) -> nn.Module:
        """Multiply the factors into one layer."""
        return to_dense(self)

    def forward(self, input: Tensor) -> Tensor:
        """Map the inputs of the dense layer to its outputs."""
        return cast(Tensor, self.expand(self.reduce(input)))


def _rank(layer: nn.Module, settings: Any) -> int:
    rank = settings.get("rank")
    if set(settings) != {"rank"} or type(rank) is not int:
        raise ValueError(
            f"a low-rank layer needs exactly one setting, an integer rank; got {settings}"
        )
    most = min(cast(Tensor, layer.weight).flatten(1).shape)
    if not 1 <= rank <= most:
        raise ValueError(f"rank is 1 to {most} here, not {rank}")
    return rank
