"""Traverses as a data set: references to train on, and a query to calibrate and to test with.

    places-traverse   generated
    places-folder     one folder of images a traverse, in the order of their names; the last is the
                      query, and the images of a place have the same position in each

The calibration places are at the end of the route. They are the validation split, whose queries are
no part of the test.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split
from smallfry.data.cache import decoded
from smallfry.data.fingerprint import digest, stamp
from smallfry.data.registered import SHARES, Wanted, register_data, settings_from
from smallfry.data.sources import EncodedSplit
from smallfry.errors import DataError, UsageError
from smallfry.io.natural import natural
from smallfry.kits.places.traverse import VERSION, TraverseSettings, draw_traverse
from smallfry_runtime.frames import frame_of

__all__ = ["FolderSettings"]

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm")


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """Settings of folders of traverses, in ``data.options``.

    Args:
        query: Name of the query's folder; "" for the last.
        calibration: Places at the end of the route to calibrate with; 0 for half, 50 at most.
        side: Side of the images.
    """

    query: str = ""
    calibration: int = 0
    side: int = 16


def read_generated(name: str, wanted: Wanted) -> ImageData:
    """Generate traverses; a UsageError of settings that do not apply."""
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root: see places-folder")
    settings: TraverseSettings = settings_from(TraverseSettings, wanted.options)
    _require(name, wanted, settings.side)
    drawn = [draw_traverse(settings, number) for number in range(settings.references + 1)]
    generated = {"family": name, "version": VERSION, **asdict(settings)}
    return _to_data(name, "generated", np.stack(drawn), settings.calibration, generated)


def read_folder(name: str, wanted: Wanted) -> ImageData:
    """Read folders of traverses.

    Raises:
        UsageError: No folder, or a setting that does not apply.
        DataError: Fewer than two traverses, traverses of unequal length, or an unreadable image.
    """
    if wanted.root is None:
        raise UsageError(f"{name} needs the folder of the traverses: give data.root")
    settings: FolderSettings = settings_from(FolderSettings, wanted.options)
    _require(name, wanted, settings.side)
    root = wanted.root.expanduser()
    folders = [place for place in root.glob("*") if place.is_dir()]
    folders.sort(key=lambda place: natural(place.name))
    query = settings.query or (folders[-1].name if folders else "")
    ordered = [f for f in folders if f.name != query] + [f for f in folders if f.name == query]
    if len(ordered) < 2 or ordered[-1].name != query:
        raise DataError(
            f"{root}: needs a folder for each traverse, one reference and the query "
            f"'{query or '…'}' at least; it has {', '.join(f.name for f in folders) or 'none'}"
        )
    files = [_images(folder) for folder in ordered]
    lengths = {folder.name: len(each) for folder, each in zip(ordered, files, strict=True)}
    if len({*lengths.values()}) != 1 or len(files[0]) < 2:
        counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise DataError(
            f"{root}: traverses of unequal length ({counts}): each place needs one image in every "
            "traverse, in the same order, and two places are the least"
        )
    places = len(files[0])
    if not 0 <= settings.calibration < places:
        raise UsageError(
            f"data.options.calibration is 0 to {places - 1}, got {settings.calibration}: of "
            f"{places} places one is tested at least"
        )
    calibration = settings.calibration or min(50, places // 2)
    traverses = np.stack([_decoded(each, settings.side) for each in files])
    return _to_data(str(root), str(root), traverses, calibration, None)


def _to_data(
    name: str,
    origin: str,
    traverses: NDArray[np.uint8],
    calibration: int,
    generated: Mapping[str, Any] | None,
) -> ImageData:
    """Build the data set of traverses (traverses, places, side, side), the last of queries."""
    count, places, side, _ = traverses.shape
    every = Split(
        torch.from_numpy(traverses.reshape(-1, 1, side, side)),
        torch.arange(count * places),
        torch.arange(places).repeat(count),
    )
    first = (count - 1) * places
    rows = torch.arange(count * places)
    return ImageData(
        name,
        origin,
        tuple(map(str, range(places))),
        side,
        1,
        every.take(rows[:first]),
        every.take(rows[first + places - calibration :]),
        every.take(rows[first : first + places - calibration]),
        _locate=dict.fromkeys(
            ("train", "validation", "test"),
            lambda row: f"{origin}: traverse {row // places}, place {row % places}",
        ),
        generated=generated,
        resize="squash",
    )


def _require(name: str, wanted: Wanted, side: int) -> None:
    """Refuse settings that traverses do not have."""
    size = wanted.images.get("image_size")
    if size not in (None, side, (side, side), [side, side]):
        raise UsageError(f"{name} has images of {side} pixels: set data.options.side")
    wanted.require_fixed(name, channels=1, image_size=size, resize="squash")
    if wanted.limit is not None:
        raise UsageError(f"{name} needs whole traverses: leave out data.limit")
    if (wanted.validation, wanted.test) != SHARES:
        raise UsageError(
            f"{name} holds out places for the choice of neurons, not a share of images: leave out "
            "data.validation and data.test, and set data.options.calibration"
        )


def _images(folder: Path) -> list[Path]:
    """Find the images of a traverse, in the order of the numbers in their names."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in ENDINGS]
    return sorted(files, key=lambda file: natural(file.name))


def _decoded(files: list[Path], side: int) -> NDArray[np.uint8]:
    """Decode the images of a traverse, (places, side, side)."""
    encoded = EncodedSplit(
        np.zeros(len(files), np.int64),
        lambda i: files[i],
        lambda i: str(files[i]),
        digest("places-folder", *map(stamp, files)),
    )
    images, unreadable, _ = decoded(encoded, frame_of(side, "squash"), 1)
    if unreadable:
        raise DataError(f"{unreadable[0].reason}: a traverse needs all its images")
    return np.asarray(images)[:, 0]


register_data(("places-traverse",), read_generated)
register_data(("places-folder",), read_folder)
