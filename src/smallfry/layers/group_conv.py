"""Convolutions over the plane and a matrix group, with kernels of a small network.

    lifting      y(x, g)  = Σ_u ψ(g⁻¹u) |det g|⁻¹ m(g⁻¹u) f(x + u)
    group        y(x, h)  = Σ_g |det g|⁻¹ Σ_u ψ(h⁻¹u, ξ(h⁻¹g)) m(h⁻¹u, ξ(h⁻¹g)) f(x + u, g)
    projection   y(x)     = Σ_g |det g|⁻¹ Σ_u ψ(g⁻¹u) m(g⁻¹u) f(x + u, g)

The group is a finite set of its elements, drawn anew or fixed. ψ maps coordinates to the weights
of all pairs of channels, ξ gives the coordinates of a group element, and m masks what is far from
the centre. Each layer is one ordinary convolution with channels (channel, element).

Mironenco and Forré, "Lie Group Decompositions for Equivariant Neural Networks", ICLR 2024, arXiv
2310.11366. Other than in the authors' code, |det g| is that of the input's element g.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError

__all__ = [
    "Geometry",
    "Group",
    "GroupConv2d",
    "ImplicitKernel",
    "LiftingConv2d",
    "ProjectionConv2d",
    "Samples",
    "as_convolution",
    "pixel_grid",
]

FREQUENCY = 10.0  # ω₀ of the sine layers


class Samples(NamedTuple):
    """Elements of a matrix group, with their inverses."""

    elements: Tensor  # (samples, 2, 2)
    inverses: Tensor


class Group(Protocol):
    """Group of 2×2 matrices with real coordinates, which are defined everywhere.

    Attributes:
        dimension: Number of coordinates.
    """

    @property
    def dimension(self) -> int:
        """Number of coordinates."""

    def coordinates(self, elements: Tensor) -> Tensor:
        """Compute coordinates (…, dimension) of elements (…, 2, 2)."""

    def mask(self, places: Tensor, coordinates: Tensor) -> Tensor:
        """Compute factors (…) from places (…, 2) and coordinates (…, dimension), or (…, 0)."""


def pixel_grid(size: int) -> Tensor:
    """Return the centres of size × size pixels in [−1, 1]², (size, size, 2): x, then y.

    Example:
        >>> pixel_grid(2)[0, 1].tolist()
        [0.5, -0.5]
    """
    places = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([x, y], dim=-1)


class SineLayer(nn.Module):
    """sin(ω₀ (W x + b)), a layer of SIREN (arXiv 2006.09661).

    Args:
        inputs: Features given.
        width: Features.
        bound: Weights start uniform in ± this.
        zero_bias: Start with biases of zero, not with PyTorch's.
    """

    def __init__(self, inputs: int, width: int, bound: float, zero_bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        nn.init.uniform_(self.linear.weight, -bound, bound)
        if zero_bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, values: Tensor) -> Tensor:
        """Map (…, inputs) to (…, width)."""
        return torch.sin(FREQUENCY * self.linear(values))


class ImplicitKernel(nn.Module):
    """Network ψ from coordinates to the weights between channels, of sines.

    Args:
        inputs: Coordinates.
        out_channels: Channels of the result.
        in_channels: Channels of the input.
        kernel_size: Side of the kernels, for the scale of the initial weights.
        width: Features of the hidden layers.
        hidden: Hidden layers after the first.

    Example:
        >>> psi = ImplicitKernel(2, 4, 3, 5)
        >>> psi(torch.zeros(7, 2)).shape
        torch.Size([7, 4, 3])
    """

    def __init__(
        self,
        inputs: int,
        out_channels: int,
        in_channels: int,
        kernel_size: int,
        width: int = 60,
        hidden: int = 2,
    ) -> None:
        super().__init__()
        if min(inputs, out_channels, in_channels, kernel_size, width) < 1 or hidden < 0:
            raise UsageError(
                "a kernel network has at least one channel in and out, a width and a kernel size "
                "of at least 1, and no negative number of hidden layers"
            )
        self.channels = out_channels, in_channels
        bound = math.sqrt(6 / width)
        sines = [SineLayer(inputs, width, 1 / inputs, zero_bias=False)]
        sines += [SineLayer(width, width, bound / FREQUENCY, True) for _ in range(hidden)]
        self.sines = nn.Sequential(*sines)
        self.last = nn.Linear(width, out_channels * in_channels)
        bound /= math.sqrt(in_channels * kernel_size**2)
        nn.init.uniform_(self.last.weight, -bound, bound)
        nn.init.zeros_(self.last.bias)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Map coordinates (…, inputs) to weights (…, out_channels, in_channels)."""
        found: Tensor = self.last(self.sines(coordinates))
        return found.reshape(*found.shape[:-1], *self.channels)


class Geometry(NamedTuple):
    """All that a kernel needs of the samples: a function of them, without parameters."""

    coordinates: Tensor  # (…, k, k, 2 or 2 + dimension): where ψ is asked
    factors: Tensor  # (…, k, k): mask and determinant


class _Implicit(nn.Module):
    """Base of the layers: ψ on the pixels of a kernel."""

    def __init__(
        self,
        group: Group,
        in_channels: int,
        channels: int,
        kernel_size: int,
        padding: int,
        dimension: int,
        width: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.group, self.padding = group, padding
        self.in_channels, self.channels, self.kernel_size = in_channels, channels, kernel_size
        self.psi = ImplicitKernel(2 + dimension, channels, in_channels, kernel_size, width, hidden)

    def _weights(self, geometry: Geometry) -> Tensor:
        """Compute weights (…, k, k, channels, in_channels), never in half precision."""
        device = self.psi.last.weight.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._weights(geometry)
        weight = self.psi.last.weight
        found: Tensor = self.psi(geometry.coordinates.to(weight))
        return found * geometry.factors.to(weight)[..., None, None]

    def _plane(self, inverses: Tensor) -> Geometry:
        """Return the pixels as elements see them, g⁻¹u, times |det g⁻¹|: (samples, k, k, …)."""
        places = torch.einsum("sij,yxj->syxi", inverses, pixel_grid(self.kernel_size).to(inverses))
        mask = self.group.mask(places, places[..., :0])
        return Geometry(places, mask * _determinants(inverses)[:, None, None])

    def _convolve(self, maps: Tensor, weight: Tensor) -> Tensor:
        """Convolve maps (batch, …, H, W) to (batch, channels, samples, H', W')."""
        found = F.conv2d(maps, weight, padding=self.padding)
        samples = weight.shape[0] // self.channels
        return found.reshape(found.shape[0], self.channels, samples, *found.shape[2:])

    def extra_repr(self) -> str:
        """Describe channels, kernel and group."""
        return (
            f"{self.in_channels}, {self.channels}, kernel_size={self.kernel_size}, "
            f"padding={self.padding}, group={self.group}"
        )


class LiftingConv2d(_Implicit):
    """Convolution from the plane to plane and group.

    Args:
        group: The group.
        in_channels: Channels of the images.
        channels: Channels for each element.
        kernel_size: Side of the kernels.
        padding: Zeros around the images; default none.
        width: Features of ψ's hidden layers.
        hidden: ψ's hidden layers after the first.

    Example:
        >>> import torch
        >>> from smallfry.kits.equivariant.group import GL, rotations
        >>> layer = LiftingConv2d(GL(), 1, 4)
        >>> layer(torch.zeros(2, 1, 12, 12), rotations(6)).shape
        torch.Size([2, 4, 6, 8, 8])
    """

    def __init__(
        self,
        group: Group,
        in_channels: int,
        channels: int,
        kernel_size: int = 5,
        padding: int = 0,
        width: int = 60,
        hidden: int = 2,
    ) -> None:
        super().__init__(group, in_channels, channels, kernel_size, padding, 0, width, hidden)

    def geometry(self, outputs: Samples) -> Geometry:
        """Compute what the kernel needs of the samples."""
        return self._plane(outputs.inverses)

    def kernel(self, geometry: Geometry) -> Tensor:
        """Compute kernels (channels, samples, in_channels, k, k)."""
        return self._weights(geometry).permute(3, 0, 4, 1, 2)

    def weight(self, geometry: Geometry) -> Tensor:
        """Compute the weight of the ordinary convolution, channels and samples in one."""
        return self.kernel(geometry).flatten(0, 1)

    def convolve(self, images: Tensor, geometry: Geometry) -> Tensor:
        """Map images as ``forward`` does, with a geometry computed before."""
        return self._convolve(images, self.weight(geometry))

    def forward(self, images: Tensor, outputs: Samples) -> Tensor:
        """Map images (batch, in_channels, H, W) to (batch, channels, samples, H', W')."""
        return self.convolve(images, self.geometry(outputs))


class GroupConv2d(_Implicit):
    """Convolution over plane and group.

    Args:
        group: The group.
        in_channels: Channels of each input element.
        channels: Channels of each output element.
        kernel_size: Side of the kernels.
        padding: Zeros around the features; default half of the kernel.
        width: Features of ψ's hidden layers.
        hidden: ψ's hidden layers after the first.

    Example:
        >>> import torch
        >>> from smallfry.kits.equivariant.group import GL, rotations
        >>> layer, four = GroupConv2d(GL(), 4, 3), rotations(4)
        >>> layer(torch.zeros(2, 4, 4, 8, 8), four, four).shape
        torch.Size([2, 3, 4, 8, 8])
    """

    def __init__(
        self,
        group: Group,
        in_channels: int,
        channels: int,
        kernel_size: int = 5,
        padding: int | None = None,
        width: int = 60,
        hidden: int = 2,
    ) -> None:
        size, place = kernel_size, kernel_size // 2 if padding is None else padding
        super().__init__(group, in_channels, channels, size, place, group.dimension, width, hidden)

    def geometry(self, inputs: Samples, outputs: Samples) -> Geometry:
        """Compute what the kernel needs of the samples, (outputs, inputs, k, k, …)."""
        between = torch.einsum("hij,gjk->hgik", outputs.inverses, inputs.elements)
        coordinates = self.group.coordinates(between)[:, :, None, None]
        places = self._plane(outputs.inverses).coordinates[:, None]
        shape = (*between.shape[:2], *places.shape[2:4], -1)
        places, coordinates = places.expand(shape), coordinates.expand(shape)
        scale = 1 / _determinants(inputs.elements)
        mask = self.group.mask(places, coordinates)
        return Geometry(torch.cat([places, coordinates], dim=-1), mask * scale[:, None, None])

    def kernel(self, geometry: Geometry) -> Tensor:
        """Compute kernels (channels, output samples, in_channels, input samples, k, k)."""
        return self._weights(geometry).permute(4, 0, 5, 1, 2, 3)

    def weight(self, geometry: Geometry) -> Tensor:
        """Compute the weight of the ordinary convolution, channels and samples in one."""
        return self.kernel(geometry).flatten(2, 3).flatten(0, 1)

    def convolve(self, features: Tensor, geometry: Geometry) -> Tensor:
        """Map features as ``forward`` does, with a geometry computed before.

        Raises:
            ValueError: The features are not those of so many input samples.
        """
        _require_samples(features, geometry.factors.shape[1])
        return self._convolve(features.flatten(1, 2), self.weight(geometry))

    def forward(self, features: Tensor, inputs: Samples, outputs: Samples) -> Tensor:
        """Map (batch, in_channels, input samples, H, W) to (batch, channels, output samples, …).

        Raises:
            ValueError: The features are not those of so many input samples.
        """
        return self.convolve(features, self.geometry(inputs, outputs))


class ProjectionConv2d(_Implicit):
    """Convolution from plane and group back to the plane.

    Args:
        group: The group.
        in_channels: Channels of each element.
        channels: Channels of the result.
        kernel_size: Side of the kernels.
        padding: Zeros around the features; default half of the kernel.
        width: Features of ψ's hidden layers.
        hidden: ψ's hidden layers after the first.

    Example:
        >>> import torch
        >>> from smallfry.kits.equivariant.group import GL, rotations
        >>> ProjectionConv2d(GL(), 4, 3)(torch.zeros(2, 4, 4, 8, 8), rotations(4)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        group: Group,
        in_channels: int,
        channels: int,
        kernel_size: int = 5,
        padding: int | None = None,
        width: int = 60,
        hidden: int = 2,
    ) -> None:
        size, place = kernel_size, kernel_size // 2 if padding is None else padding
        super().__init__(group, in_channels, channels, size, place, 0, width, hidden)

    def geometry(self, inputs: Samples) -> Geometry:
        """Compute what the kernel needs of the samples."""
        return self._plane(inputs.inverses)

    def kernel(self, geometry: Geometry) -> Tensor:
        """Compute kernels (channels, in_channels, input samples, k, k)."""
        return self._weights(geometry).permute(3, 4, 0, 1, 2)

    def weight(self, geometry: Geometry) -> Tensor:
        """Compute the weight of the ordinary convolution, channels and samples in one."""
        return self.kernel(geometry).flatten(1, 2)

    def forward(self, features: Tensor, inputs: Samples) -> Tensor:
        """Map (batch, in_channels, samples, H, W) to (batch, channels, H', W').

        Raises:
            ValueError: The features are not those of so many samples.
        """
        _require_samples(features, len(inputs.elements))
        weight = self.weight(self.geometry(inputs))
        return F.conv2d(features.flatten(1, 2), weight, padding=self.padding)


@torch.no_grad()
def as_convolution(
    layer: LiftingConv2d | GroupConv2d | ProjectionConv2d,
    inputs: Samples | None = None,
    outputs: Samples | None = None,
) -> nn.Conv2d:
    """Fold a layer into an ordinary convolution, for given samples.

    Its channels are (channel, element), the elements fastest.

    Args:
        layer: The layer.
        inputs: Input samples, but of a lifting.
        outputs: Output samples, but of a projection.

    Raises:
        ValueError: Samples that the layer needs are missing, or some that it has no use for.

    Example:
        >>> from smallfry.kits.equivariant.group import GL, rotations
        >>> folded = as_convolution(LiftingConv2d(GL(), 1, 4), outputs=rotations(6))
        >>> folded.in_channels, folded.out_channels
        (1, 24)
    """
    if isinstance(layer, LiftingConv2d) and inputs is None and outputs is not None:
        weight = layer.weight(layer.geometry(outputs))
    elif isinstance(layer, GroupConv2d) and inputs is not None and outputs is not None:
        weight = layer.weight(layer.geometry(inputs, outputs))
    elif isinstance(layer, ProjectionConv2d) and inputs is not None and outputs is None:
        weight = layer.weight(layer.geometry(inputs))
    else:
        raise ValueError(
            "a lifting is folded with output samples, a projection with input samples, and a "
            "group convolution with both"
        )
    out, before, size, _ = weight.shape
    folded = nn.Conv2d(before, out, size, padding=layer.padding, bias=False)
    folded.weight = nn.Parameter(weight.clone())
    return folded


def _determinants(matrices: Tensor) -> Tensor:
    """Compute |det| of 2×2 matrices (…, 2, 2)."""
    a, b, c, d = matrices.flatten(-2).unbind(-1)
    return (a * d - b * c).abs()


def _require_samples(features: Tensor, samples: int) -> None:
    if features.ndim != 5 or features.shape[2] != samples:
        raise ValueError(
            f"expected features (batch, channels, {samples} samples, height, width), got "
            f"{tuple(features.shape)}"
        )
