"""Words of one's own: pictures of cropped words in a folder, with a file of their texts.

The file is ``labels.csv``, with a line of column names: one of image files, one of texts, and
perhaps one of splits. Pictures are brought to 32 pixels of height with black borders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smallfry.data import ImageData, Split
from smallfry.data.cache import decoded
from smallfry.data.fingerprint import digest, stamp
from smallfry.data.label_files import LabelColumns, Record, choose_column, read_records
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.data.sources import TEST, TRAIN, VALIDATION, EncodedSplit
from smallfry.errors import DataError, UsageError
from smallfry.kits.ocr.task import require_feasible
from smallfry_runtime.frames import Frame, frame_of

__all__ = ["FolderSettings", "text_frame"]

HEIGHT, WIDTH = 32, 128
STEP = 4  # pixels
TEXTS = ("text", "label", "word", "transcription", "words")  # usual names of the column


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """Settings of a folder of words, in ``data.options``.

    Args:
        labels: The file of texts, in the folder.
        fold_case: Read capitals as small letters.
    """

    labels: str = "labels.csv"
    fold_case: bool = False


def text_frame(name: str, wanted: Wanted, **fixed: Any) -> Frame:
    """Return the size of images of texts, 32 pixels high, which pictures are fitted into.

    Raises:
        UsageError: Another height, or a setting that texts do not have.
    """
    frame = frame_of(wanted.images["image_size"] or (HEIGHT, WIDTH), "letterbox")
    if frame.height != HEIGHT:
        raise UsageError(
            f"{name} has images {HEIGHT} pixels high, and any width: data.image_size "
            f"{HEIGHT} {frame.width}, not {frame.height} {frame.width}"
        )
    known = {"channels": 1, "image_size": frame.size, "resize": frame.resize}
    wanted.require_fixed(name, **known, **fixed)
    return frame


def read_words_folder(name: str, wanted: Wanted) -> ImageData:
    """Read a folder of words.

    Args:
        name: The name of the data set.
        wanted: Its folder as ``root``, and shares held out where the file has no such split.

    Raises:
        UsageError: No folder, or a setting that does not apply.
        DataError: A text that is empty or longer than the image has steps, or an unreadable image.
    """
    if wanted.root is None:
        raise UsageError(f"{name} needs the folder of the words: give data.root")
    settings: FolderSettings = settings_from(FolderSettings, wanted.options)
    label = wanted.images.get("label")
    frame = text_frame(name, wanted, label=label)
    folder = wanted.root.expanduser()
    place = folder / settings.labels
    records, names = read_records(folder, place, LabelColumns())
    column = choose_column(place, names, label, "label", TEXTS)
    texts = [_text(record, column, settings.fold_case) for record in records]
    alphabet = sorted({symbol for text in texts for symbol in text})
    numbers = {symbol: number for number, symbol in enumerate(alphabet, 1)}
    labels = [[numbers[symbol] for symbol in text] for text in texts]
    steps = frame.width // STEP
    for record, fits in zip(records, require_feasible(labels, steps), strict=True):
        if not fits:
            raise DataError(
                f"{record.where}: its text is too long for images {frame.width} pixels wide, "
                f"which have {steps} steps: raise data.image_size, such as 32 256"
            )
    everything = _decoded(records, labels, frame)
    rows = _divided(records, wanted)
    return ImageData(
        str(folder),
        str(place),
        ("", *alphabet),
        frame.size,
        1,
        everything.take(rows[TRAIN][: wanted.limit]),
        everything.take(rows[VALIDATION]),
        everything.take(rows[TEST]),
        _locate={split: lambda row: str(records[row].image) for split in (TRAIN, VALIDATION, TEST)},
        resize=frame.resize,
        has_symbols=True,
    )


def _text(record: Record, column: str, fold_case: bool) -> str:
    cell = record.cells.get(column)
    if isinstance(cell, list | dict):
        raise DataError(f"{record.where}: a cell holds several values ({cell!r}); expected one")
    text = "" if cell is None else str(cell).strip()
    if not text:
        raise DataError(
            f"{record.where}: has no text in the column '{column}': write it there, or remove the "
            "line"
        )
    return text.lower() if fold_case else text


def _decoded(records: Sequence[Record], labels: Sequence[Sequence[int]], frame: Frame) -> Split:
    """Decode all images, once; the first that can't be read ends it."""
    encoded = EncodedSplit(
        np.zeros(len(records), np.int64),
        lambda i: records[i].image,
        lambda i: str(records[i].image),
        digest("ocr-folder", *(stamp(record.image) for record in records)),
    )
    images, unreadable, _ = decoded(encoded, frame, 1)
    if unreadable:
        raise DataError(f"{unreadable[0].reason}: remove it from the file of labels")
    table = np.zeros((len(labels), max(map(len, labels))), np.int64)
    for row, label in zip(table, labels, strict=True):
        row[: len(label)] = label
    return Split(torch.from_numpy(images), torch.arange(len(labels)), torch.from_numpy(table))


def _divided(records: Sequence[Record], wanted: Wanted) -> dict[str, torch.Tensor]:
    """Return the rows of each split, holding out shares of training where there is none."""
    generator = torch.Generator().manual_seed(wanted.split_seed)
    order = torch.randperm(len(records), generator=generator).tolist()
    rows = {split: [i for i in order if records[i].split == split] for split in (TRAIN, TEST)}
    rows[VALIDATION] = [i for i in order if records[i].split == VALIDATION]
    for split, share in ((TEST, wanted.test), (VALIDATION, wanted.validation)):
        if not rows[split]:
            count = round(share * len(rows[TRAIN]))
            rows[split], rows[TRAIN] = rows[TRAIN][:count], rows[TRAIN][count:]
    return {split: torch.tensor(sorted(found), dtype=torch.int64) for split, found in rows.items()}


register_data(("ocr-folder",), read_words_folder)
