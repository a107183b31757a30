"""Networks from positions to the other attributes of Gaussians, one for each cluster.

    γ(x) = (x, sin 2^i πx, cos 2^i πx),  i = 0 … frequencies − 1,  x in [−1, 1]³
    attributes = deviation_k · MLP_k(γ(x)) + mean_k,  k the cluster

Linear layers with tanh between them. Source: Tang et al., arXiv 2503.23162.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.models.sources import Source, register_sizes

__all__ = ["WEIGHT_BITS", "WHOLE", "SplatField", "position_code", "quantise", "rounded"]

SOURCE = {
    "splats_*": Source(
        "Tang et al. 2025, arXiv 2503.23162", "none: not published; written from the paper", "–"
    )
}
WHOLE = 16  # bits of a weight in half precision
WEIGHT_BITS = (4, 5, 6, 7, 8, WHOLE)


def position_code(x: Tensor, frequencies: int) -> Tensor:
    """Compute γ of positions (n, 3): (n, 3 + 6 · frequencies)."""
    turns = x[:, :, None] * math.pi * 2.0 ** torch.arange(frequencies, device=x.device)
    waves = torch.stack([turns.sin(), turns.cos()], 3).to(x.dtype)
    return torch.cat([x, waves.flatten(1)], 1)


def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round weights (rows, …) to whole numbers with one scale a row, in half precision.

    Returns:
        Numbers within ±(2^(bits − 1) − 1), and scales (rows, 1).
    """
    levels = 2 ** (bits - 1) - 1
    scales = (weight.detach().abs().amax(1, keepdim=True) / levels).half().to(weight.dtype)
    scales = scales.clamp(min=2.0**-24)
    return (weight.detach() / scales).round().clamp(-levels, levels), scales


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to 4 to 8 bits, or none of 16; the gradient is that of the identity."""
    if bits == WHOLE:
        return weight
    codes, scales = quantise(weight, bits)
    return weight + (codes * scales - weight).detach()


class SplatField(nn.Module):
    """Field of attributes in physical units, before activation.

    Args:
        clusters: Networks. In ``forward`` a position belongs to the nearest of their centres.
        width: Of the hidden layers.
        frequencies: Of the positions' code.
        layers: Linear layers of a network.
        num_classes: Columns of attributes.
        in_chans: 3.

    Example:
        >>> import torch
        >>> field = SplatField(clusters=1, width=128, frequencies=10, num_classes=56)
        >>> sum(p.numel() for p in field.parameters())
        64952
        >>> field(torch.zeros(2, 3, 1, 1)).shape
        torch.Size([2, 56])
    """

    centres: Tensor
    output_mean: Tensor
    output_std: Tensor
    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        clusters: int = 4,
        width: int = 24,
        frequencies: int = 5,
        layers: int = 5,
        num_classes: int = 56,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if in_chans != 3 or min(clusters, width, layers) < 1 or frequencies < 0:
            raise UsageError(
                "a field of splats has positions of 3 numbers, and at least one cluster, layer "
                f"and unit: got in_chans {in_chans}, clusters {clusters}, layers {layers}, width "
                f"{width}, frequencies {frequencies}"
            )
        self.frequencies, self.num_classes = frequencies, num_classes
        self.sizes = [3 + 6 * frequencies, *[width] * (layers - 1), num_classes]
        self.networks = nn.ModuleList(
            nn.ModuleList(nn.Linear(*pair) for pair in pairwise(self.sizes))
            for _ in range(clusters)
        )
        self.register_buffer("centres", torch.zeros(clusters, 3))
        self.register_buffer("input_mean", torch.zeros(3))
        self.register_buffer("input_std", torch.ones(3))
        self.register_buffer("output_mean", torch.zeros(clusters, num_classes))
        self.register_buffer("output_std", torch.ones(clusters, num_classes))

    @property
    def clusters(self) -> int:
        """Number of networks."""
        return len(self.networks)

    def get_classifier(self) -> nn.Module:
        """Return the last layer of the first network."""
        last: nn.Module = cast(nn.ModuleList, self.networks[0])[-1]
        return last

    def groups(self, positions: Tensor) -> Tensor:
        """Return the cluster of each position (n, 3): that of the nearest centre, (n,)."""
        return (positions[:, None] - self.centres).square().sum(2).argmin(1)

    def answer(self, network: int, code: Tensor, bits: int = WHOLE) -> Tensor:
        """Compute the standardised attributes of one network for codes (n, 3 + 6 frequencies)."""
        found = code
        for number, layer in enumerate(cast(nn.ModuleList, self.networks[network])):
            if number:
                found = found.tanh()
            linear = cast(nn.Linear, layer)
            if bits == WHOLE:
                found = linear(found)
            else:
                found = F.linear(found, rounded(linear.weight, bits), linear.bias)
        return found

    def forward(self, positions: Tensor) -> Tensor:
        """Compute attributes (n, columns) of normalised positions (n, 3, 1, 1).

        All networks compute each, so that the graph is fixed.
        """
        x = positions.flatten(1) * self.input_std + self.input_mean
        code = position_code(x, self.frequencies)
        found = torch.stack([self.answer(k, code) for k in range(self.clusters)], 1)
        found = found * self.output_std + self.output_mean
        own = F.one_hot(self.groups(x), self.clusters).to(found.dtype)
        chosen: Tensor = (found * own[:, :, None]).sum(1)
        return chosen

    def decode(self, positions: Tensor, counts: Sequence[int], bits: int = WHOLE) -> Tensor:
        """Compute attributes (n, columns) of positions (n, 3) that are ordered by cluster.

        Args:
            positions: In [−1, 1].
            counts: Positions of each cluster.
            bits: Of the weights; 16 leaves them as they are.
        """
        codes = torch.split(position_code(positions, self.frequencies), list(counts))
        return torch.cat(
            [
                self.answer(k, code, bits) * self.output_std[k] + self.output_mean[k]
                for k, code in enumerate(codes)
            ]
        )

    @torch.no_grad()
    def fit_outputs(self, labels: Tensor) -> None:
        """Set centres, means and deviations from labels of the task, which begin with positions.

        Args:
            labels: (Gaussians, columns), see ``smallfry.kits.splats.labels``.
        """
        from smallfry.kits.splats.labels import Labels

        known = Labels(labels)
        self.input_mean.copy_(known.codes.double().mean(0))
        self.input_std.copy_(known.codes.double().std(0, correction=0))
        own = torch.from_numpy(clusters_of(known.codes.numpy(), self.clusters))
        for k in range(self.clusters):  # fewer Gaussians leave some without any
            part = known.codes[own == k]
            self.centres[k] = part.mean(0) if len(part) else self.centres[0]
        self.fit_scales(known.attributes, self.groups(known.codes))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Undo the normalisation of the inputs, after ``fit_outputs``, from all of them."""
        given = images.flatten(1).double()
        deviations = given.std(0, correction=0).clamp(min=1e-12)
        self.input_std.copy_(self.input_std.double() / deviations)
        self.input_mean.copy_(self.input_mean.double() - self.input_std.double() * given.mean(0))

    @torch.no_grad()
    def fit_scales(self, attributes: Tensor, groups: Tensor) -> None:
        """Set means and deviations, in half precision, from attributes and clusters (n,)."""
        for k in range(self.clusters):
            part = attributes[groups == k].double()
            if len(part):
                self.output_mean[k] = part.mean(0).half()
                self.output_std[k] = part.std(0, correction=0).clamp(min=1e-4).half()


def clusters_of(features: Any, clusters: int, seed: int = 0) -> Any:
    """Divide rows of features into clusters by k-means, (n,); fewer rows are clusters of one."""
    from sklearn.cluster import KMeans

    found = KMeans(min(clusters, len(features)), n_init=4, random_state=seed).fit(features)
    return found.labels_.astype("int64")


SIZES: Mapping[str, Mapping[str, int]] = {  # parameters for 56 columns
    "splats_micro": {"clusters": 1, "width": 32, "frequencies": 5},  # 6,104
    "splats_tiny": {"clusters": 4, "width": 32, "frequencies": 5},  # 24,416
    "splats_object": {"clusters": 8, "width": 128, "frequencies": 10},  # 519,616
    "splats_room": {"clusters": 60, "width": 128, "frequencies": 10},  # 3,897,120
}
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 56,
            "input_size": (3, 1, 1),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "first_conv": "networks.0.0",
            "classifier": "networks.0.4",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    return build(SplatField, name, pretrained, **{**SIZES[name], **kwargs})


register_sizes(__name__, tuple(SIZES), _create)
