"""Compression of a scene: networks fitted to attributes, then through the rasteriser.

    importance, pruning, clusters (k-means), one network each by importance-weighted squared error;
    then all of them by (1 − λ) L1 + λ (1 − SSIM) + 0.01 · (difference of Fourier amplitudes)
    against the original's views, λ = 0.2

Source: Tang et al., arXiv 2503.23162; the weight of the last term, weights of few bits, and the
coding of the file are this project's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.errors import UsageError
from smallfry.kits.splats.artifact import CompressedScene
from smallfry.kits.splats.field import WEIGHT_BITS, SplatField, clusters_of
from smallfry.kits.splats.prepare import Prepared, prepare
from smallfry.kits.splats.render import Camera, rasterise
from smallfry.kits.splats.scene import Scene

__all__ = ["NeuralSplats", "compress", "view_loss"]

SIMILARITY, AMPLITUDES = 0.2, 0.01  # λ, and the weight of Fourier amplitudes
BATCH = 8192  # Gaussians of a step of the fit


@dataclass(frozen=True, kw_only=True)
class NeuralSplats:
    """Settings of a compression; the paper's are ``NeuralSplats.paper()``.

    Args:
        clusters: Networks. The paper has 6 to 10 for objects, 40 to 140 for rooms and streets.
        width: Of hidden layers.
        frequencies: Of the code of positions.
        layers: Linear layers of a network.
        prune: Share of Gaussians left out.
        position_bits: 8 to 16; 16 is half precision.
        weight_bits: 4 to 8, or 16 for half precision.
        is_weighted: The fit is weighted by importance.
        iterations: Steps of the fit, over at most 8,192 Gaussians each.
        finetune: Steps through the rasteriser, over one view each.
        lr: Learning rate of Adam for the fit; falls to 0 as a cosine.
        finetune_lr: The same of the second part.
        seed: Of initial weights, clusters, and the order of views.

    Raises:
        UsageError: A value out of range.
    """

    clusters: int = 4
    width: int = 24
    frequencies: int = 5
    layers: int = 5
    prune: float = 0.4
    position_bits: int = 12
    weight_bits: int = 6
    is_weighted: bool = True
    iterations: int = 1000
    finetune: int = 200
    lr: float = 1e-2
    finetune_lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {"clusters": 1024, "width": 1024, "layers": 16}
        for name, most in ranges.items():
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is 1 to {most}, got {getattr(self, name)}")
        if not 0 <= self.frequencies <= 16:
            raise UsageError(f"frequencies is 0 to 16, got {self.frequencies}")
        if self.weight_bits not in WEIGHT_BITS:
            raise UsageError(f"weight_bits is one of {WEIGHT_BITS}, got {self.weight_bits}")
        rates = self.lr > 0 and self.finetune_lr > 0
        if min(self.iterations, self.finetune) < 0 or not rates:
            raise UsageError("iterations and finetune are at least 0, and learning rates above 0")

    @classmethod
    def paper(cls, clusters: int = 8) -> "NeuralSplats":
        """Return the sizes and steps of the paper, for scenes of 50,000 Gaussians and more."""
        return cls(
            clusters=clusters,
            width=128,
            frequencies=10,
            position_bits=16,
            weight_bits=16,
            iterations=60_000,
            finetune=25_000,
            lr=1e-3,
            finetune_lr=1e-4,
        )


def compress(
    scene: Scene,
    cameras: Sequence[Camera],
    settings: NeuralSplats | None = None,
    progress: Callable[[str, int, float], None] | None = None,
) -> CompressedScene:
    """Compress a scene.

    Args:
        scene: The scene.
        cameras: Views for importance and fine-tuning. Score with others.
        settings: Settings; default those for scenes of some thousand Gaussians.
        progress: Called with ``fit`` or ``finetune``, the step and its loss.

    Raises:
        UsageError: No camera, no Gaussian, or settings that do not fit.

    Example:
        >>> from smallfry.kits.splats.cameras import ring
        >>> from smallfry.kits.splats.codec import NeuralSplats, compress
        >>> from smallfry.kits.splats.generate import generate
        >>> small = NeuralSplats(clusters=1, width=8, iterations=5, finetune=1)
        >>> len(compress(generate("torus", 100), ring(2, size=16, focal=16), small).scene())
        60
    """
    settings = settings or NeuralSplats()
    found = prepare(scene, cameras, settings.prune, settings.position_bits)
    rows, counts = _ordered(found, settings)
    attributes = torch.from_numpy(found.scene.attributes[rows])
    weights = found.importance[rows] if settings.is_weighted else np.ones(len(rows))
    if not weights.any():
        raise UsageError("no camera sees a Gaussian of the scene: place them around it")
    codes = torch.from_numpy(found.grid.codes(found.integers[rows]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        field = SplatField(
            len(counts),
            settings.width,
            settings.frequencies,
            settings.layers,
            attributes.shape[1],
        )
        groups = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        field.fit_scales(attributes, groups)
        _fit(
            field,
            codes,
            attributes,
            torch.from_numpy(weights / weights.mean()),
            groups,
            settings,
            progress,
        )
        positions = torch.from_numpy(found.grid.positions(codes.numpy()))
        _finetune(field, codes, positions, counts, scene, cameras, settings, progress)
    return CompressedScene.of(
        field,
        counts,
        found.grid,
        found.integers[rows],
        settings.weight_bits,
        asdict(settings),
        len(scene),
    )


def _ordered(found: Prepared, settings: NeuralSplats) -> tuple[NDArray[np.int64], list[int]]:
    """Order the kept Gaussians by cluster and position, and count those of each cluster."""
    kept = np.flatnonzero(found.kept)
    attributes = found.scene.attributes[kept].astype(np.float64)
    codes = found.grid.codes(found.integers[kept]).astype(np.float64)
    features = [
        (each - each.mean(0)) / each.std(0).clip(1e-9) / math.sqrt(each.shape[1])
        for each in (attributes, codes)
    ]
    groups = clusters_of(np.concatenate(features, 1), settings.clusters, settings.seed)
    return ordered_rows(kept, groups, found.integers[kept])


def ordered_rows(
    rows: NDArray[np.int64], groups: NDArray[np.int64], integers: NDArray[np.uint16]
) -> tuple[NDArray[np.int64], list[int]]:
    """Sort rows by cluster, then by position; return the clusters' counts too."""
    order = np.lexsort((*integers.T[::-1], groups))
    return rows[order], np.bincount(groups).tolist()


def _fit(
    field: SplatField,
    codes: Tensor,
    attributes: Tensor,
    weights: Tensor,
    groups: Tensor,
    settings: NeuralSplats,
    progress: Callable[[str, int, float], None] | None,
) -> None:
    """Fit all networks to standardised attributes."""
    optimizer = torch.optim.Adam(field.parameters(), settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.iterations))
    wanted = (attributes - field.output_mean[groups]) / field.output_std[groups]
    for step in range(settings.iterations):
        rows = torch.arange(len(codes))
        if len(codes) > BATCH:
            rows = torch.randperm(len(codes))[:BATCH].sort().values
        counts = torch.bincount(groups[rows], minlength=field.clusters).tolist()
        own = groups[rows]
        answers = field.decode(codes[rows], counts) - field.output_mean[own]
        errors = (answers / field.output_std[own] - wanted[rows]).square().mean(1)
        loss = (errors * weights[rows]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress("fit", step, loss.item())


def _finetune(
    field: SplatField,
    codes: Tensor,
    positions: Tensor,
    counts: Sequence[int],
    scene: Scene,
    cameras: Sequence[Camera],
    settings: NeuralSplats,
    progress: Callable[[str, int, float], None] | None,
) -> None:
    """Train all networks through the rasteriser, with the rounding of the file."""
    if not settings.finetune:
        return
    whole = torch.tensor(scene.positions), torch.tensor(scene.attributes)
    with torch.no_grad():
        views = [rasterise(*whole, camera).float() for camera in cameras]
    optimizer = torch.optim.Adam(field.parameters(), settings.finetune_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.finetune)
    order = torch.randint(len(cameras), (settings.finetune,)).tolist()
    for step, view in enumerate(order):
        attributes = field.decode(codes, counts, settings.weight_bits)
        loss = view_loss(rasterise(positions, attributes, cameras[view]), views[view])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress("finetune", step, loss.item())


def view_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Compute the loss of a view (height, width, 3), see the module."""
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    images = [each.movedim(2, 0)[None] for each in (found, wanted)]
    smallest = min(found.shape[:2])
    window = min(11, smallest - 1 + smallest % 2)  # odd, and no larger than the image
    alike = similarity(
        images[0], images[1], gaussian_kernel=False, kernel_size=window, data_range=1.0
    )
    assert isinstance(alike, Tensor)
    amplitudes = [torch.fft.fft2(each, norm="ortho").abs() for each in images]
    loss: Tensor = (
        (1 - SIMILARITY) * (found - wanted).abs().mean()
        + SIMILARITY * (1 - alike)
        + AMPLITUDES * (amplitudes[0] - amplitudes[1]).abs().mean()
    )
    return loss
