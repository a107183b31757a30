"""Scenes as data sets: a sample is a Gaussian, from its position to its attributes.

Compression has no unseen Gaussians: each split has all of the scene. What differs are the views in
which a split's pictures are compared: those between the cameras of the importance are the test's.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from smallfry.data import ImageData, Split
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import DataError, UsageError
from smallfry.kits.splats.cameras import around
from smallfry.kits.splats.generate import BODIES, VERSION, generate
from smallfry.kits.splats.labels import make_labels
from smallfry.kits.splats.prepare import prepare
from smallfry.kits.splats.scene import Scene, column_names, read_scene

__all__ = ["GeneratedSettings", "SceneSettings"]

VALIDATION_VIEW, TEST_VIEW = 0.25, 0.5  # turns of the ring, of the angle between cameras


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """Settings of a scene in a PLY file, in ``data.options``.

    Args:
        prune: Share of Gaussians that are left out, those of the smallest importance.
        position_bits: 8 to 16 for each coordinate; 16 is half precision.
        views: Cameras around the scene for the importance.
        pixels: Height and width of their images.

    Raises:
        UsageError: A value out of range.
    """

    prune: float = 0.4
    position_bits: int = 12
    views: int = 8
    pixels: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise UsageError(f"data.options.prune is 0 to below 1, got {self.prune}")
        for name, least, most in (
            ("position_bits", 8, 16),
            ("views", 1, 1000),
            ("pixels", 8, 2048),
        ):
            if not least <= getattr(self, name) <= most:
                raise UsageError(
                    f"data.options.{name} is {least} to {most}, got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class GeneratedSettings(SceneSettings):
    """Settings of a generated scene, in ``data.options``.

    Args:
        gaussians: Before pruning.
        seed: Of their places.
    """

    gaussians: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 10 <= self.gaussians <= 1_000_000:
            raise UsageError(f"data.options.gaussians is 10 to 1,000,000, got {self.gaussians}")


def read_generated(name: str, wanted: Wanted) -> ImageData:
    """Generate a scene of the body in the name."""
    if wanted.root is not None:
        raise UsageError(f"{name} is generated: for a scene of yours give --data.name splats-scene")
    settings: GeneratedSettings = settings_from(GeneratedSettings, wanted.options)
    scene = generate(name.partition("-")[2], settings.gaussians, settings.seed)
    made = {"family": name, "version": VERSION, **asdict(settings)}
    return _data(name, wanted, scene, settings, made)


def read_file(name: str, wanted: Wanted) -> ImageData:
    """Read a scene from the PLY file that is the root."""
    if wanted.root is None:
        raise UsageError(f"{name} needs the PLY file of a scene: give --data.root SCENE.ply")
    settings: SceneSettings = settings_from(SceneSettings, wanted.options)
    scene = read_scene(wanted.root.expanduser())
    if not len(scene):
        raise DataError(f"{wanted.root}: the scene has no Gaussians")
    return _data(name, wanted, scene, settings, None)


def _data(
    name: str,
    wanted: Wanted,
    scene: Scene,
    settings: SceneSettings,
    generated: dict[str, Any] | None,
) -> ImageData:
    wanted.require_fixed(name, image_size=1, channels=3)
    cameras = around(scene.positions, settings.views, settings.pixels)
    found = prepare(scene, cameras, settings.prune, settings.position_bits)
    if not found.importance.any():
        raise DataError(f"{name}: no camera around the scene sees a Gaussian of it")
    codes = found.grid.codes(found.integers)
    pixels = torch.from_numpy(codes)[:, :, None, None]
    every = torch.arange(len(scene))
    kept = torch.from_numpy(found.kept).nonzero()[:, 0]

    def split(rows: torch.Tensor, view: float) -> Split:
        labels = make_labels(found.scene, codes, found.importance, found.kept, view)
        return Split(pixels, rows, labels[rows])

    return ImageData(
        name,
        "generated" if generated else str(wanted.root),
        column_names(scene.degree),
        1,
        3,
        split(kept[: wanted.limit], 0.0),
        split(every if wanted.validation else every[:0], VALIDATION_VIEW),
        split(every, TEST_VIEW),
        generated=generated,
    )


register_data([f"splats-{body}" for body in BODIES], read_generated)
register_data(("splats-scene",), read_file)
