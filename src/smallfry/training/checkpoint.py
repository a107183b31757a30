"""A checkpoint: a folder that is either whole or not there.

``model.safetensors`` holds the weights to use (the average, if there is one), ``manifest.json``
what they are, ``trainer.pt`` what the loop needs to go on. A checkpoint is written beside its
place and renamed into it, and the one before it stays as ``<name>.previous``; every file's hash is
in the manifest, and the manifest's own too, so a damaged one is never loaded.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from smallfry.errors import RunError
from smallfry.reading import is_whole, read_json, read_large, sealed
from smallfry.version import __version__

FORMAT = 2  # 1 had no digest of the manifest
READ = (1, FORMAT)
WEIGHTS, TRAINER, MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    manifest: dict[str, Any]
    weights: dict[str, Tensor]
    trainer: dict[str, Any] | None


def save_checkpoint(
    folder: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    trainer: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint; at every moment the folder or ``<name>.previous`` is whole.

    Raises:
        RunError: It could not be written; the old checkpoint is untouched.
    """
    new, previous = _sibling(folder, "new"), _sibling(folder, "previous")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        contents = {
            WEIGHTS: safetensors.torch.save({k: v.contiguous() for k, v in weights.items()})
        }
        if trainer is not None:
            buffer = io.BytesIO()
            torch.save(dict(trainer), buffer)
            contents[TRAINER] = buffer.getvalue()
        files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        head = {"format": FORMAT, "smallfry": __version__, **manifest, "files": files}
        contents[MANIFEST] = json.dumps(sealed(head), indent=2).encode()
        for name, data in contents.items():
            _write(new / name, data)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise RunError(
            f"{folder}: the checkpoint could not be saved ({error}); the one before it is "
            "untouched: free space, then go on with --resume"
        ) from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, or the one before it if a crash left only that.

    Raises:
        RunError: Missing, incomplete, damaged, or of another format.
    """
    previous = _sibling(folder, "previous")
    if not folder.exists() and previous.exists():
        folder = previous
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no checkpoint; the run stopped before its first one")
    hint = "take another checkpoint"
    if folder != previous and (previous / MANIFEST).exists():
        hint = f"the one before it is in {previous.name}: delete {folder} to go on from there"
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        raise RunError(f"{error}; {hint}") from error
    contents = {}
    for name, digest in manifest["files"].items():
        try:
            contents[name] = read_large(folder / name)
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "out of memory"
            raise RunError(f"{folder / name}: can't be read ({reason}); {hint}") from error
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise RunError(f"{folder / name}: damaged, its hash is not the manifest's; {hint}")
    name = WEIGHTS
    try:
        weights = safetensors.torch.load(contents[WEIGHTS])
        trainer = None
        if TRAINER in contents:
            name, state = TRAINER, io.BytesIO(contents[TRAINER])
            trainer = torch.load(state, map_location="cpu", weights_only=True)
            if not isinstance(trainer, dict):
                raise ValueError("it holds no state of a training run")
    except Exception as error:  # a stranger's bytes, with the right hash, raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"{folder / name}: can't be loaded ({reason}); {hint}") from error
    return Checkpoint(manifest, weights, trainer)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint, or the one before it."""
    return folder.exists() or _sibling(folder, "previous").exists()


def saved_position(folder: Path) -> dict[str, Any] | None:
    """Epoch and step of a checkpoint, or of the one before it; None if there is neither.

    Raises:
        RunError: It is damaged, or of another format.
    """
    for each in (folder, _sibling(folder, "previous")):
        if (each / MANIFEST).exists():
            position: dict[str, Any] = read_manifest(each)["training"]
            return position
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, if it is one that this version reads."""
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
    except FileNotFoundError:
        raise RunError(f"{folder}: incomplete, {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: damaged ({error})") from error
    if not isinstance(manifest, dict) or "format" not in manifest or "files" not in manifest:
        raise RunError(f"{file}: not the manifest of a smallfry checkpoint")
    if manifest["format"] not in READ:
        raise RunError(
            f"{folder}: written by smallfry {manifest.get('smallfry', '?')} in format "
            f"{manifest['format']}; this is smallfry {__version__}, which reads format {FORMAT}"
        )
    if not is_whole(manifest):
        raise RunError(f"{file}: damaged, its digest is not that of its content")
    files = manifest["files"]
    if not isinstance(files, dict) or not {WEIGHTS} <= {*files} <= {WEIGHTS, TRAINER}:
        raise RunError(f"{file}: damaged, it lists other files than those of a checkpoint")
    return manifest


def write_file(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    try:
        _write(part, text.encode())
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"{file}: could not be written ({error})") from error


def _write(file: Path, data: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
