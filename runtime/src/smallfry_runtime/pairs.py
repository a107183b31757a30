"""Pairs of views of two cameras: their files, and the array that a network takes of them.

Views keep their scale, so that disparities stay exact: they are cut in the middle, or filled up at
the right and bottom.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.arrays import is_array_file
from smallfry_runtime.decoders import decoder_of, has_decoder
from smallfry_runtime.errors import DataError
from smallfry_runtime.frames import Frame
from smallfry_runtime.images import Encoded, decode, header
from smallfry_runtime.inputs import InnerSize, InputImage, find_images, in_order, is_image
from smallfry_runtime.names import path_of

__all__ = ["find_pairs", "fitted", "pair_up", "read_view", "takes_pairs", "with_sizes"]

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
    return pair_up(_views(inputs, stdin, frame), frame)


def pair_up(images: Iterable[InputImage], frame: Frame) -> Iterator[InputImage]:
    """Join pictures two by two, each left view before its right one, to files of NumPy.

    Arrays, and what couldn't be read, stay as they are.

    Args:
        images: Pictures and files of ``numpy.save``, or their bytes.
        frame: Size that views are brought to.
    """
    left: InputImage | None = None
    for image in images:
        if not _is_picture(image):
            yield image
        elif left is None:
            left = image
        else:
            yield _pair(left, image, frame)
            left = None
    if left is not None:
        yield InputImage(
            left.name,
            None,
            f"{left.name}: a left view without its right one; give pictures two by two, or a "
            "folder with left and right",
        )


def with_sizes(
    task: str, settings: Mapping[str, Any] | None, sizes: Sequence[InnerSize], frame: Frame
) -> Mapping[str, Any] | None:
    """Add the sizes of pairs in their frame to settings of decoding, unless those have sizes.

    Args:
        task: Of the model; if it takes no pairs, its settings stay as they are.
        settings: Of the task's decoder.
        sizes: Height and width of each; None: those of the frame.
        frame: Size that views are brought to.
    """
    if not takes_pairs(task):
        return settings
    found = [each or (frame.height, frame.width) for each in sizes]
    return {"sizes": found, **(settings or {})}


def read_view(picture: Encoded, name: str | None = None) -> NDArray[np.uint8]:
    """Read a view in its own size, (3, height, width).

    Args:
        picture: A file, or its bytes.
        name: Its name in messages; default that of the file.

    Raises:
        DataError: It isn't a readable picture.
    """
    name = str(picture) if name is None else name
    width, height, _ = header(picture, name)
    return decode(picture, name, (height, width), 3)


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


def _views(inputs: Sequence[str], stdin: BinaryIO, frame: Frame) -> Iterator[InputImage]:
    """Yield single views and arrays of files, and pairs of folders."""
    for given in inputs:
        folder = path_of(given)
        if given and folder.is_dir():
            yield from _in_folder(folder, frame)
        else:
            yield from find_images([given], stdin)


def _is_picture(image: InputImage) -> bool:
    """Return whether an input is a picture, or is meant to be one."""
    if isinstance(image.encoded, Path):
        return is_image(image.encoded.name)
    return image.encoded is not None and not is_array_file(image.encoded)


def _in_folder(folder: Path, frame: Frame) -> Iterator[InputImage]:
    """Yield the pairs of a folder in one of the layouts."""
    if all((folder / name).is_file() for name in SCENE):
        left, right = (_view(folder / name) for name in SCENE)
        yield _pair(left, right, frame)
        return
    for names in FOLDERS:
        if all((folder / name).is_dir() for name in names):
            try:
                lefts, rights = (_by_stem(folder / name) for name in names)
            except (OSError, DataError) as error:
                yield InputImage(str(folder), None, f"{folder}: can't be read ({error})")
                return
            for stem in in_order({*lefts} | {*rights}):
                if stem in lefts and stem in rights:
                    yield _pair(_view(lefts[stem]), _view(rights[stem]), frame)
                else:
                    alone = str(lefts.get(stem) or rights[stem])
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


def _view(file: Path) -> InputImage:
    return InputImage(str(file), file)


def _pair(left: InputImage, right: InputImage, frame: Frame) -> InputImage:
    """Encode a pair as a file of ``numpy.save``."""
    name = f"{left.name}, {right.name}"
    try:
        views = [
            read_view(each.encoded, each.name)
            for each in (left, right)
            if each.encoded is not None  # nothing is a picture without its bytes
        ]
        if views[0].shape != views[1].shape:
            sizes = " and ".join("×".join(map(str, view.shape[1:])) for view in views)
            raise DataError(f"{name}: views of {sizes}; expected two of one size")
    except DataError as error:
        return InputImage(name, None, str(error))
    stream = BytesIO()
    np.save(stream, fitted(np.concatenate(views), frame.height, frame.width), allow_pickle=False)
    height, width = views[0].shape[1:]
    inner = min(height, frame.height), min(width, frame.width)
    return InputImage(name, stream.getvalue(), inner=inner)
