"""Data loading: a name or a folder in, decoded splits with class names out."""

import hashlib
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smallfry.data.bit_depth import sampled_depth
from smallfry.data.decoded import (
    Decoding,
    decode_held_out,
    decode_training,
    require_labels,
)
from smallfry.data.fingerprint import digest, stamp
from smallfry.data.folders import folders_in
from smallfry.data.image_data import ImageData
from smallfry.data.label_files import LabelColumns, read_label_file
from smallfry.data.labels import with_known_labels
from smallfry.data.named import (
    NAMED,
    NOTHING_TO_TELL_APART,
    find_folder,
    find_source,
)
from smallfry.data.registered import Wanted, find_reader
from smallfry.data.several_labels import LabelForm, find_several, load_several
from smallfry.data.shards import WINDOW
from smallfry.data.sources import (
    TEST,
    TRAIN,
    VALIDATION,
    EncodedSplit,
    Source,
)
from smallfry.data.splits import Split, hold_out, take_some
from smallfry.data.stream import ShardPixels, readable_rows
from smallfry.errors import AccessError, DataError, SmallfryWarning, UsageError
from smallfry_runtime.frames import Frame, ImageSize, Resize, frame_of
from smallfry_runtime.images import FULL_DEPTH, header

log = logging.getLogger(__name__)

LARGEST_NATIVE_SIZE = 64  # larger images are brought to DEFAULT_SIZE unless a size is asked for
DEFAULT_SIZE = 32
SAMPLED = 256  # images looked at to find the native size and the number of channels
LARGEST_DECODED = 2**34  # bytes of decoded training images that are put into the cache folder
MOST_HELD_OUT = 50_000  # images taken from streamed ones to validate or to test


def load_data(
    name: str = "digits",
    root: str | Path | None = None,
    *,
    image_size: ImageSize | None = None,
    resize: Resize = "crop",
    channels: int | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    split_seed: int = 0,
    limit: int | None = None,
    label: str | None = None,
    labels: str | Path | None = None,
    image_column: str | None = None,
    split_column: str | None = None,
    skip_unreadable: bool = False,
    min_classes: int = 2,
    stream: bool | None = None,
    window: int = WINDOW,
    remove_duplicates: bool = False,
    bit_depth: int | None = None,
    several_labels: bool = False,
    label_columns: Sequence[str] = (),
    label_separator: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> ImageData:
    """Load a data set.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist``; ``curves`` or
            ``faces``, for auto-encoders; or a folder with parquet shards, WebDataset tar files or
            one folder per class (with or without train, validation and test folders around them).
        root: Folder of a named data set; without one, the local cache and then the hub are asked.
        image_size: Side of the images in pixels, or height and width; default the native size of
            square images up to 64, else 32. Other images are resized.
        resize: How pictures of another shape become such images: ``crop`` at their centre,
            ``letterbox`` with black borders, or ``squash``.
        channels: 1 (grey) or 3 (RGB); default 1 if all images are grey.
        validation: Share of the training images held out if the source has no validation split.
        test: Share of the training images held out if the source has no test split.
        split_seed: Seed of both held-out shares, which are stratified by class.
        limit: Use only so many training images, stratified by class; no others are decoded, but
            with ``skip_unreadable``, as unreadable ones are not counted.
        label: Name of the label column, where a table has several.
        labels: CSV or JSON-lines file of a folder's labels; see ``label_files.read_label_file``.
        image_column: Its column of image files; without it, the column of images in parquet shards.
        split_column: Its column of splits.
        skip_unreadable: Leave unreadable images out with a warning instead of stopping.
        min_classes: Minimum number of classes; 1 where the labels don't matter, as with an
            auto-encoder.
        stream: Read training images from their shards when they are needed, instead of decoding
            all of them into the cache folder once; default if that could take more than 16 GiB.
            Validation and test images are decoded once all the same; at most 50,000 each are
            held out from streamed training images.
        window: Streamed images are shuffled among so many, in blocks from all over the shards;
            a process holds as many encoded images.
        remove_duplicates: Leave out training images that have several labels, or that are
            validation or test images too, and validation images that are test images too.
        bit_depth: Bits of the values in images of more than 8 bits per channel, such as 12, whose
            values 0 to 4,095 become 0 to 255; default the smallest of 8, 10, 12, 14 and 16 that
            has the values of all images, or of 4,096 streamed ones, with a warning below 16.
        several_labels: Images may have several classes, and labels are (images, classes), 0 or 1;
            from the file of labels, or from class folders that share images.
        label_columns: Columns of 0 and 1 in the file of labels, one for each class.
        label_separator: Between classes in the label column; default the one of | ; , in use.
        options: Settings of a generated data set, or of a kit's.

    Raises:
        UsageError: An unknown name, an impossible option, or classes wanted of ``curves`` or
            ``faces``, which have none to learn.
        DataError: A source that can't be reached or used.

    Example:
        >>> from smallfry.data import load_data
        >>> data = load_data("digits", limit=100)
        >>> data.image_size, data.channels, len(data.train), data.test_count
        (8, 1, 100, 359)
    """
    frame = None if image_size is None else frame_of(image_size, resize, "data.image_size")
    reader = find_reader(name)
    _check_options(None if reader else channels, validation, test, limit, window, bit_depth)
    place = None if root is None else Path(root)
    if reader is not None:
        if image_column is not None:
            raise UsageError(f"data.image_column is of a folder's tables, not of {name}")
        of_images = {
            "image_size": None if frame is None else frame.size,
            "resize": resize,
            "channels": channels,
            "label": label,
            "stream": stream,
            "bit_depth": bit_depth,
        }
        shares = (validation, test, split_seed, limit)
        return reader(name, Wanted(place, options or {}, *shares, of_images))
    if options:
        raise UsageError(f"data.options are of generated data sets, and {name} is none")
    if min_classes > 1 and name in NOTHING_TO_TELL_APART:
        raise UsageError(
            f"{name} has no classes to distinguish: {NOTHING_TO_TELL_APART[name]}; it is meant "
            f"for auto-encoders, load_data('{name}', min_classes=1); a folder of that name is "
            f"./{name}"
        )
    columns = LabelColumns(image_column, label, split_column)
    if several_labels:
        _require_several(name, bool(stream), remove_duplicates, image_column, labels)
        form = LabelForm(tuple(label_columns), label_separator)
        file = None if labels is None else Path(labels)
        images = find_several(find_folder(name, place), file, columns, form)
        frame, channels = _geometry(images.encoded, frame, channels)
        return load_several(
            *(name, frame._replace(resize=resize), channels, images),
            validation=validation,
            test=test,
            split_seed=split_seed,
            limit=limit,
            skip_unreadable=skip_unreadable,
            bit_depth=bit_depth,
        )
    if stream is None:
        above: float = LARGEST_DECODED // math.prod((frame or frame_of(64)).shape(channels or 3))
    else:
        above = 0 if stream else math.inf
    if labels is None:
        source = find_source(name, place, label, above, skip_unreadable, image_column)
    else:
        source = read_label_file(find_folder(name, place), Path(labels), columns)
    source = with_known_labels(source)
    _require_classes(source, min_classes)
    encoded = source.splits[TRAIN]
    frame, channels = _geometry(encoded, frame, channels)
    size = frame._replace(resize=resize)
    decoding = Decoding(size, channels, len(source.classes), skip_unreadable, bit_depth)
    streamed = encoded.shards is not None and len(encoded.labels) > above
    _check_streaming(source, streamed, bool(stream), remove_duplicates)

    partly = not streamed and limit is not None and not skip_unreadable
    if streamed:
        if bit_depth is None:
            decoding = decoding._replace(bit_depth=sampled_depth(encoded))
        train = _stream(encoded, decoding, window)
    elif partly:
        train = _undecoded(encoded, decoding.classes)
    else:
        others = [other for kind, other in source.splits.items() if kind != TRAIN]
        train, decoding = decode_training(encoded, others, decoding)
    if min_classes > 1 and not remove_duplicates:
        _warn_of_missing_classes(source, train)

    train, held_out = _part(source, TEST, train, test, split_seed)
    train, held = _part(source, VALIDATION, train, validation, split_seed + 1)
    if limit is not None and limit < len(train):
        train = take_some(train, limit, split_seed + 2)
    if partly:
        held, held_out = (
            encoded.take(part.rows.numpy()) if isinstance(part, Split) else part
            for part in (held, held_out)
        )
        encoded = encoded.take(train.rows.numpy())
        others = [part for part in (held, held_out) if isinstance(part, EncodedSplit)]
        train, decoding = decode_training(encoded, others, decoding)

    locate = {
        split: part.locate if isinstance(part, EncodedSplit) else encoded.locate
        for split, part in {TRAIN: encoded, VALIDATION: held, TEST: held_out}.items()
    }
    if isinstance(held, EncodedSplit):
        held = decode_held_out(held, decoding)
    data = ImageData(
        name,
        source.origin,
        source.classes,
        size.size,
        channels,
        train,
        held,
        held_out,
        skip_unreadable,
        source.spelled,
        locate,
        decoding.bit_depth,
        resize=resize,
    )
    if not remove_duplicates:
        return data
    data = data.without_duplicates()
    if min_classes > 1:
        _warn_of_missing_classes(source, data.train, "without duplicates, ")
    return data


def _check_streaming(source: Source, streamed: bool, wanted: bool, deduplicated: bool) -> None:
    """Refuse to stream a source without shards, and to find duplicates in streamed images."""
    if wanted and not streamed:
        raise UsageError(
            f"data.stream needs a folder of parquet or tar files, which {source.origin} is not; "
            f"remove the option"
        )
    if streamed and deduplicated:
        raise UsageError(
            "data.remove_duplicates compares decoded images, but data.stream decodes none before "
            "training; remove one of the two"
        )


def _undecoded(split: EncodedSplit, classes: int) -> Split:
    """Return rows and labels without pixels; they determine which images are used."""
    require_labels(split, classes)
    rows = torch.arange(len(split.labels))
    return Split(torch.empty(0), rows, torch.from_numpy(split.labels))


def _part(
    source: Source, kind: str, train: Split, share: float, seed: int
) -> tuple[Split, Split | EncodedSplit]:
    """Return the training images, and the source's split of a kind, or a share held out."""
    if kind in source.splits:
        return train, source.splits[kind]
    return _hold_out(train, share, seed, kind)


def _hold_out(
    split: Split, share: float, seed: int, what: str
) -> tuple[Split, Split | EncodedSplit]:
    """Hold out a split; a small one of streamed images is left to be decoded separately."""
    pixels = split.pixels
    if not isinstance(pixels, ShardPixels):
        return hold_out(split, share, seed)
    most = MOST_HELD_OUT / max(1, len(split))
    if share > most:
        log.info("holding out %d images for %s, not %.0f %%", MOST_HELD_OUT, what, 100 * share)
    kept, held = hold_out(split, min(share, most), seed)
    rows, shards = held.rows.numpy(), pixels.shards
    which = hashlib.sha256(rows.tobytes()).hexdigest()
    name = digest(shards.column, shards.mark, which, *map(stamp, shards.files))
    encoded = EncodedSplit(
        held.labels.numpy(),
        lambda i: pixels.reader.read_one(int(rows[i])),
        lambda i: shards.locate(int(rows[i])),
        name,
    )
    return kept, encoded


def _stream(split: EncodedSplit, decoding: Decoding, window: int) -> Split:
    """Open a split whose images stay in their shards."""
    assert split.shards is not None
    size, channels, _, skip_unreadable, bit_depth = decoding
    pixels = ShardPixels(split.shards, size, channels, window, bit_depth)
    rows = readable_rows(pixels, skip_unreadable)
    return Split(pixels, rows, torch.from_numpy(split.labels)[rows])


def _check_options(
    channels: int | None,
    validation: float,
    test: float,
    limit: int | None,
    window: int,
    bit_depth: int | None,
) -> None:
    for option, share in {"validation": validation, "test": test}.items():
        if not 0 <= share < 1:
            raise UsageError(f"data.{option} must be in [0, 1), got {share}")
    if channels not in (None, 1, 3):
        raise UsageError(f"data.channels must be 1 (grey) or 3 (RGB), got {channels}")
    if bit_depth is not None and not 1 <= bit_depth <= FULL_DEPTH:
        raise UsageError(f"data.bit_depth must be 1 to {FULL_DEPTH}, got {bit_depth}")
    for option, number in {"limit": limit, "window": window}.items():
        if number is not None and number < 1:
            raise UsageError(f"data.{option} must be at least 1, got {number}")


def _require_several(
    name: str,
    stream: bool,
    remove_duplicates: bool,
    image_column: str | None,
    labels: str | Path | None,
) -> None:
    """Require a folder, and options that apply to images with several classes."""
    if stream or remove_duplicates or name in NAMED:
        refused = "data.stream" if stream else "data.remove_duplicates"
        raise UsageError(
            f"data.several_labels reads a folder of images, without "
            f"{refused if name not in NAMED else f'named data such as {name}'}"
        )
    if image_column is not None and labels is None:
        raise UsageError(
            "data.image_column is of the file data.labels where images have several classes"
        )


def _require_classes(source: Source, least: int) -> None:
    """Require a number of classes; the error may point to a folder inside."""
    count = len(source.classes)
    if count < least:
        found = f"is one class, '{source.classes[0]}'" if count == 1 else f"are {count} classes"
        inner = Path(source.origin, *source.spelled[:1])
        hint = f"; did you mean {inner}?" if len(folders_in(inner)) >= least else ""
        raise DataError(f"{source.origin}: there {found}; at least {least} are needed{hint}")


def _geometry(split: EncodedSplit, size: Frame | None, channels: int | None) -> tuple[Frame, int]:
    """Return the requested size and channels, or those of the images."""
    if len(split.labels) == 0:
        raise DataError("the train split is empty")
    if size is not None and channels is not None:
        return size, channels
    sizes, grey = set(), True
    count = len(split.labels)
    if split.shards is None:
        positions = np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).astype(int))
    else:
        positions = split.shards.spread(np.arange(count), SAMPLED)
    for i in positions.tolist():
        try:
            encoded = split.read(i)
            if isinstance(encoded, np.ndarray):
                depth, height, width = encoded.shape
                is_grey = depth == 1
            else:
                width, height, is_grey = header(encoded, split.locate(i))
        except AccessError:
            raise
        except DataError:
            continue  # decoding will report it
        sizes.add((width, height))
        grey = grey and is_grey
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
    native = width if width == height and width <= LARGEST_NATIVE_SIZE else DEFAULT_SIZE
    return size or frame_of(native), channels or (1 if grey else 3)


def _warn_of_missing_classes(source: Source, train: Split, condition: str = "") -> None:
    counts = torch.bincount(train.labels, minlength=len(source.classes)).tolist()
    for wanted, what in {0: "no training image", 1: "one image, which stays in training"}.items():
        names = [name for name, n in zip(source.classes, counts, strict=True) if n == wanted]
        if names:
            warnings.warn(
                f"{source.origin}: {condition}{', '.join(names[:5])}"
                f"{' …' if len(names) > 5 else ''}: {what}",
                SmallfryWarning,
                stacklevel=3,
            )
