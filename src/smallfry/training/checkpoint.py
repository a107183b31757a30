"""Checkpoints: folders that are complete or absent.

``model.safetensors`` holds the weights to use (the average, if there is one), or ``model.packed``
the same file packed; ``manifest.json`` what they are, ``trainer.pt`` what the loop needs to go on.
A checkpoint is written beside its place and renamed into it, and the one before it stays as
``<name>.previous``; every file's hash is in the manifest, and the manifest's own too, so a damaged
one is never loaded. It may be read while the next one is saved.
"""

import errno
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from smallfry.errors import RunError, is_out_of_memory
from smallfry.io.replace import replacing, write_whole
from smallfry.version import __version__
from smallfry_runtime.files import (
    MOST_TEXT,
    MOST_WEIGHTS,
    has_valid_digest,
    open_regular,
    parse_json,
    read_stream,
    settled,
    with_digest,
)
from smallfry_runtime.packed import unpack

FORMAT = 3  # 2 had no transforms of the model, 1 no digest of the manifest
READ = (1, 2, FORMAT)
WEIGHTS, TRAINER, MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"
PACKED = "model.packed"
# errors of the system for a file that is missing, too large, or no file
LASTING = (errno.ENOENT, errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)


class Checkpoint(NamedTuple):
    """Content of a checkpoint."""

    manifest: dict[str, Any]
    weights: dict[str, Tensor]
    trainer: dict[str, Any] | None


def safetensors_bytes(
    weights: Mapping[str, Tensor], notes: Mapping[str, str] | None = None
) -> bytes:
    """Serialize weights as a safetensors file, with notes in its head."""
    plain = {name: weight.contiguous() for name, weight in weights.items()}
    return safetensors.torch.save(plain, None if notes is None else {**notes})


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of weights, that of their safetensors file without notes."""
    return hashlib.sha256(safetensors_bytes(weights)).hexdigest()


def save_checkpoint(
    folder: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    trainer: Mapping[str, Any] | None = None,
    packing: Callable[[bytes], bytes] | None = None,
) -> None:
    """Write a checkpoint; at every moment the folder or ``<name>.previous`` is complete.

    Args:
        folder: The checkpoint.
        manifest: Description of the model.
        weights: Its weights.
        trainer: What the loop needs to go on.
        packing: Packing of the file of weights; None for safetensors.

    Raises:
        RunError: It could not be written; the old checkpoint is untouched.
    """
    plain = safetensors_bytes(weights)
    contents = {WEIGHTS: plain} if packing is None else {PACKED: packing(plain)}
    if trainer is not None:
        buffer = io.BytesIO()
        torch.save(dict(trainer), buffer)
        contents[TRAINER] = buffer.getvalue()

    def check() -> None:
        if not folder.parent.is_dir():
            raise RunError(f"{folder.parent}: the folder was removed while the run was training")

    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    head = {"format": FORMAT, "smallfry": __version__, **manifest, "files": files}
    contents[MANIFEST] = json.dumps(with_digest(head), indent=2).encode()
    try:
        with replacing(folder, check, _previous(folder)) as new:
            for name, data in contents.items():
                (new / name).write_bytes(data)
    except OSError as error:
        raise RunError(
            f"{folder}: the checkpoint could not be saved ({error}); the one before it is "
            "untouched: free space, then go on with --resume"
        ) from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, or its predecessor if a crash left only that.

    A run may save the next one meanwhile.

    Raises:
        RunError: Missing, incomplete, damaged, or of another format.
    """
    manifests = (folder / MANIFEST, _previous(folder) / MANIFEST)
    return settled(lambda: _load(folder), *manifests)


def has_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint, or its predecessor, exists."""
    return folder.exists() or _previous(folder).exists()


def saved_position(folder: Path) -> dict[str, Any] | None:
    """Read epoch and step of a checkpoint or of its predecessor; None without either.

    Raises:
        RunError: It is damaged, or of another format.
    """
    for each in (folder, _previous(folder)):
        if (each / MANIFEST).exists():
            position: dict[str, Any] = read_manifest(each)["training"]
            return position
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint folder, if this version supports it.

    Raises:
        RunError: Missing, damaged, or of another format.
    """
    with ExitStack() as stack:
        return _manifest(folder, _opened(folder / MANIFEST, MOST_TEXT, stack))


def write_file(file: Path, content: str | bytes) -> None:
    """Write a text file atomically.

    Raises:
        RunError: It could not be written; what was there is untouched.
    """
    try:
        write_whole(file, content.encode() if isinstance(content, str) else content)
    except FileNotFoundError as error:
        raise RunError(f"{file}: could not be written, as its folder was removed") from error
    except OSError as error:
        raise RunError(f"{file}: could not be written ({error})") from error


class _Damaged(RunError):
    """Permanently unreadable checkpoint."""


def _load(folder: Path) -> Checkpoint:
    previous = _previous(folder)
    if not folder.exists() and previous.exists():
        folder = previous
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no checkpoint; the run stopped before its first one")
    try:
        return _read(folder)
    except RunError as error:
        hint = "take another checkpoint"
        if folder != previous and (previous / MANIFEST).exists():
            hint = f"the one before it is in {previous.name}"
            if isinstance(error, _Damaged):
                hint += f": move {folder} away to go on from there"
        raise RunError(f"{error}; {hint}") from error


def _read(folder: Path) -> Checkpoint:
    """Read all files of a checkpoint, opened first, as it may be replaced meanwhile."""
    names = {MANIFEST: MOST_TEXT} | dict.fromkeys((WEIGHTS, PACKED, TRAINER), MOST_WEIGHTS)
    with ExitStack() as stack:
        streams = {name: _opened(folder / name, most, stack) for name, most in names.items()}
        manifest = _manifest(folder, streams[MANIFEST])
        contents = {
            name: _checked(folder / name, streams[name], digest)
            for name, digest in manifest["files"].items()
        }
    name = PACKED if PACKED in contents else WEIGHTS
    try:
        plain = unpack(contents[PACKED]) if name == PACKED else contents[WEIGHTS]
        weights = safetensors.torch.load(plain)
        trainer = None
        if TRAINER in contents:
            name, state = TRAINER, io.BytesIO(contents[TRAINER])
            trainer = torch.load(state, map_location="cpu", weights_only=True)
            if not isinstance(trainer, dict):
                raise ValueError("it has no training state")
    except Exception as error:  # a stranger's bytes, with the right hash, raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        kind = RunError if is_out_of_memory(error) else _Damaged
        raise kind(f"{folder / name}: can't be loaded ({reason})") from error
    return Checkpoint(manifest, weights, trainer)


def _opened(file: Path, most: int, stack: ExitStack) -> BinaryIO | OSError:
    """Open a file, or return the reason of the failure."""
    try:
        return stack.enter_context(open_regular(file, most))
    except OSError as error:
        return error


def _checked(file: Path, stream: BinaryIO | OSError, digest: str) -> bytes:
    """Read a file and check its hash against the manifest."""
    try:
        if isinstance(stream, OSError):
            raise stream
        content = read_stream(stream, file)
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "out of memory"
        kind = _Damaged if getattr(error, "errno", None) in LASTING else RunError
        raise kind(f"{file}: can't be read ({reason})") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise _Damaged(f"{file}: damaged, its hash is not the manifest's")
    return content


def _manifest(folder: Path, stream: BinaryIO | OSError) -> dict[str, Any]:
    file = folder / MANIFEST
    if isinstance(stream, FileNotFoundError):
        raise _Damaged(f"{folder}: incomplete, {MANIFEST} is missing")
    try:
        if isinstance(stream, OSError):
            raise stream
        manifest = parse_json(stream.read())
    except OSError as error:
        if error.errno not in LASTING:
            raise RunError(f"{file}: can't be read ({error.strerror})") from error
        raise _Damaged(f"{file}: damaged ({error})") from error
    except ValueError as error:
        raise _Damaged(f"{file}: damaged ({error})") from error
    if not isinstance(manifest, dict) or "format" not in manifest or "files" not in manifest:
        raise _Damaged(f"{file}: not the manifest of a smallfry checkpoint")
    if manifest["format"] not in READ:
        raise RunError(
            f"{folder}: written by smallfry {manifest.get('smallfry', '?')} in format "
            f"{manifest['format']}; this is smallfry {__version__}, which reads format {FORMAT}"
        )
    if not has_valid_digest(manifest):
        raise _Damaged(f"{file}: damaged, its digest is not that of its content")
    files = manifest["files"]
    if not isinstance(files, dict) or {*files} - {TRAINER} not in ({WEIGHTS}, {PACKED}):
        raise _Damaged(f"{file}: damaged, it lists other files than those of a checkpoint")
    return manifest


def _previous(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")
