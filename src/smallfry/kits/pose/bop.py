"""Poses of a folder in the form of the BOP challenge (Hodaň et al., ECCV 2018).

    models/obj_000001.ply               meshes, in millimetres, and models_info.json with symmetries
    SPLIT/000001/scene_camera.json      cam_K of each picture, nine numbers
    SPLIT/000001/scene_gt.json          obj_id, cam_R_m2c, cam_t_m2c (millimetres) of each object
    SPLIT/000001/scene_gt_info.json     bbox_obj and visib_fract, if it is there
    SPLIT/000001/rgb/000000.png         pictures, or gray/
    SPLIT/000001/mask_visib/000000_000000.png and mask/, if they are there

A set has one object. Crops are around the object's box, grown by half, without jitter.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from smallfry.data import ImageData, Split
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.data.sources import TEST, TRAIN, VALIDATION
from smallfry.errors import DataError, UsageError
from smallfry.kits.pose.data import CELLS, POINTS, SIZE
from smallfry.kits.pose.mesh import keypoints, read_mesh
from smallfry.kits.pose.render import crop_camera, rasterise
from smallfry.kits.pose.scenes import LARGER
from smallfry.kits.pose.truth import pack
from smallfry_runtime.images import decode, header
from smallfry_runtime.pnp import Camera, Pose, project

__all__ = ["BopSettings", "read_bop"]

Floats = NDArray[np.float64]
PICTURES = ("rgb", "gray")
ENDINGS = (".png", ".jpg", ".tif")
NEAREST = 0.001  # metres from the camera to the nearest point of an object
MOST_SIDE = 8192  # pixels of the square around an object


@dataclass(frozen=True, kw_only=True)
class BopSettings:
    """Settings of a folder in BOP's form, in ``data.options``.

    Args:
        object: Number of the object.
        split: Folder of the training scenes.
        test_split: Folder of the test scenes; "" holds out a share of ``split``.
        seen: Least share of the object that is seen in a picture, where it is known.

    Raises:
        UsageError: A value out of range.
    """

    object: int = 1
    split: str = "train_pbr"
    test_split: str = ""
    seen: float = 0.1

    def __post_init__(self) -> None:
        if self.object < 0 or not 0 <= self.seen <= 1:
            raise UsageError(
                "data.options.object is a number from 0, and seen is 0 to 1, got "
                f"{self.object} and {self.seen:g}"
            )


class View(NamedTuple):
    """Object in a picture."""

    picture: Path
    pose: Pose
    camera: Camera
    mask: Path | None  # what is seen
    whole: Path | None


def read_bop(name: str, wanted: Wanted) -> ImageData:
    """Read the views of one object.

    Args:
        name: The name of the data set.
        wanted: Its folder as ``root``, its options, and shares held out.

    Raises:
        UsageError: No folder, or a setting that does not apply.
        DataError: A missing file, a camera without intrinsics, or a mesh that is not closed.
    """
    if wanted.root is None:
        raise UsageError(f"{name} needs the folder of the set: give data.root")
    settings: BopSettings = settings_from(BopSettings, wanted.options)
    wanted.require_fixed(name, image_size=wanted.images["image_size"], channels=3)
    if wanted.images["image_size"] not in (None, SIZE, (SIZE, SIZE)):
        raise UsageError(f"{name} has crops of {SIZE}×{SIZE} pixels: leave out data.image_size")
    folder = wanted.root.expanduser()
    label = f"obj_{settings.object:06d}"
    mesh = read_mesh(folder / "models" / f"{label}.ply", scale=0.001)
    info = folder / "models" / "models_info.json"
    about = _json(info).get(str(settings.object), {}) if info.is_file() else {}
    if not isinstance(about, dict):
        raise DataError(f"{info}: has no entries for object {settings.object}")
    symmetric = bool(about.get("symmetries_discrete") or about.get("symmetries_continuous"))
    points = keypoints(mesh, POINTS).astype(np.float32).astype(np.float64)

    def read(split: str) -> Split:
        views = list(_views(folder / split, settings))
        if not views:
            raise DataError(f"{folder / split}: has no view of object {settings.object}")
        made = []
        for view in views:
            crop = _crop(mesh.vertices, view)
            image, masks = _cut(view, crop)
            if masks is None:
                render = rasterise(
                    mesh, view.pose, crop_camera(view.camera, crop, CELLS), CELLS, CELLS
                )
                masks = np.repeat((render.triangle >= 0)[None], 2, axis=0)
            places = project(points, view.pose, view.camera)
            made.append((image, pack(view.pose, view.camera, crop, symmetric, places, masks)))
        images, rows = (torch.from_numpy(np.stack(each)) for each in zip(*made, strict=True))
        return Split(images, torch.arange(len(made)), rows)

    everything = read(settings.split)
    generator = torch.Generator().manual_seed(wanted.split_seed)
    order = torch.randperm(len(everything), generator=generator)
    tested = 0 if settings.test_split else round(wanted.test * len(order))
    count = round(wanted.validation * (len(order) - tested))
    held, checked, kept = torch.split(order, [tested, count, len(order) - tested - count])
    test = read(settings.test_split) if settings.test_split else everything.take(held)
    return ImageData(
        str(folder),
        name,
        (label,),
        SIZE,
        3,
        everything.take(kept[: wanted.limit]),
        everything.take(checked),
        test,
        _locate={part: lambda row: f"{folder}, view {row}" for part in (TRAIN, VALIDATION, TEST)},
    )


def _views(folder: Path, settings: BopSettings) -> Iterator[View]:
    if not folder.is_dir():
        raise DataError(f"{folder}: is not there; name a folder of scenes in data.options.split")
    for scene in sorted(folder.glob("[0-9]*/")):
        cameras, truth = (_json(scene / f"scene_{kind}.json") for kind in ("camera", "gt"))
        file = scene / "scene_gt_info.json"
        info = _json(file) if file.is_file() else {}
        for key in sorted(truth, key=lambda key: _number(key, scene)):
            where = f"{scene}, picture {key}"
            entries = _objects(truth[key], where)
            about = _objects(info[key], where) if key in info else [{}] * len(entries)
            if len(about) != len(entries):
                raise DataError(
                    f"{where}: scene_gt.json has {len(entries)} objects, and scene_gt_info.json "
                    f"{len(about)}"
                )
            for number, (entry, details) in enumerate(zip(entries, about, strict=True)):
                if entry.get("obj_id") != settings.object:
                    continue
                if not _numbers([seen := details.get("visib_fract", 1.0)], 1):
                    raise DataError(f"{where}: its visib_fract is no number: {seen!r}")
                if seen < settings.seen:
                    continue
                stem = f"{int(key):06d}_{number:06d}.png"
                masks = [scene / kind / stem for kind in ("mask_visib", "mask")]
                yield View(
                    _picture(scene, int(key)),
                    _pose(entry, where),
                    _camera(cameras.get(key, {}), where),
                    *(mask if mask.is_file() else None for mask in masks),
                )


def _number(key: str, scene: Path) -> int:
    """Read the number of a picture."""
    if not key.isdecimal():
        raise DataError(f"{scene}: scene_gt.json has entries by numbers of pictures, not '{key}'")
    return int(key)


def _objects(entries: Any, where: str) -> list[dict[str, Any]]:
    """Require a list of objects, of a picture."""
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise DataError(f"{where}: needs a list with an entry for each object")
    return entries


def _picture(scene: Path, number: int) -> Path:
    for kind in PICTURES:
        for ending in ENDINGS:
            file = scene / kind / f"{number:06d}{ending}"
            if file.is_file():
                return file
    raise DataError(f"{scene}: has no picture {number:06d} in rgb or gray")


def _camera(entry: Any, where: str) -> Camera:
    """Read the intrinsics of a camera."""
    values = entry.get("cam_K") if isinstance(entry, dict) else None
    if not _numbers(values, 9) or values[0] <= 0 or values[4] <= 0:
        raise DataError(
            f"{where}: its camera has no intrinsics: scene_camera.json needs cam_K, nine numbers "
            "by rows, with focal lengths above 0"
        )
    return Camera(float(values[0]), float(values[4]), float(values[2]), float(values[5]))


def _pose(entry: Any, where: str) -> Pose:
    turn, shift = entry.get("cam_R_m2c"), entry.get("cam_t_m2c")
    if not _numbers(turn, 9) or not _numbers(shift, 3):
        raise DataError(f"{where}: needs cam_R_m2c of nine numbers and cam_t_m2c of three")
    rotation = np.array(turn, float).reshape(3, 3)
    is_mirrored = np.linalg.det(rotation) < 0
    if is_mirrored or np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3:
        raise DataError(f"{where}: its cam_R_m2c is no rotation")
    if shift[2] <= 0:
        raise DataError(f"{where}: its cam_t_m2c is behind the camera: the third number is depth")
    return Pose(rotation, np.array(shift, float) / 1000)


def _numbers(values: Any, count: int) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and np.isfinite(v) for v in values)
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: can't be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: has no entries by the numbers of pictures")
    return found


def _crop(vertices: Floats, view: View) -> tuple[int, int, int]:
    """Return the square around the object's box: first column, first row and side.

    Raises:
        DataError: A part of the object is behind the camera, or its box beyond any picture.
    """
    depths = (vertices @ view.pose.rotation.T + view.pose.translation)[:, 2]
    if depths.min() < NEAREST:
        raise DataError(
            f"{view.picture}: a part of the object is {-depths.min():.3g} m behind the camera; "
            "correct its cam_t_m2c, in millimetres, or leave the picture out"
        )
    places = project(vertices, view.pose, view.camera)
    low, high = places.min(axis=0), places.max(axis=0)
    side = max(8, round(LARGER * float((high - low).max())))
    if side > MOST_SIDE:
        raise DataError(
            f"{view.picture}: the object has a box of {side} pixels; correct its "
            "cam_K, or its cam_t_m2c, in millimetres, or leave the picture out"
        )
    first = np.rint((low + high) / 2 - side / 2).astype(int)
    return int(first[0]), int(first[1]), side


def _cut(
    view: View, crop: tuple[int, int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Cut a picture, black outside it, and its masks if there are any."""
    x, y, side = crop
    box = (x, y, x + side, y + side)
    width, height, _ = header(view.picture, str(view.picture))
    whole = decode(view.picture, str(view.picture), (height, width), 3).transpose(1, 2, 0)
    cut = Image.fromarray(whole).crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    image = np.asarray(cut).transpose(2, 0, 1)
    if view.mask is None:
        return image, None
    masks = []
    for file in (view.mask, view.whole or view.mask):
        if header(file, str(file))[:2] != (width, height):
            raise DataError(f"{file}: is not of the size of its picture, {view.picture}")
        mask = Image.fromarray(decode(file, str(file), (height, width), 1)[0]).crop(box)
        masks.append(np.asarray(mask.resize((CELLS, CELLS), Image.Resampling.NEAREST)) > 127)
    return image, np.stack(masks)


register_data(("pose-bop",), read_bop)
