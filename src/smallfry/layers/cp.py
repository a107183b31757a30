"""CP convolutions: a kernel as a sum of products of one filter per axis.

    K[o, c, i, j] = Σ_r a[o, r] b[c, r] u[i, r] v[j, r]

is a 1 × 1 convolution to R channels, a k × 1 and a 1 × k depthwise one and another of 1 × 1, with
no nonlinearity between them: R (C_in + 2 k + C_out) parameters. Networks are trained in this form
from the start ("a priori", Cagniart et al. 2023, arXiv 2304.04964), or a trained kernel is
decomposed by alternating least squares (Carroll and Chang, Harshman, 1970).
"""

import math
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from smallfry.io.json import Plain
from smallfry.layers.linear_map import register_layer, require_dense, sizes_of, to_dense
from smallfry.order import Stage

SWEEPS = 100
STILL = 1e-4  # relative decrease of the squared error by a sweep at which sweeps end
RIDGE = 1e-10  # of the normal equations, relative: products that cancel grow without bound


def rank_for(layer: nn.Conv2d, keep: float) -> int:
    """Compute the rank at which the factors have a share of a kernel's parameters; at least 1."""
    outputs, inputs, height, width = layer.weight.shape
    return max(1, int(keep * layer.weight.numel() / (outputs + inputs + height + width)))


def decompose(kernel: Tensor, rank: int, sweeps: int = SWEEPS) -> list[Tensor]:
    """Fit a sum of ``rank`` products to a kernel by alternating least squares.

    It starts from the leading singular vectors of the unfoldings, and ends in a local minimum: even
    at a rank that allows an exact fit there may be an error.

    Args:
        kernel: (outputs, inputs, height, width).
        rank: Number of products.
        sweeps: Most passes over the four factors.

    Returns:
        a, b, u, v, each (size of the axis, rank), of equal norms in every product.
    """
    a, b, u, v = (_leading(kernel.movedim(axis, 0).flatten(1), rank) for axis in range(4))
    before, size = math.inf, float(kernel.square().sum())
    for _ in range(sweeps):
        seen = torch.einsum("ocij,cijr->or", kernel, _products(b, u, v))
        a = _solved(seen, b, u, v)
        rest = torch.einsum("ocij,or->cijr", kernel, a)
        b = _solved(torch.einsum("cijr,ijr->cr", rest, u[:, None] * v), a, u, v)
        rest = torch.einsum("cijr,cr->ijr", rest, b)
        u = _solved(torch.einsum("ijr,jr->ir", rest, v), a, b, v)
        seen = torch.einsum("ijr,ir->jr", rest, u)
        v = _solved(seen, a, b, u)
        error = max(size - float((seen * v).sum()), 0.0)  # as v solves its normal equations
        if error >= before * (1 - STILL):
            break
        before = error
    factors = [a, b, u, v]
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    even = norms.log().mean(0).exp()  # 0 where a factor is
    return [f * (even / n.where(n > 0, 1)) for f, n in zip(factors, norms, strict=True)]


def compose(factors: list[Tensor]) -> Tensor:
    """Multiply the factors a, b, u, v into a kernel."""
    a, *others = factors
    return torch.einsum("or,cijr->ocij", a, _products(*others))


def _products(b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("cr,ir,jr->cijr", b, u, v)


def _solved(seen: Tensor, *others: Tensor) -> Tensor:
    """Solve the normal equations of one factor, given the kernel's products with the others."""
    gram = torch.stack([other.T @ other for other in others]).prod(0)
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    solved: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), seen.T)
    return solved.T


def _leading(unfolding: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors, and random ones where there are not enough."""
    vectors = torch.linalg.svd(unfolding, full_matrices=False).U[:, :rank]
    generator = torch.Generator().manual_seed(0)
    shape = (len(unfolding), rank - vectors.shape[1])
    extra = torch.randn(shape, generator=generator, dtype=torch.float64).to(vectors)
    return torch.cat([vectors, extra], dim=1)


@register_layer
class CP(nn.Module):
    """CP convolution, four layers in place of one of k × k.

    Args:
        layer: The convolution whose shape it has.
        rank: R.

    Example:
        >>> import torch
        >>> from smallfry.layers.cp import CP
        >>> small = CP.like(torch.nn.Conv2d(16, 32, 3, padding=1), rank=8)
        >>> small(torch.zeros(1, 16, 8, 8)).shape, sum(p.numel() for p in small.parameters())
        (torch.Size([1, 32, 8, 8]), 464)
    """

    name: ClassVar[str] = "cp"
    stage: ClassVar[Stage] = Stage.FACTOR

    def __init__(self, layer: nn.Conv2d, rank: int) -> None:
        super().__init__()
        vars(self).update(sizes_of(layer))
        kind: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        down, across = (_along(layer, axis) for axis in (0, 1))
        self.reduce = nn.Conv2d(layer.in_channels, rank, 1, bias=False, **kind)
        self.down = nn.Conv2d(rank, rank, groups=rank, bias=False, **down, **kind)
        self.across = nn.Conv2d(rank, rank, groups=rank, bias=False, **across, **kind)
        self.expand = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None, **kind)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw factors of one variance that gives the kernel He's variance, 2 / (C_in k²)."""
        rank, inputs = self.reduce.weight.shape[:2]
        area = self.down.weight.shape[2] * self.across.weight.shape[3]
        deviation = (2 / (inputs * area * rank)) ** (1 / 8)
        for layer in (self.reduce, self.down, self.across, self.expand):
            nn.init.normal_(layer.weight, 0, deviation, generator)
        if self.expand.bias is not None:
            nn.init.zeros_(self.expand.bias)

    @classmethod
    def like(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Create the structure for a convolution, with random factors.

        Args:
            layer: ``nn.Conv2d`` of one group, with zeros as padding.
            settings: ``rank``, at least 1.

        Raises:
            ValueError: Another layer or rank.
        """
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(f"expected nn.Conv2d, got {type(layer).__name__}")
        require_dense(layer)
        rank = settings.get("rank")
        if set(settings) != {"rank"} or type(rank) is not int:
            raise ValueError(f"a CP layer needs exactly one setting, a whole rank; got {settings}")
        most = layer.weight.numel() // max(layer.weight.shape)
        if not 1 <= rank <= most:
            raise ValueError(f"rank is 1 to {most} here, not {rank}")
        return cls(layer, rank)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, layer: nn.Module, **settings: Plain) -> Self:
        """Decompose a convolution, see ``decompose``; raises as ``like``."""
        made = cls.like(layer, **settings)
        kernel = cast(Tensor, layer.weight)
        a, b, u, v = decompose(kernel.double(), len(made.reduce.weight))
        made.reduce.weight.copy_(b.T[:, :, None, None])
        made.down.weight.copy_(u.T[:, None, :, None])
        made.across.weight.copy_(v.T[:, None, None, :])
        made.expand.weight.copy_(a[:, :, None, None])
        if made.expand.bias is not None:
            made.expand.bias.copy_(cast(Tensor, layer.bias))
        return made

    @property
    def weight(self) -> Tensor:
        """Product of the factors, a kernel."""
        reduce, down, across, expand = (
            layer.weight.flatten(1) for layer in (self.reduce, self.down, self.across, self.expand)
        )
        return compose([expand, reduce.T, down.T, across.T])

    @property
    def bias(self) -> Tensor | None:
        """Bias of the outputs."""
        return self.expand.bias

    def dense(self) -> nn.Module:
        """Multiply the factors into one convolution."""
        return to_dense(self)

    def forward(self, input: Tensor) -> Tensor:
        """Map the inputs of the convolution to its outputs."""
        return cast(Tensor, self.expand(self.across(self.down(self.reduce(input)))))


def _along(layer: nn.Conv2d, axis: int) -> dict[str, Any]:
    """Return the arguments of the filter along one axis: those of the convolution on this axis."""
    neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    given: dict[str, Any] = {}
    for name, other in neutral.items():
        both = getattr(layer, name)
        pair: list[Any] = [other, other]
        pair[axis] = both if isinstance(both, str) else both[axis]
        given[name] = both if isinstance(both, str) else tuple(pair)
    return given
