"""Network from atoms to the coefficients of a density, equivariant to rotations and reflections.

    s_i ← embedding of the element;  h ← gate(linear(s) + Σ_j s_j ⊗ Y(r_ij) · w(|r_ij|) / 3)
    h ← h + gate(linear(h) + Σ_j h_j ⊗ Y(r_ij) · w(|r_ij|) / 3);  z_i ← linear of i's element (h_i)

Features are lists by angular momentum l of tensors (atoms, channels, 2l + 1), of parity (−1)^l, in
the order of e3nn (Geiger, Smidt 2022, arXiv 2207.09453), whose coupling coefficients and spherical
harmonics are used. Products after tensor field networks (Thomas et al. 2018, arXiv 1802.08219).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from e3nn import o3
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.kits.dft.layout import SHELLS, WIDTH, names_of
from smallfry.kits.dft.molecules import ELEMENTS_LEARNT
from smallfry.models.sources import Source, register_sizes

__all__ = ["DensityNet", "EquivariantLinear", "NeighbourProduct", "Neighbours"]

SOURCE = Source("Liu et al. 2026, ICLR, arXiv 2509.25724, for the task; the network is ours")
HYDROGEN = (3, 1, 1, 0, 0)  # shells of its functions
HIGHEST = 4  # angular momentum of harmonics
GAUSSIANS, NEAREST, SPREAD = 8, 0.5, 0.8  # of distances; bohr
SILU = 1.679  # brings the output of silu for normal inputs to a variance of 1
NEIGHBOURS = 3.0  # divides sums over them


class Neighbours(NamedTuple):
    """Pairs of atoms closer than the cutoff, in both directions."""

    sources: Tensor  # (pairs,)
    targets: Tensor  # (pairs,)
    harmonics: Tensor  # (pairs, 25), of l = 0 … 4
    distances: Tensor  # (pairs, 8), Gaussians of the distance
    cutoffs: Tensor  # (pairs, 1), 1 at 0 and 0 at the cutoff


class EquivariantLinear(nn.Module):
    """Linear map of the channels of each angular momentum, with a bias of scalars.

    Args:
        given: Channels by angular momentum.
        wanted: The same.
    """

    def __init__(self, given: Sequence[int], wanted: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                str(momentum): nn.Linear(n, m, bias=momentum == 0)
                for momentum, (n, m) in enumerate(zip(given, wanted, strict=True))
                if n and m
            }
        )
        self.wanted = tuple(wanted)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map lists of (atoms, channels, 2l + 1)."""
        found = []
        for momentum, (part, count) in enumerate(zip(features, self.wanted, strict=True)):
            if str(momentum) in self.parts:
                mapped = self.parts[str(momentum)](part.transpose(1, 2)).transpose(1, 2)
            else:
                mapped = part.new_zeros(len(part), count, 2 * momentum + 1)
            found.append(mapped)
        return found


class NeighbourProduct(nn.Module):
    """Sum over neighbours of products of their features with spherical harmonics.

    Every coupling of momenta that keeps parity has weights of its own from the distance.

    Args:
        given: Channels by angular momentum.
        wanted: The same.
        hidden: Width of the network from distances to weights.
    """

    def __init__(self, given: Sequence[int], wanted: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.wanted = tuple(wanted)
        self.couplings: list[list[tuple[int, int]]] = []  # by i: k, and how many j couple them
        self.shapes: list[tuple[int, int]] = []  # by i: rows and columns of the weights of a pair
        reached = [sum(given[i] for i, _ in _couples(given, k)) for k in range(HIGHEST + 1)]
        for i, channels in enumerate(given):
            self.couplings.append([])
            for k in range(HIGHEST + 1) if channels else ():
                harmonics = [j for at, j in _couples(given, k) if at == i]
                if not wanted[k] or not harmonics:
                    continue
                whole = torch.zeros((HIGHEST + 1) ** 2, len(harmonics), 2 * i + 1, 2 * k + 1)
                for place, j in enumerate(harmonics):
                    part = o3.wigner_3j(i, j, k).transpose(0, 1)
                    whole[j**2 : (j + 1) ** 2, place] = part * math.sqrt((2 * k + 1) / reached[k])
                self.register_buffer(f"coupling_{i}{k}", whole.flatten(1, 2), persistent=False)
                self.couplings[i].append((k, len(harmonics)))
            rows = sum(count * wanted[k] for k, count in self.couplings[i])
            self.shapes.append((rows, channels))
        self.inner = nn.Linear(GAUSSIANS, hidden, bias=False)
        self.outer = nn.Linear(hidden, sum(n * m for n, m in self.shapes), bias=False)
        nn.init.normal_(self.inner.weight)
        nn.init.normal_(self.outer.weight, std=hidden**-0.5)

    def weights(self, distances: Tensor) -> Tensor:
        """Compute the weights of all couplings from Gaussians of distances, (pairs, weights)."""
        found: Tensor = self.outer(SILU * F.silu(self.inner(distances)))
        return found

    def forward(self, features: Sequence[Tensor], pairs: Neighbours) -> list[Tensor]:
        """Return lists of (atoms, channels, 2l + 1)."""
        atoms, count = len(features[0]), len(pairs.sources)
        weights = self.weights(pairs.distances) * pairs.cutoffs
        sizes = [n * m for n, m in self.shapes]
        sums = {k: features[0].new_zeros(count, n, 2 * k + 1) for k, n in enumerate(self.wanted)}
        for i, weight in enumerate(weights.split_with_sizes(sizes, dim=1)):
            if not self.couplings[i]:
                continue
            mixed = weight.view(count, *self.shapes[i]) @ features[i][pairs.sources]
            rows = [many * self.wanted[k] for k, many in self.couplings[i]]
            for (k, many), part in zip(
                self.couplings[i], mixed.split_with_sizes(rows, dim=1), strict=True
            ):
                coupling = cast(Tensor, getattr(self, f"coupling_{i}{k}"))
                turned = (pairs.harmonics @ coupling.flatten(1)).view(count, *coupling.shape[1:])
                part = part.view(count, many, self.wanted[k], 2 * i + 1)
                sums[k] = sums[k] + part.transpose(1, 2).flatten(2) @ turned
        return [
            part.new_zeros(atoms, *part.shape[1:]).index_add(0, pairs.targets, part / NEIGHBOURS)
            for part in sums.values()
        ]


def _couples(given: Sequence[int], k: int) -> list[tuple[int, int]]:
    """List the momenta of features and of harmonics whose products have momentum k and parity."""
    momenta = range(HIGHEST + 1)
    return [
        (i, j)
        for i in momenta
        for j in momenta
        if given[i] and abs(i - j) <= k <= i + j and (i + j + k) % 2 == 0
    ]


class Interaction(nn.Module):
    """Layer: linear map of an atom, products with its neighbours, and gates.

    Args:
        given: Channels by angular momentum.
        wanted: The same.
        hidden: See ``NeighbourProduct``.
    """

    def __init__(self, given: Sequence[int], wanted: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.wanted = tuple(wanted)
        gated = (wanted[0] + sum(wanted[1:]), *wanted[1:])
        self.itself = EquivariantLinear(given, gated)
        self.others = NeighbourProduct(given, gated, hidden)

    def forward(self, features: Sequence[Tensor], pairs: Neighbours) -> list[Tensor]:
        """Return lists of (atoms, channels, 2l + 1)."""
        found = [
            a + b for a, b in zip(self.itself(features), self.others(features, pairs), strict=True)
        ]
        scalars, *gates = found[0].split(self.wanted, dim=1)
        opened = [part * gate.sigmoid() for part, gate in zip(found[1:], gates, strict=True)]
        return [SILU * F.silu(scalars), *opened]


class DensityNet(nn.Module):
    """Equivariant network from atoms to whitened coefficients of their density.

    Args:
        num_classes: Numbers of an atom, 50: its element, and 49 coefficients.
        in_chans: 1.
        elements: Atomic numbers that it learns.
        embedding: Numbers of an element.
        channels: Channels by angular momentum of features.
        radial: Width of the network from distances to weights.
        layers: Layers, two at least.
        cutoff: Distance of neighbours, in bohr.

    Raises:
        UsageError: Settings that it has not.

    Example:
        >>> water = torch.tensor([[[[8, 0, 0, 0], [1, 1.8, 0, 0], [1, -0.5, 1.7, 0]]]])
        >>> DensityNet()(water).shape
        torch.Size([1, 3, 50])
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        num_classes: int = 1 + WIDTH,
        in_chans: int = 1,
        elements: Sequence[int] = ELEMENTS_LEARNT,
        embedding: int = 16,
        channels: Sequence[int] = (16, 8, 6, 2, 1),
        radial: int = 16,
        layers: int = 2,
        cutoff: float = 6.0,
    ) -> None:
        super().__init__()
        if (num_classes, in_chans) != (1 + WIDTH, 1):
            raise UsageError(
                f"a density has {1 + WIDTH} numbers per atom and molecules have one channel, not "
                f"{num_classes} and {in_chans}: take data of this kit, such as --data dft-g2"
            )
        if layers < 1 or cutoff <= 0 or len(channels) != len(SHELLS) or channels[0] < 1:
            raise UsageError(
                f"a density network has at least one layer, a cutoff above 0 and channels of "
                f"{len(SHELLS)} angular momenta, some of them scalars; got {layers}, {cutoff} and "
                f"{list(channels)}"
            )
        self.num_classes, self.in_chans, self.cutoff = num_classes, in_chans, cutoff
        self.elements = tuple(int(each) for each in elements)
        self.num_features = self.head_hidden_size = channels[0]
        self.embed = nn.Linear(len(self.elements), embedding, bias=False)
        nn.init.normal_(self.embed.weight)
        widths = [(embedding, 0, 0, 0, 0), *[tuple(channels)] * layers]
        self.layers = nn.ModuleList(
            Interaction(widths[i], widths[i + 1], radial) for i in range(layers)
        )
        self.heads = nn.ModuleList(
            EquivariantLinear(channels, HYDROGEN if number == 1 else SHELLS)
            for number in self.elements
        )
        for parameter in self.heads.parameters():
            nn.init.normal_(parameter, std=0.01)
        self.register_buffer("mean", torch.zeros(len(self.elements), WIDTH))
        self.register_buffer("scale", torch.ones(len(self.elements), WIDTH))

    @torch.no_grad()
    def fit_outputs(self, labels: Tensor) -> None:
        """Set means of scalars and scales of shells, by element, from training labels.

        Args:
            labels: (molecules, atoms, 53): element, position, and whitened coefficients.

        Raises:
            UsageError: An element that it does not learn, or lacks one that it does.
        """
        rows = labels.flatten(0, 1).double()
        self._require_known(rows[:, 0])
        for number, mean, scale in zip(self.elements, self.mean, self.scale, strict=True):
            found = rows[rows[:, 0] == number, 4:]
            if not len(found):
                raise UsageError(
                    f"no training molecule has {names_of([number])}: take it out of model.options, "
                    f"elements"
                )
            begin = 0
            for momentum, count in enumerate(SHELLS):
                for _ in range(count):
                    part = slice(begin, begin + 2 * momentum + 1)
                    if momentum == 0:
                        mean[part] = found[:, part].mean(0)
                    spread = (found[:, part] - mean[part]).square().mean().sqrt()
                    scale[part] = spread.clamp(min=1e-4)
                    begin = part.stop

    def forward(self, images: Tensor) -> Tensor:
        """Compute elements and whitened coefficients (molecules, atoms, 50) of atoms.

        Args:
            images: (molecules, 1, atoms, 4): element, 0 of no atom, and position in bohr.

        Raises:
            UsageError: An element that it has not learnt.
        """
        numbers, positions = images[:, 0, :, 0], images[:, 0, :, 1:]
        self._require_known(numbers)
        there = numbers > 0
        kinds = torch.stack([numbers[there] == each for each in self.elements], dim=1)
        features = [self.embed(kinds.to(images)).unsqueeze(-1)]
        features += [features[0].new_zeros(len(kinds), 0, 2 * k + 1) for k in range(1, HIGHEST + 1)]
        pairs = self._neighbours(positions, there)
        for number, layer in enumerate(self.layers):
            found = layer(features, pairs)
            features = (
                found if number == 0 else [a + b for a, b in zip(features, found, strict=True)]
            )
        places = images.new_zeros(len(kinds), WIDTH)
        for number, head in enumerate(self.heads):
            chosen = kinds[:, number].nonzero().squeeze(1)
            if len(chosen):
                places = places.index_add(0, chosen, self._read(number, head, features, chosen))
        rows = images.new_zeros(*numbers.shape, self.num_classes)
        rows[there] = torch.cat([numbers[there].unsqueeze(1), places], dim=1)
        return rows

    def _read(
        self, number: int, head: nn.Module, features: Sequence[Tensor], chosen: Tensor
    ) -> Tensor:
        """Compute the places of all atoms of an element, (atoms, 49)."""
        found = head([part[chosen] for part in features])
        parts = []
        for part, count in zip(found, SHELLS, strict=True):
            lacking = count - part.shape[1]
            parts.append(F.pad(part, (0, 0, 0, lacking)).reshape(len(chosen), -1))
        return torch.cat(parts, dim=1) * self.scale[number] + self.mean[number]

    def _neighbours(self, positions: Tensor, there: Tensor) -> Neighbours:
        apart = positions.unsqueeze(1) - positions.unsqueeze(2)  # [m, i, j]: from i to j
        squares = apart.square().sum(-1)
        near = there.unsqueeze(1) & there.unsqueeze(2) & (squares < self.cutoff**2)
        near &= ~torch.eye(near.shape[-1], dtype=torch.bool, device=near.device)
        molecule, first, second = near.nonzero(as_tuple=True)
        place = (there.flatten().cumsum(0) - 1).view(there.shape)
        vectors = apart[molecule, first, second]
        distances = vectors.norm(dim=1, keepdim=True)
        centres = torch.linspace(NEAREST, self.cutoff, GAUSSIANS).to(vectors)
        return Neighbours(
            place[molecule, second],
            place[molecule, first],
            o3.spherical_harmonics(
                [*range(HIGHEST + 1)], vectors[:, [1, 2, 0]], True, normalization="component"
            ),
            (-0.5 * ((distances - centres) / SPREAD).square()).exp(),
            (1 + (math.pi * distances / self.cutoff).cos()) / 2,
        )

    def _require_known(self, numbers: Tensor) -> None:
        found = {int(each) for each in torch.unique(numbers).tolist()} - {0, *self.elements}
        if found:
            raise UsageError(
                f"the network has not learnt {names_of(sorted(found))}, only "
                f"{names_of(self.elements)}: train one with model.options {{elements: [1, 6, …]}}"
            )


CHANNELS: Mapping[str, tuple[int, ...]] = {
    "density_net_tiny": (16, 8, 6, 2, 1),
    "density_net_small": (32, 16, 12, 4, 2),
}
default_cfgs = generate_default_cfgs(
    {name: {"num_classes": 1 + WIDTH, "input_size": (1, 16, 4)} for name in CHANNELS}
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Any, build_model_with_cfg)
    found: nn.Module = build(DensityNet, name, pretrained, **{"channels": CHANNELS[name], **kwargs})
    return found


register_sizes(__name__, CHANNELS, _create)
