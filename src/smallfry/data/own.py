"""Data sets made of objects in Python, written as parquet shards that every command reads."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Subset

from smallfry.data.cache import cache_folder
from smallfry.data.sources import SPLIT_NAMES, TRAIN, without_bars
from smallfry.errors import DataError, UsageError
from smallfry.io.replace import replacing
from smallfry_runtime.names import path_of

EXPECTED = (
    "expected a folder, a pair of images and labels, a torch or Hugging Face Dataset, or a mapping "
    "of these with train, and validation or test"
)

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B")
TRANSPARENT = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}  # and what holds their transparency


def is_own(data: Any) -> bool:
    """Return whether data is an object to be written, not a name or settings."""
    if isinstance(data, Mapping):
        arrays = "name" not in data and any(map(_is_array, data.values()))
        return bool(data) and ({*data} <= {*SPLIT_NAMES} or arrays)
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return sized and not isinstance(data, str)


def _is_array(value: Any) -> bool:
    """Return whether a value is of an array or a Dataset, which no setting is."""
    sized = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return sized and not isinstance(value, str | list | tuple | Mapping)


def place_of(data: Any, classes: Sequence[str] | None = None) -> str:
    """Return the name or folder of data, that of objects in the cache folder.

    Args:
        data: A name, a folder, or objects as ``write_data``.
        classes: Names of the classes where labels are numbers and objects have none themselves. A
            number is the place of its class, or its name if all names are whole numbers.

    Raises:
        UsageError, DataError: As ``write_data``.
    """
    if isinstance(data, str | Path):
        return str(data)
    parts = data.values() if isinstance(data, Mapping) else (data,)
    if any(_classes_of(part) is not None for part in parts):
        return str(keep_data(data))
    numbered = classes is not None and all(name.isdecimal() for name in classes)
    return str(keep_data(data, classes, numbered))


def keep_data(data: Any, classes: Sequence[str] | None = None, numbered: bool = False) -> Path:
    """Write data into the cache folder, once, and return its folder.

    Args:
        data: As ``write_data``.
        classes: As ``write_data``.
        numbered: Labels that are numbers are names of classes, not their places.

    Raises:
        UsageError, DataError: As ``write_data``.
    """
    tables = _tables(data, classes, numbered)
    seen = hashlib.sha256()
    for split, table in sorted(tables.items()):
        seen.update(split.encode())
        for batch in table.with_format("arrow").iter(batch_size=256):
            content = io.BytesIO()
            with pa.ipc.new_stream(content, batch.schema) as stream:
                stream.write_table(batch.combine_chunks())
            seen.update(content.getbuffer())
    folder = cache_folder() / "own" / seen.hexdigest()[:24]
    if not folder.is_dir():
        _write(tables, folder)
    return folder


def write_data(data: Any, folder: str | Path, classes: Sequence[str] | None = None) -> Path:
    """Write data as parquet shards into a new folder, which ``train`` and all commands read.

    Args:
        data: A pair of images and labels: images (images, height, width), (images, height, width,
            3) or (images, channels, height, width), uint8, or a list of Pillow images; labels,
            whole numbers or names. Or a torch Dataset of such pairs, whose ``classes`` are taken,
            or a Hugging Face Dataset with a column of images. Or a mapping of these by train,
            validation and test.
        folder: It must not exist, or be empty.
        classes: Names of the classes, where labels are numbers.

    Raises:
        UsageError: Data of another kind, or a folder that is taken.
        DataError: Images or labels that can't be used, or a folder that can't be written.
    """
    place = Path(folder).expanduser()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{place}: exists and is not an empty folder; name another")
    _write(_tables(data, classes), place)
    return place


def _write(tables: Mapping[str, Any], folder: Path) -> None:
    try:
        with replacing(folder) as new, without_bars():
            for split, table in tables.items():
                table.to_parquet(new / f"{split}-00000-of-00001.parquet")
    except OSError as error:
        raise DataError(f"{folder}: the images can't be written there ({error})") from error


def _splits(data: Any) -> dict[str, Any]:
    """Return the parts of data by split."""
    if not is_own(data):
        raise _unusable(data)
    if not isinstance(data, Mapping):
        return {TRAIN: data}
    parts = {str(SPLIT_NAMES.get(name, name)): part for name, part in data.items()}
    if len(parts) < len(data) or not {TRAIN} <= {*parts} <= {*SPLIT_NAMES.values()}:
        raise UsageError(
            f"data has the splits {', '.join(data)}: expected train, and each once; images and "
            "labels are a tuple"
        )
    return parts


def _unusable(data: Any) -> UsageError:
    return UsageError(f"data of the type {type(data).__name__}: {EXPECTED}")


def _tables(data: Any, classes: Sequence[str] | None, numbered: bool = False) -> dict[str, Any]:
    """Convert data to tables of Hugging Face ``datasets`` by split.

    Where labels are numbers without names, those of all splits together are the classes.
    """
    import datasets

    tables, pairs = {}, {}
    for split, part in _splits(data).items():
        if isinstance(part, datasets.Dataset):
            tables[split] = _whole(part)
        else:
            pairs[split] = (*_encoded(part), _classes_of(part))
    every = [label for _, labels, _ in pairs.values() for label in labels]
    for split, (images, labels, own) in pairs.items():
        if numbered:
            labels = _names_of(labels, classes or ())
        kind = _kind(datasets, labels, every, classes or own)
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        columns = {"image": images, "label": labels}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    return tables


def _whole(table: Any) -> Any:
    """Return a table of Hugging Face ``datasets`` with its images in it, not in files beside it."""
    import datasets
    from datasets.table import embed_table_storage

    columns = [name for name, k in table.features.items() if isinstance(k, datasets.Image)]
    if not columns:
        there = ", ".join(table.features)
        raise DataError(f"the data set has no column of images; there are {there}")
    cells = (pc.struct_field(table.data.column(name), "bytes") for name in columns)
    if not any(each.null_count for each in cells):
        return table
    try:
        with without_bars():
            found = table.with_format("arrow").map(
                embed_table_storage,
                batched=True,
                batch_size=256,
                features=table.features,
                load_from_cache_file=False,  # which does not look at the files
            )
    except OSError as error:
        raise DataError(f"an image of the data set can't be read ({error})") from error
    return found.with_format(None)


def _encoded(part: Any) -> tuple[list[dict[str, Any]], list[int | str]]:
    """Return the encoded images and the labels of a split."""
    if isinstance(part, tuple) and len(part) == 2:
        images, labels = part
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images, but {len(labels)} labels")
        pairs: Iterable[tuple[Any, Any]] = zip(images, labels, strict=True)
    elif hasattr(part, "__getitem__") and hasattr(part, "__len__"):
        pairs = _samples(part)
    else:
        raise _unusable(part)
    encoded, found = [], []
    for number, (image, label) in enumerate(pairs):
        encoded.append({"bytes": _png(image, f"image {number}"), "path": None})
        found.append(_label(label, number))
    if not found:
        raise DataError("the data holds no images")
    return encoded, found


def _classes_of(data: Any) -> Sequence[str] | None:
    """Return the classes of a torch Dataset, or of the one that it is a subset of."""
    while isinstance(data, Subset):
        data = data.dataset
    return getattr(data, "classes", None)


def _samples(data: Any) -> Iterator[tuple[Any, Any]]:
    for number in range(len(data)):
        try:
            sample = data[number]
        except KeyError as error:  # of a table, which has no samples by number
            raise _unusable(data) from error
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(
                f"sample {number} is no pair of an image and a label but of the type "
                f"{type(sample).__name__}; all images and all labels are a tuple: (images, labels)"
            )
        yield sample[0], sample[1]


def _kind(
    datasets: Any,
    labels: Sequence[int | str],
    every: Sequence[int | str],
    classes: Sequence[str] | None,
) -> Any:
    """Return the type of the column of labels of a split, by those of all."""
    if len({type(label) for label in labels}) > 1:
        raise DataError("some labels are numbers and some are names; take one of them")
    if isinstance(labels[0], str):
        return datasets.Value("string")
    numbers = sorted({int(label) for label in every if not isinstance(label, str)})
    lowest, highest = numbers[0], numbers[-1]
    if classes is not None and not 0 <= lowest <= highest < len(classes):
        raise _beyond(lowest, highest, len(classes))
    names = [str(name) for name in classes or numbers]
    if classes is None and (lowest, highest) != (0, len(names) - 1):
        raise DataError(
            f"labels are {lowest} to {highest}, of which {len(names)} occur: expected 0 to "
            f"{len(names) - 1}, or classes, or names as labels"
        )
    return datasets.ClassLabel(names=names)


def _names_of(labels: list[int | str], classes: Sequence[str]) -> list[int | str]:
    """Convert numbers to the names of classes that are these; names stay."""
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) < len(labels):  # a mixture is refused later
        return labels
    names = {int(name): name for name in classes}
    if not {*numbers} <= {*names}:
        raise _beyond(min(numbers), max(numbers), len(names))
    return [names[number] for number in numbers]


def _beyond(lowest: Any, highest: Any, classes: int) -> DataError:
    return DataError(f"labels are {lowest} to {highest}, and there are {classes} classes")


def _label(label: Any, number: int) -> int | str:
    if isinstance(label, str):
        return label
    value = np.asarray(label)
    if value.size != 1 or value.dtype.kind not in "biu":
        several = value.size > 1 and "; several classes an image need a table of files and labels"
        raise DataError(
            f"label {number} must be a whole number or a name, not {label!r}{several or ''}"
        )
    return int(value.reshape(()))


def as_picture(image: Any, where: str) -> Image.Image:
    """Convert pixels to an image of Pillow.

    Args:
        image: Of Pillow, or uint8 (height, width), (height, width, 1 or 3) or (1 or 3, height,
            width), as an array or a tensor.
        where: Its name in messages.

    Raises:
        DataError: Pixels of another type or shape.
    """
    if isinstance(image, Image.Image):
        return image
    pixels: NDArray[Any] = np.asarray(image)
    if pixels.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: of the type {type(image).__name__}; expected a picture of Pillow, or pixels "
            "as an array or tensor"
        )
    if pixels.dtype != np.uint8:
        scaled = "; of images from 0 to 1, (255 * images).round().astype('uint8')"
        raise DataError(
            f"{where}: pixels are {pixels.dtype}, expected uint8 from 0 to 255"
            f"{scaled if pixels.dtype.kind == 'f' else ''}"
        )
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)) or not pixels.size:
        raise DataError(
            f"{where}: has the shape {tuple(np.shape(image))}, expected height × width, and 1 or 3 "
            "channels first or last"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _for_png(picture: Image.Image, where: str) -> Image.Image:
    """Convert a picture of colours that PNG can't hold, such as those of print."""
    if picture.mode in PNG_MODES:
        return picture
    if picture.mode != "F":  # of floating-point numbers on any scale
        with suppress(ValueError):  # there is no way from some modes
            return picture.convert(TRANSPARENT.get(picture.mode, "RGB"))
    raise DataError(f"{where}: a picture of the mode {picture.mode}; convert it to RGB or grey")


def _png(image: Any, where: str) -> bytes:
    if isinstance(image, str | Path):
        try:
            return path_of(str(image)).read_bytes()
        except OSError as error:
            raise DataError(f"{image}: can't be read ({error})") from error
    encoded = io.BytesIO()
    _for_png(as_picture(image, where), where).save(encoded, format="png", compress_level=1)
    return encoded.getvalue()
