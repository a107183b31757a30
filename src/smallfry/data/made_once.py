"""Generated samples on disk: made once, and mapped into memory afterwards."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data.cache import cache_folder
from smallfry.data.fingerprint import digest
from smallfry.data.splits import Split
from smallfry.data.threads import in_threads
from smallfry.errors import DataError
from smallfry.io.replace import write_whole

__all__ = ["made_once"]

Sample = tuple[NDArray[Any], NDArray[Any]]
AT_ONCE = 256  # samples between two looks at the list


def made_once(mark: str, count: int, make: Callable[[int], Sample]) -> Split:
    """Make samples, or take them from the cache; see ``cache_folder``.

    Args:
        mark: Everything that the samples are a function of, with the generator's version.
        count: Of samples, one at least.
        make: From a sample's number to its pixels and its label, of one shape and type each.

    Raises:
        DataError: They can't be kept there.
    """
    folder = cache_folder()
    files = [folder / f"{digest(mark, str(count))}-{kind}.npy" for kind in ("pixels", "labels")]
    kept = [_mapped(file, count) for file in files]
    if kept[0] is None or kept[1] is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = _made(files, count, make)
        except OSError as error:
            raise DataError(
                f"{folder}: generated samples can't be kept there ({error}); free space, or set "
                "another folder in the environment variable SMALLFRY_CACHE"
            ) from error
    pixels, labels = (torch.from_numpy(each) for each in kept)
    return Split(pixels, torch.arange(count), labels)


def _made(files: list[Path], count: int, make: Callable[[int], Sample]) -> list[Any]:
    first = make(0)
    arrays = [np.empty((count, *each.shape), each.dtype) for each in first]
    for start in range(0, count, AT_ONCE):
        stop = min(count, start + AT_ONCE)
        for number, sample in enumerate(in_threads(make, start, stop), start):
            for array, values in zip(arrays, sample, strict=True):
                array[number] = values
    for file, array in zip(files, arrays, strict=True):
        content = io.BytesIO()
        np.save(content, array)
        write_whole(file, content.getvalue())
    return [_mapped(file, count) for file in files]


def _mapped(file: Path, count: int) -> NDArray[Any] | None:
    """Map a file into memory; None if it isn't there, or isn't what was written."""
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile):
        return None
    fits = isinstance(array, np.ndarray) and array.shape[:1] == (count,)
    return array if fits else None
