"""Concurrent reads of a checkpoint and an export while another process replaces them."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from campaign import artifacts
from campaign.trials import RIGHT, Part, Verdict, silence
from smallfry.errors import SmallfryError
from smallfry.io import replace
from smallfry.training.checkpoint import load_checkpoint, save_checkpoint
from smallfry.training.run import load_run
from smallfry_runtime.runtime import Runtime

READS, MOST_READS = 40, 2000  # at least, and to see it replaced
REPLACED = 5  # times at least that a reader sees it replaced


class Subject(NamedTuple):
    """Folder that is written and read."""

    write: Callable[[Path, artifacts.Artifacts, int], None]  # the version of that number
    read: Callable[[Path], int]  # the number of what was read


def _save(folder: Path, made: artifacts.Artifacts, number: int) -> None:
    manifest, weights, trainer = load_checkpoint(made.folder / "run" / "last")
    kept = {k: v for k, v in manifest.items() if k not in ("files", "digest", "format")}
    weights[min(weights)].view(-1)[0] = float(number)
    counted = {"number": number}
    save_checkpoint(folder, kept | counted, weights, (trainer or {}) | counted)


def _load(folder: Path) -> int:
    manifest, weights, trainer = load_checkpoint(folder)
    number = int(manifest["number"])
    found = float(weights[min(weights)].view(-1)[0])
    if found != number or trainer is None or trainer["number"] != number:
        raise SmallfryError("files of two checkpoints were read as one")
    return number


def _load_model(folder: Path) -> int:
    return int(load_run(folder.parent, folder.name).manifest["number"])


def _export(folder: Path, made: artifacts.Artifacts, number: int) -> None:
    form = ("whole", "anytime")[number % 2]
    with replace.replacing(folder) as new:
        shutil.copytree(made.folder / form, new, dirs_exist_ok=True)


def _run(folder: Path) -> int:
    return ("whole", "anytime").index(Runtime(folder, threads=1).manifest.form)


SUBJECTS = {
    "checkpoint": Subject(_save, _load),
    "model of a run": Subject(_save, _load_model),
    "export": Subject(_export, _run),
}


def trial(made: artifacts.Artifacts, number: int) -> Verdict:
    """Read repeatedly beside one writer, which is killed at the end."""
    name = list(SUBJECTS)[number % len(SUBJECTS)]
    by_renames = number // len(SUBJECTS) % 2 == 1
    subject, kind = SUBJECTS[name], f"{name}, {'two renames' if by_renames else 'an exchange'}"
    with tempfile.TemporaryDirectory(dir=made.scratch) as place:
        folder = Path(place) / "last"
        (Path(place) / "config.yaml").write_text("")
        subject.write(folder, made, 0)
        writer = os.fork()
        if writer == 0:
            _write(subject, folder, made, by_renames)
        try:
            before, replaced, reads = subject.read(folder), 0, 0
            while reads < READS or (replaced < REPLACED and reads < MOST_READS):
                found = subject.read(folder)
                replaced, before, reads = replaced + (found != before), found, reads + 1
        except SmallfryError as error:
            return Verdict(kind, "", str(error)[:300])
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        replace.recover(folder)
        subject.read(folder)
    said = RIGHT if replaced >= REPLACED else "was not replaced meanwhile"
    return Verdict(kind, said)


def _write(subject: Subject, folder: Path, made: artifacts.Artifacts, by_renames: bool) -> None:
    silence()
    if by_renames:
        replace._renameat2 = lambda: None  # type: ignore[assignment]  # as where there is none
    number = 0
    try:
        while os.getppid() != 1:
            number += 1
            subject.write(folder, made, number)
    finally:
        os._exit(1)


PART = Part(
    "readers",
    "a read during replacement returns one complete checkpoint or export, never an error of damage",
    artifacts.prepare,
    trial,
    count=600,
    short=6,
    seconds=120,
)
