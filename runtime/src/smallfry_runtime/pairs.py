"""Pairs of views of two cameras: their files, and the array that a network takes of them.

Views keep their scale, so that disparities stay exact: they are cut in the middle, or filled up at
the right and bottom.
"""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import decoder_of, has_decoder
from smallfry_runtime.errors import DataError
from smallfry_runtime.frames import Frame
from smallfry_runtime.images import decode, header
from smallfry_runtime.inputs import InputImage, find_images, in_order, is_image
from smallfry_runtime.names import path_of

__all__ = ["find_pairs", "fitted", "read_view", "takes_pairs"]

FOLDERS = (("left", "right"), ("image_2", "image_3"), ("colored_0", "colored_1"))  # KITTI's, too
SCENE = ("im0.png", "im1.png")  # of Middlebury


def takes_pairs(task: str) -> bool:
    """Return whether inputs of a task are pairs of views."""
    return has_decoder(task) and getattr(decoder_of(task), "VIEWS", 1) == 2


def find_pairs(inputs: Sequence[str], stdin: BinaryIO, frame: Frame) -> Iterator[InputImage]:
    """Find pairs of views, as files of NumPy.

    Args:
        inputs: Files of ``numpy.save``; pictures, each left view before its right one; and folders
            with ``left`` and ``right``, KITTI's, and scenes of Middlebury.
        stdin: Standard input, of ``-``.
        frame: Size that views are brought to.
    """
    left: Path | None = None
    for given in inputs:
        folder = path_of(given)
        if given and folder.is_dir():
            yield from _in_folder(folder, frame)
            continue
        for image in find_images([given], stdin):
            if not isinstance(image.encoded, Path) or not is_image(image.encoded.name):
                yield image
            elif left is None:
                left = image.encoded
            else:
                yield _pair(left, image.encoded, frame)
                left = None
    if left is not None:
        yield InputImage(
            str(left),
            None,
            f"{left}: a left view without its right one; give pictures two by two, or a folder "
            "with left and right",
        )


def read_view(file: Path) -> NDArray[np.uint8]:
    """Read a view in its own size, (3, height, width).

    Raises:
        DataError: It isn't a readable picture.
    """
    width, height, _ = header(file, str(file))
    return decode(file, str(file), (height, width), 3)


def fitted(values: NDArray[Any], height: int, width: int, empty: int = 0) -> NDArray[Any]:
    """Cut the middle of maps (…, height, width), and fill them up at the right and bottom.

    Example:
        >>> fitted(np.arange(8).reshape(1, 2, 4), 3, 2, empty=9).tolist()
        [[[1, 2], [5, 6], [9, 9]]]
    """
    own = values.shape[-2:]
    top, start = (max(0, (side - new) // 2) for side, new in zip(own, (height, width), strict=True))
    kept = values[..., top : top + height, start : start + width]
    spare = ((0, height - kept.shape[-2]), (0, width - kept.shape[-1]))
    return np.pad(kept, (*((0, 0),) * (values.ndim - 2), *spare), constant_values=empty)


def _in_folder(folder: Path, frame: Frame) -> Iterator[InputImage]:
    """Yield the pairs of a folder in one of the layouts."""
    if all((folder / name).is_file() for name in SCENE):
        yield _pair(folder / SCENE[0], folder / SCENE[1], frame)
        return
    for names in FOLDERS:
        if all((folder / name).is_dir() for name in names):
            try:
                left, right = (_by_stem(folder / name) for name in names)
            except (OSError, DataError) as error:
                yield InputImage(str(folder), None, f"{folder}: can't be read ({error})")
                return
            for stem in in_order({*left} | {*right}):
                if stem in left and stem in right:
                    yield _pair(left[stem], right[stem], frame)
                else:
                    alone = str(left.get(stem) or right[stem])
                    yield InputImage(alone, None, f"{alone}: without the other view of its pair")
            return
    reason = "expected the folders left and right, or the files im0.png and im1.png, in it"
    yield InputImage(str(folder), None, f"{folder}: has no pairs; {reason}")


def _by_stem(folder: Path) -> dict[str, Path]:
    files = [file for file in folder.iterdir() if is_image(file.name)]
    found = {file.stem: file for file in files}
    if len(found) < len(files):
        raise DataError(f"two pictures in {folder.name} are of one name but for their endings")
    return found


def _pair(left: Path, right: Path, frame: Frame) -> InputImage:
    """Encode a pair as a file of ``numpy.save``."""
    name = f"{left}, {right}"
    try:
        views = [read_view(left), read_view(right)]
        if views[0].shape != views[1].shape:
            sizes = " and ".join("×".join(map(str, view.shape[1:])) for view in views)
            raise DataError(f"{name}: views of {sizes}; expected two of one size")
    except DataError as error:
        return InputImage(name, None, str(error))
    stream = BytesIO()
    np.save(stream, fitted(np.concatenate(views), frame.height, frame.width), allow_pickle=False)
    return InputImage(name, stream.getvalue())
