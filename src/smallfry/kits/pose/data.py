"""Data sets of poses: generated renders, and folders in BOP's form."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split
from smallfry.data.fingerprint import stamp
from smallfry.data.made_once import made_once
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import UsageError
from smallfry.kits.pose.mesh import VERSION as SHAPES
from smallfry.kits.pose.mesh import Mesh, generated_mesh, keypoints, read_mesh
from smallfry.kits.pose.scenes import VERSION, SceneSettings, draw_scene
from smallfry.kits.pose.truth import pack
from smallfry_runtime.pnp import project

__all__ = ["model_options", "object_of", "read_objects"]

SIZE, CELLS, POINTS = 128, 32, 128


def object_of(settings: SceneSettings) -> Mesh:
    """Return the object of generated pictures.

    Raises:
        DataError: A file that is no closed mesh.
    """
    if not settings.mesh:
        return generated_mesh(settings.shape)
    file = Path(settings.mesh).expanduser()
    return read_mesh(file, 0.001 if settings.millimetres else 1.0)


def model_options(
    mesh: str | Path, millimetres: bool = False, points: int = POINTS
) -> dict[str, object]:
    """Return ``model.options`` for an object of one's own: its keypoints.

    Args:
        mesh: A closed mesh: PLY, OBJ or STL.
        millimetres: The file's unit is a millimetre, not a metre.
        points: Keypoints.

    Raises:
        DataError: The file is no closed mesh.
    """
    read = read_mesh(Path(mesh).expanduser(), 0.001 if millimetres else 1.0)
    return {"keypoints": keypoints(read, points).tolist()}


def read_objects(name: str, wanted: Wanted) -> ImageData:
    """Generate pictures of an object, or take them from the cache.

    Args:
        name: The name of the data set.
        wanted: Its options, and shares held out for validation and testing.

    Raises:
        UsageError: A setting that does not apply.
        DataError: A file that is no closed mesh.
    """
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root: see pose-bop")
    settings: SceneSettings = settings_from(SceneSettings, wanted.options)
    wanted.require_fixed(name, image_size=wanted.images["image_size"], channels=3)
    if wanted.images["image_size"] not in (None, SIZE, (SIZE, SIZE)):
        raise UsageError(f"{name} has crops of {SIZE}×{SIZE} pixels: leave out data.image_size")
    mesh = object_of(settings)
    tested = max(1, round(wanted.test * settings.pictures))
    everything = _split(settings, mesh, "train", settings.pictures - tested)
    count = round(wanted.validation * len(everything))
    chosen = torch.arange(len(everything))
    return ImageData(
        name,
        "generated",
        (Path(settings.mesh).stem if settings.mesh else f"shape {settings.shape}",),
        SIZE,
        3,
        everything.take(chosen[count:][: wanted.limit]),
        everything.take(chosen[:count]),
        _split(settings, mesh, "test", tested),
        generated={
            "family": name,
            "version": VERSION,
            **asdict(settings),
            "mesh": Path(settings.mesh).name,
        },
    )


def _split(settings: SceneSettings, mesh: Mesh, split: str, count: int) -> Split:
    points = keypoints(mesh, POINTS).astype(np.float32).astype(np.float64)
    step = SIZE // CELLS

    def make(number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        scene = draw_scene(settings, mesh, split, number, SIZE)
        masks = np.stack([scene.seen, scene.whole])[:, step // 2 :: step, step // 2 :: step]
        places = project(points, scene.pose, scene.camera)
        truth = pack(scene.pose, scene.camera, scene.crop, settings.symmetric, places, masks)
        return scene.image, truth

    drawn = {k: v for k, v in asdict(settings).items() if k != "pictures"}
    file = stamp(Path(settings.mesh).expanduser()) if settings.mesh else ""
    return made_once(f"pose-objects {VERSION} {SHAPES} {split} {drawn!r} {file}", count, make)


register_data(("pose-objects",), read_objects)
