"""Pairs of one's own: a plain folder, KITTI's layout, and Middlebury's.

    stereo-folder        left/ right/ disparity/ (16-bit PNG or PFM), perhaps labels/, classes.txt
    stereo-kitti         training/image_2, image_3, disp_occ_0, disp_noc_0, perhaps semantic; or
                         2012's colored_0, colored_1, disp_occ, disp_noc
    stereo-middlebury    SCENE/im0.png, im1.png, disp0.pfm, calib.txt, perhaps mask0nocc.png

Pairs are reduced by a whole factor, and then cut in the middle or filled up at the right and bottom
to one size, so that disparities stay exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.data.sources import TEST, TRAIN, VALIDATION
from smallfry.errors import DataError, UsageError
from smallfry.kits.stereo.files import (
    read_calibration,
    read_disparity,
    read_labels,
)
from smallfry.kits.stereo.truth import KAPPA, UNKNOWN, class_weights, pack, unpack, weighted
from smallfry_runtime.pairs import fitted, read_view

__all__ = ["FolderSettings", "read_pairs"]

Floats = NDArray[np.float64]
PICTURES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".tif", ".tiff")
SIDE = 32  # that sides are multiples of
SCENE = ("im0.png", "im1.png", "disp0.pfm", "calib.txt")
KITTI = (
    ("image_2", "image_3", "disp_occ_0", "disp_noc_0"),
    ("colored_0", "colored_1", "disp_occ", "disp_noc"),
)


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """Settings of folders of pairs, in ``data.options``.

    Args:
        reduce: Pictures are reduced by this factor, 1, 2, …: disparities, too.
        kappa: κ of the classes' weights; KITTI's is 2.
        focal: Focal length in pixels, where there is no file of it.
        baseline: Distance of the cameras in metres.

    Raises:
        UsageError: A value out of range.
    """

    reduce: int = 1
    kappa: float = KAPPA
    focal: float = 0.0
    baseline: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.reduce <= 64:
            raise UsageError(f"data.options.reduce is 1 to 64, got {self.reduce}")
        if min(self.focal, self.baseline) < 0 or (self.focal > 0) != (self.baseline > 0):
            raise UsageError(
                "data.options.focal and baseline are both above 0, or both left out, got "
                f"{self.focal:g} and {self.baseline:g}"
            )


class Files(NamedTuple):
    """Files of a pair."""

    left: Path
    right: Path
    disparity: Path
    labels: Path | None = None
    seen: Path | None = None  # disparities of points that both views see
    mask: Path | None = None  # of such points: 255
    calibration: Path | None = None


class Sample(NamedTuple):
    """Pair with its truth, in the file's size."""

    views: NDArray[np.uint8]  # (6, height, width)
    disparity: Floats
    hidden: NDArray[np.bool_]
    labels: NDArray[np.int64]
    scale: float
    offset: float


def read_pairs(name: str, wanted: Wanted) -> ImageData:
    """Read a folder of pairs in the layout of the data set's name.

    Args:
        name: ``stereo-folder``, ``stereo-kitti`` or ``stereo-middlebury``.
        wanted: Its folder as ``root``, the size in ``data.image_size`` (default that of the largest
            picture), and shares held out.

    Raises:
        UsageError: No folder, or a setting that does not apply.
        DataError: A missing or unreadable file, or views of unequal sizes.
    """
    if wanted.root is None:
        raise UsageError(f"{name} needs the folder of the pairs: give data.root")
    settings: FolderSettings = settings_from(FolderSettings, wanted.options)
    size = wanted.images["image_size"]
    wanted.require_fixed(name, image_size=size, channels=6)
    folder = wanted.root.expanduser()
    pairs = LAYOUTS[name](folder)
    if not pairs:
        raise DataError(f"{folder}: has no pairs in the layout of {name}; see docs/kits/stereo.md")
    classes = _classes(folder, pairs)
    samples = [_sample(pair, settings, len(classes)) for pair in pairs]
    most = np.max([sample.disparity.shape for sample in samples], axis=0)
    height, width = (size, size) if isinstance(size, int) else size or -(-most // SIDE) * SIDE
    if height % SIDE or width % SIDE:
        raise UsageError(f"data.image_size of {name} has multiples of {SIDE}, not {height} {width}")
    fitted = [_fitted(sample, int(height), int(width)) for sample in samples]
    pixels = torch.from_numpy(np.stack([each.views for each in fitted]))
    rows = torch.from_numpy(
        np.stack([pack(*each[1:4], len(classes), each.scale, each.offset) for each in fitted])
    )
    places = _divided(len(pairs), wanted)
    if any(pair.labels for pair in pairs):
        labels = unpack(rows[places[TRAIN]]).labels
        counts = torch.bincount(labels[labels >= 0], minlength=len(classes)).double()
        shares = (counts / counts.sum().clamp(min=1)).numpy()
        rows = weighted(rows, class_weights(shares, settings.kappa))
    everything = Split(pixels, torch.arange(len(pairs)), rows)
    return ImageData(
        str(folder),
        name,
        classes,
        (int(height), int(width)),
        6,
        everything.take(places[TRAIN][: wanted.limit]),
        everything.take(places[VALIDATION]),
        everything.take(places[TEST]),
        _locate={split: lambda row: str(pairs[row].left) for split in (TRAIN, VALIDATION, TEST)},
    )


def _plain(folder: Path) -> list[Files]:
    left, right = _pictures(folder / "left"), _pictures(folder / "right")
    _require_same(folder / "left", left, folder / "right", right)
    disparity = _pictures(folder / "disparity", (".png", ".pfm"))
    _require_same(folder / "left", left, folder / "disparity", disparity)
    labels = _pictures(folder / "labels", (".png",)) if (folder / "labels").is_dir() else {}
    return [
        Files(left[stem], right[stem], disparity[stem], labels.get(stem)) for stem in sorted(left)
    ]


def _kitti(folder: Path) -> list[Files]:
    base = folder / "training" if (folder / "training").is_dir() else folder
    for names in KITTI:
        if (base / names[0]).is_dir():
            left, right, disparity, seen = (base / name for name in names)
            truth = _pictures(disparity, (".png",))
            there = [{k: v for k, v in _pictures(f).items() if k in truth} for f in (left, right)]
            _require_same(left, there[0], right, there[1])
            _require_same(disparity, truth, left, there[0])
            labels = _pictures(base / "semantic") if (base / "semantic").is_dir() else {}
            both = _pictures(seen, (".png",)) if seen.is_dir() else {}
            return [
                Files(there[0][s], there[1][s], truth[s], labels.get(s), both.get(s))
                for s in sorted(truth)
            ]
    return []


def _middlebury(folder: Path) -> list[Files]:
    scenes = [folder] if (folder / "im0.png").is_file() else sorted(folder.glob("*/"))
    found = []
    for scene in scenes:
        names = tuple(scene / name for name in SCENE)
        lacking = [file.name for file in names if not file.is_file()]
        if len(lacking) == len(names):
            continue
        if lacking:
            raise DataError(f"{scene}: lacks {' and '.join(lacking)} of a scene of Middlebury")
        mask = scene / "mask0nocc.png"
        kept = mask if mask.is_file() else None
        left, right, disparity, calibration = names
        found.append(Files(left, right, disparity, None, None, kept, calibration))
    return found


LAYOUTS: dict[str, Callable[[Path], list[Files]]] = {
    "stereo-folder": _plain,
    "stereo-kitti": _kitti,
    "stereo-middlebury": _middlebury,
}


def _pictures(folder: Path, endings: Sequence[str] = PICTURES) -> dict[str, Path]:
    """Return the pictures of a folder by their names without endings, each of which is one's."""
    if not folder.is_dir():
        raise DataError(f"{folder}: is not there; it should hold pictures of the pairs")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in endings)
    found = {file.stem: file for file in files}
    if again := [file.name for file in files if found[file.stem] != file]:
        other = found[Path(again[0]).stem].name
        raise DataError(f"{folder}: {again[0]} and {other} are of one name: remove one of them")
    return found


def _require_same(one: Path, first: dict[str, Path], other: Path, second: dict[str, Path]) -> None:
    if lacking := sorted({*first} - {*second}):
        raise DataError(
            f"{one / first[lacking[0]].name}: has no file of that name in {other}: add it, or "
            "remove this one"
        )
    if surplus := sorted({*second} - {*first}):
        raise DataError(
            f"{other / second[surplus[0]].name}: has no file of that name in {one}: add it, or "
            "remove this one"
        )


def _classes(folder: Path, pairs: Sequence[Files]) -> tuple[str, ...]:
    """Return the names of classes: of ``classes.txt``, one a line, or by number."""
    file = folder / "classes.txt"
    if file.is_file():
        try:
            lines = file.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: can't be read as UTF-8 text ({error})") from error
        names = tuple(line.strip() for line in lines if line.strip())
        if len({*names}) != len(names) or not names:
            raise DataError(f"{file}: expected one class name per line, each once")
        return names
    largest = max((int(read_labels(p.labels, 0).max()) for p in pairs if p.labels), default=0)
    return tuple(f"class {number}" for number in range(max(0, largest) + 1))


def _sample(pair: Files, settings: FolderSettings, classes: int) -> Sample:
    left, right = read_view(pair.left), read_view(pair.right)
    disparity = read_disparity(pair.disparity)
    size = left.shape[1:]
    shapes = {pair.right: right.shape[1:], pair.disparity: disparity.shape}
    labels = np.full(size, UNKNOWN, np.int64)
    if pair.labels:
        labels = read_labels(pair.labels, classes)
        shapes[pair.labels] = labels.shape
    hidden = np.zeros(size, bool)
    if pair.seen:
        both = read_disparity(pair.seen)
        shapes[pair.seen] = both.shape
        hidden = (disparity > 0) & (both == 0) if both.shape == size else hidden
    elif pair.mask:
        seen = read_labels(pair.mask, 0) == UNKNOWN  # 255
        shapes[pair.mask] = seen.shape
        hidden = ~seen if seen.shape == size else hidden
    for file, shape in shapes.items():
        if shape != size:
            raise DataError(
                f"{file}: is {shape[0]}×{shape[1]} pixels, and {pair.left} is {size[0]}×{size[1]}: "
                "both views and their truth must be of one size: rectify or cut them alike"
            )
    scale, offset = settings.focal * settings.baseline, 0.0
    if pair.calibration:
        scale, offset = read_calibration(pair.calibration)
    whole = Sample(np.concatenate([left, right]), disparity, hidden, labels, scale, offset)
    return _reduced(whole, settings.reduce)


def _reduced(sample: Sample, factor: int) -> Sample:
    """Reduce a pair: means of blocks of pixels and of known disparities, labels of the corner."""
    if factor == 1:
        return sample
    height, width = (side // factor for side in sample.disparity.shape)
    if min(height, width) < SIDE:
        raise UsageError(f"data.options.reduce {factor} leaves less than {SIDE} pixels per side")

    def blocks(values: NDArray[Any]) -> NDArray[Any]:
        cut = values[..., : height * factor, : width * factor]
        return cut.reshape(*cut.shape[:-2], height, factor, width, factor)

    known = blocks(sample.disparity > 0).sum(axis=(-3, -1))
    total = blocks(sample.disparity).sum(axis=(-3, -1))
    disparity = np.where(2 * known >= factor**2, total / np.maximum(known, 1) / factor, 0.0)
    return Sample(
        np.rint(blocks(sample.views).mean(axis=(-3, -1))).astype(np.uint8),
        disparity,
        2 * blocks(sample.hidden).sum(axis=(-3, -1)) > factor**2,
        blocks(sample.labels)[:, factor // 2, :, factor // 2],
        sample.scale / factor,
        sample.offset / factor,
    )


def _fitted(sample: Sample, height: int, width: int) -> Sample:
    """Cut the middle of a pair, and fill it up at the right and bottom."""
    return Sample(
        fitted(sample.views, height, width),
        fitted(sample.disparity, height, width),
        fitted(sample.hidden, height, width, False),
        fitted(sample.labels, height, width, UNKNOWN),
        sample.scale,
        sample.offset,
    )


def _divided(count: int, wanted: Wanted) -> dict[str, torch.Tensor]:
    """Divide the pairs at random, at least one for testing if a share is held out."""
    generator = torch.Generator().manual_seed(wanted.split_seed)
    order = torch.randperm(count, generator=generator)
    tested = min(count - 1, max(1, round(wanted.test * count))) if wanted.test else 0
    rest = count - tested
    validated = min(rest - 1, max(1, round(wanted.validation * rest))) if wanted.validation else 0
    parts = torch.split(order, [tested, validated, rest - validated])
    return dict(zip((TEST, VALIDATION, TRAIN), (p.sort().values for p in parts), strict=True))


register_data(LAYOUTS, read_pairs)
