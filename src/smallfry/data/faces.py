"""Data set ``faces``: rotated and zoomed crops of the 400 Olivetti photographs of 40 people.

After the faces of Hinton and Salakhutdinov (Science 313, 2006), made for the same use, to train
auto-encoders. Their 165,600 images are a file, ``newfaces_rot_single.mat``. These differ:

- they are split by person, and nobody is on two sides; there, training and validation images
  (103,500 and 20,700) are variants of photographs of the same 30 people, and only those to test
  (41,400) are of 10 others, so that its validation images are of people known from training;
- turns and zooms are our own random ones;
- pixels stay uint8; there, they are floating-point and normalised pixel by pixel.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smallfry.data.cache import decoded
from smallfry.data.fingerprint import digest
from smallfry.data.folders import read_folder
from smallfry.data.philox import uniform
from smallfry.data.sources import (
    TEST,
    TRAIN,
    VALIDATION,
    EncodedSplit,
    Source,
)
from smallfry.errors import DataError

SIZE = 25
PHOTOGRAPH = 64  # side of a photograph
PEOPLE = {TRAIN: 25, VALIDATION: 5, TEST: 10}
PHOTOGRAPHS = 10  # of every person
VARIANTS = 414  # of every photograph
TURN = (-90.0, 90.0)  # degrees
ZOOM = (1.4, 1.8)
MARGIN = 4  # turned by 45°, a corner of the largest crop ends 0.3 pixels outside the photograph
RECIPE = 1  # changes whenever the images do, so that no old array is taken for a new one

WHO, HOW = 0, 1  # what is drawn: the people of the splits, a turn and a zoom


def read_faces(root: Path | None = None, label: str | None = None, seed: int = 0) -> Source:
    """Generate 103,500 images of 25 people to train, 20,700 of 5 to validate, 41,400 of 10 to test.

    Images are uint8, (1, 25, 25); labels are the people, 0 to 39 in every split.

    Args:
        root: A folder with the photographs, or with a subfolder ``olivetti`` of them: parquet
            shards, or one folder per person. Without one, scikit-learn has them or fetches them.
        label: Name of the column of persons, where a table has several.
        seed: Seed of the people in every split, and of all rotations and zooms.

    Raises:
        DataError: The photographs can't be reached, or are others than those.
    """
    if root is None:
        origin, pixels, people = _fetch()
    else:
        inner = root / "olivetti"
        origin, pixels, people = _read(inner if inner.is_dir() else root, label)
    total = sum(PEOPLE.values())
    if people.min(initial=0) < 0 or not np.array_equal(
        np.bincount(people, minlength=total), np.full(total, PHOTOGRAPHS)
    ):
        raise DataError(
            f"{origin}: expected the Olivetti faces, {PHOTOGRAPHS} photographs of each of {total} "
            f"people in one split, but found {len(people)} photographs of "
            f"{len(np.unique(people))} people"
        )
    in_order = np.argsort(people, kind="stable")
    pixels, people = pixels[in_order], people[in_order]
    content = digest(pixels.tobytes().hex())
    padded = np.pad(pixels, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), mode="edge")
    photographs = [Image.fromarray(photograph) for photograph in padded]

    shuffled = np.argsort(uniform(total, seed, WHO), kind="stable")
    parts = np.split(shuffled, np.cumsum(list(PEOPLE.values()))[:-1])
    splits = {
        split: _split(split, photographs, np.sort(part), content, seed)
        for split, part in zip(PEOPLE, parts, strict=True)
    }
    return Source(origin, tuple(map(str, range(total))), splits)


def vary(photograph: Image.Image, turn: float, zoom: float) -> NDArray[np.uint8]:
    """Rotate a photograph by so many degrees and crop its centre to pixels (1, 25, 25).

    The crop's side is 64 / zoom. Around the photograph is a margin of MARGIN pixels, for a corner
    of the crop, and the filters there, to find pixels in.
    """
    turned = photograph.rotate(turn, Image.Resampling.BICUBIC)
    centre, half = photograph.width / 2, PHOTOGRAPH / zoom / 2
    box = (centre - half, centre - half, centre + half, centre + half)
    # Pillow widens its filter by the reduction, so that nothing is aliased
    return np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box))[None]


def _split(
    split: str,
    photographs: list[Image.Image],
    people: NDArray[np.int64],
    content: str,
    seed: int,
) -> EncodedSplit:
    chosen = (people[:, None] * PHOTOGRAPHS + np.arange(PHOTOGRAPHS)).ravel()
    variants = VARIANTS

    def read(row: int) -> NDArray[np.uint8]:
        i, j = int(chosen[row // variants]), row % variants
        turn, zoom = uniform(2, seed, HOW, i, j)
        return vary(photographs[i], _between(TURN, turn), _between(ZOOM, zoom))

    return EncodedSplit(
        labels=np.repeat(people, PHOTOGRAPHS * variants).astype(np.int64),
        read=read,
        locate=lambda row: f"faces, {split}[{row}]",
        fingerprint=digest("faces", split, content, str(variants), str(seed), str(RECIPE)),
    )


def _between(ends: tuple[float, float], share: float) -> float:
    return float(ends[0] + (ends[1] - ends[0]) * share)


def _read(folder: Path, label: str | None) -> tuple[str, NDArray[np.uint8], NDArray[np.int64]]:
    """Read the photographs: their source, pixels (images, 64, 64), and the person on each."""
    source = read_folder(folder, label, "label")
    split = replace(source.splits[TRAIN], fingerprint="")  # so few need no cache
    pixels, unreadable, _ = decoded(split, PHOTOGRAPH, 1)
    if unreadable:
        raise DataError(unreadable[0].reason)
    return source.origin, pixels[:, 0], split.labels


def _fetch() -> tuple[str, NDArray[np.uint8], NDArray[np.int64]]:
    """Read the photographs through scikit-learn, which downloads and caches them."""
    from sklearn.datasets import fetch_olivetti_faces

    try:
        faces = fetch_olivetti_faces()
    except Exception as error:  # of the network, of a disk, or of a damaged file
        raise DataError(
            f"faces: scikit-learn can't download the Olivetti faces ({type(error).__name__}); go "
            f"online, or pass a folder with their parquet shards: --data.root DIR"
        ) from error
    pixels = np.rint(255 * faces.images).astype(np.uint8)
    return "scikit-learn", pixels, faces.target.astype(np.int64)
