"""WebDataset tar shards: KEY.jpg beside KEY.cls or KEY.json.

A tar file has no table of contents. One pass over its headers makes one: where each image starts,
how long it is, and its label. Then any image can be read on its own, without the others.

Nothing is ever extracted: names serve to match an image with its label. Members that are no plain
files, or whose names lead out of the archive, are left out and told.

Format: https://github.com/webdataset/webdataset#the-webdataset-format
"""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry.data.shard_scan import (
    MOST_BYTES,
    Block,
    Label,
    Scanned,
    is_of_the_system,
    reached,
    unreadable_shard,
)
from smallfry.errors import DataError
from smallfry_runtime.inputs import is_image

MOST_HEADER = 2**20  # bytes of a header with its extensions, and of a label
MOST_TOLD = 100  # members of a shard of which it is told why they were left out
SAMPLES_A_BLOCK = 256
SAMPLED = 64  # images of a shard whose bytes are looked at, to notice others in their place
SAMPLED_BYTES = 64  # at the beginning of each, and at its end
LABEL_KEYS = ("label", "cls", "class")  # of KEY.json


def scan(file: Path, key: str | None = None) -> Scanned:
    """Index the images of a shard, with their labels.

    Args:
        file: The shard.
        key: The key of KEY.json that is the label; by default KEY.cls is, or else the one of
            ``label``, ``cls`` and ``class`` that there is.

    Raises:
        AccessError: The shard can't be read now.
        DataError: An image without a label, or with two, or two images under one key.
    """
    try:
        with reached(file), _Headers(file) as stream, tarfile.TarFile(fileobj=stream) as archive:
            return _Scan(file, stream, key).work_through(archive)
    except (tarfile.TarError, OSError) as error:
        return unreadable_shard(f"{file}: not a tar file, or damaged ({error}); copy it again")


def read_span(file: io.FileIO, offset: int, size: int) -> bytes:
    """Read the bytes of an image.

    Raises:
        DataError: More of them than are safe, or fewer than there should be.
    """
    if size < 0 or offset < 0:
        raise DataError("an image of negative length; rewrite the file")
    if size > MOST_BYTES:
        raise DataError(
            f"an image of {size / 1e6:,.0f} MB; at most {MOST_BYTES / 1e6:.0f} are read"
        )
    file.seek(offset)
    found = b""
    while len(found) < size and (more := file.read(size - len(found))):  # which may give less
        found += more
    if len(found) < size:
        raise DataError(f"truncated, {len(found)} bytes of {size}; copy the file again")
    return found


def name_at(file: Path, offset: int) -> str:
    """Read the name in the header before a member's bytes, for messages."""
    try:
        with open(file, "rb") as stream:
            stream.seek(offset - tarfile.BLOCKSIZE)
            header = stream.read(tarfile.BLOCKSIZE)
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except (tarfile.TarError, OSError):
        return "?"


class _Headers(io.FileIO):
    """File with bounded reads, whatever length a header claims."""

    def read(self, size: int | None = -1, /) -> Any:
        if size is None or not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError("a header or a label of more than a megabyte")
        return super().read(size)


class _Scan:
    """Pass over a shard."""

    def __init__(self, file: Path, stream: _Headers, key: str | None) -> None:
        self.file, self.stream, self.key = file, stream, key
        self.known: dict[Label, int] = {}
        self.codes: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.times: list[float] = []
        self.left_out: list[str] = []
        self.open: str | None = None  # the key of the sample whose members come now
        self.image: tarfile.TarInfo | None = None
        self.labels: dict[str, bytes] = {}  # what is in KEY.cls and KEY.json

    def work_through(self, archive: tarfile.TarFile) -> Scanned:
        damage, before = "", -1
        try:
            while (member := archive.next()) is not None:
                if member.offset <= before:  # a length below zero would go in circles
                    raise tarfile.ReadError("a header that points backwards")
                if member.size < 0:
                    raise tarfile.ReadError("a member of a length below zero")
                before = member.offset
                archive.members.clear()  # type: ignore[attr-defined]  # else they all stay
                self._take(member)
            self._require_end(archive)
            self._close()
            damage = self._behind_the_end()
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            if is_of_the_system(error):
                raise
            damage = (
                f"{self.file}: damaged after its sample {len(self.codes) - 1} ({error}); "
                "copy or write it again"
            )
        spans = np.array(self.spans, np.int64).reshape(-1, 2)
        codes = np.array(self.codes, np.int32)
        return Scanned(
            list(self.known),
            codes,
            _blocks(spans),
            self._mark(spans),
            spans,
            self.left_out,
            damage,
        )

    def _mark(self, spans: NDArray[np.int64]) -> str:
        """Hash the positions of the images, their times, and some of their bytes."""
        found = hashlib.sha256(spans.tobytes() + np.array(self.times, np.float64).tobytes())
        chosen = np.linspace(0, len(spans) - 1, min(SAMPLED, len(spans))).astype(int)
        for offset, size in spans[chosen].tolist():
            for start in (offset, offset + max(0, size - SAMPLED_BYTES)):
                self.stream.seek(start)
                found.update(self.stream.read(min(size, SAMPLED_BYTES)))
        return found.hexdigest()[:32]

    def _take(self, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        if member.isdir() or path.name.startswith("."):
            return
        if not member.isreg() or member.issparse():
            self._leave_out(f"{self.file}: {member.name!r} is a link or device, no plain file")
            return
        if path.is_absolute() or ".." in path.parts:
            self._leave_out(f"{self.file}: the name {member.name!r} leads out of the archive")
            return
        stem, _, endings = path.name.partition(".")
        key = str(path.with_name(stem)) if stem else member.name
        if key != self.open:
            self._close()
            self.open = key
        ending = endings.rpartition(".")[2].lower()
        if ending in ("cls", "json"):
            if member.size > MOST_HEADER:
                raise DataError(f"{self.file}: {member.name!r} is too large for a label")
            self.stream.seek(member.offset_data)
            self.labels[ending] = self.stream.read(member.size)
        elif is_image(f"x.{ending}"):
            if self.image is not None:
                raise DataError(f"{self.file}: two images have the key {key!r}; expected one")
            self.image = member

    def _close(self) -> None:
        """Close a sample, whose key must not occur again."""
        if self.image is not None:
            label = self._label()
            self.codes.append(self.known.setdefault(label, len(self.known)))
            self.spans.append((self.image.offset_data, self.image.size))
            self.times.append(float(self.image.mtime))
        elif self.labels:
            self._leave_out(f"{self.file}: {self.open!r} has a label and no image")
        self.open, self.image, self.labels = None, None, {}

    def _leave_out(self, reason: str) -> None:
        if len(self.left_out) < MOST_TOLD:
            self.left_out.append(reason)

    def _label(self) -> Label:
        where = f"{self.file}: {self.open!r}"
        if self.key is None and "cls" in self.labels:
            return _of_text(self.labels["cls"], f"{where}, its .cls")
        if "json" in self.labels:
            return _of_json(self.labels["json"], self.key, f"{where}, its .json")
        wanted = ".cls or .json" if self.key is None else ".json"
        raise DataError(f"{where} is an image without a label; expected a {wanted} beside it")

    def _require_end(self, archive: tarfile.TarFile) -> None:
        """Require a proper end: tarfile takes any unreadable header for the end."""
        self.stream.seek(archive.offset)
        if self.stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the mark that ends a tar file is missing")

    def _behind_the_end(self) -> str:
        """Describe invalid content after the end mark; zeros, which fill a record, are valid.

        tarfile never looks at it.
        """
        while block := self.stream.read(MOST_HEADER):
            if block.count(0) < len(block):
                return (
                    f"{self.file}: more follows where its {len(self.codes)} samples end, as when "
                    "tar files are joined with cat; keep each as a file of its own, or join them "
                    "with tar --concatenate"
                )
        return ""


def _of_text(content: bytes, where: str) -> Label:
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise DataError(f"{where}: expected a number or a name, in UTF-8")
    return int(text) if re.fullmatch(r"0|[1-9]\d{0,17}", text, re.ASCII) else text


def _of_json(content: bytes, key: str | None, where: str) -> Label:
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    keys = LABEL_KEYS if key is None else (key,)
    found = [name for name in keys if isinstance(told, dict) and name in told]
    if len(found) != 1:
        raise DataError(
            f"{where}: expected one of the keys {', '.join(keys)}, found {len(found)}; select "
            f"one: --data.label KEY"
        )
    value = told[found[0]]
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where}: the label under '{found[0]}' is neither an integer nor text")
    return value


def _blocks(spans: Any) -> list[Block]:
    parts = [spans[i : i + SAMPLES_A_BLOCK, 1] for i in range(0, len(spans), SAMPLES_A_BLOCK)]
    return [Block(len(part), int(part.sum())) for part in parts]
