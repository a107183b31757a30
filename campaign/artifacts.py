"""Artifacts to damage: a run with its previous checkpoint, exports and a shared folder."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from campaign.command import command
from campaign.runs import same, without_pictures, write_config
from smallfry.deploy.pretrained import from_pretrained
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import OptimizerConfig, read_config
from smallfry.training.run import RunFolder, TrainedModel, load_run
from smallfry_runtime.runtime import Runtime


class Artifacts(NamedTuple):
    """Read-only folders with the readings of their intact forms."""

    folder: Path
    scratch: Path  # where trials of one part make their copies
    said: dict[str, Any]  # by the name of a target


class Target(NamedTuple):
    """File to damage, with its reader."""

    place: str  # the folder that is copied
    file: str  # in it
    read: Callable[[Path], Any]  # of the copied folder
    offers: str | None = None  # what a message on it must offer
    editable: bool = False  # text that people may change: it is read as it stands


def of_run(folder: Path) -> Any:
    """Load a run's checkpoint for resuming."""
    return load_checkpoint(folder / "last")


def of_model(folder: Path) -> Any:
    """Load a run's model."""
    return _model(load_run(folder))


def of_texts(folder: Path) -> Any:
    """Read a run's configuration, rows and summary."""
    run = RunFolder(folder)
    return read_config(run.config), run.read_metrics(), run.read_summary()


def of_export(folder: Path) -> Any:
    """Run an export on an image."""
    runtime = Runtime(folder, threads=1)
    size, channels = runtime.manifest.image_size, runtime.manifest.channels
    pixels = np.arange(channels * size * size, dtype=np.uint8).reshape(1, channels, size, size)
    said = runtime.predict(pixels)
    return runtime.manifest, said.probabilities.tolist()


def of_shared(folder: Path) -> Any:
    """Load a shared model."""
    return _model(from_pretrained(folder))


def _model(trained: TrainedModel) -> Any:
    return trained.manifest, trained.classes, dict(trained.model.state_dict())


TARGETS = (
    *(
        Target("run", f"last/{name}", of_run, "last.previous")
        for name in ("manifest.json", "model.safetensors", "trainer.pt")
    ),
    *(Target("run", f"best/{name}", of_model) for name in ("manifest.json", "model.safetensors")),
    *(
        Target("run", name, of_texts, editable=True)
        for name in ("config.yaml", "metrics.csv", "summary.json")
    ),
    *(Target("whole", name, of_export) for name in ("manifest.json", "model.onnx")),
    *(
        Target("anytime", name, of_export)
        for name in ("manifest.json", "embed.onnx", "step.onnx", "read_out.onnx")
    ),
    Target("shared", "model.safetensors", of_shared),
    Target("shared", "config.json", of_shared, editable=True),
)


def prepare(folder: Path) -> Artifacts:
    """Train, export and share once for all parts, which may run at the same time."""
    base = folder.parent / "artifacts"
    with open(folder.parent / "artifacts.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_once(base)
    said = {key(t): None for t in TARGETS}
    return Artifacts(base, folder, said)


def _make_once(base: Path) -> None:
    if not (base / "done").exists():
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        child = os.fork()  # training starts threads, after which this process could not be forked
        if child == 0:
            code = 1
            try:
                _make(base)
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError("what is to be damaged could not be made")


def key(target: Target) -> str:
    """Return the name of a target."""
    return f"{target.place}/{target.file}"


def whole(artifacts: Artifacts, target: Target) -> Any:
    """Read the undamaged folder."""
    if artifacts.said[key(target)] is None:
        artifacts.said[key(target)] = target.read(artifacts.folder / target.place)
    return artifacts.said[key(target)]


def equal(one: Any, other: Any) -> bool:
    """Compare two readings."""
    if isinstance(one, tuple) and hasattr(one, "_fields"):
        return same(tuple(one), tuple(other))
    return same(one, other)


def copy(artifacts: Artifacts, target: Target, place: Path) -> Path:
    """Copy the target's folder with its file copied and the others linked."""
    to = place / target.place
    shutil.copytree(artifacts.folder / target.place, to, copy_function=os.link)
    file = to / target.file
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    return to


def _make(base: Path) -> None:
    without_pictures()
    write_config(base / "config.yaml", base / "run", optimizer=OptimizerConfig("adamw"))
    run = str(base / "run")
    _must("train", "--config", str(base / "config.yaml"), "--model.recursion_steps=3")
    for form in ("whole", "anytime"):
        _must("export", run, "--to", str(base / form), "--form", form)
    _must("share", run, "--to", str(base / "shared"))
    (base / "done").write_text(json.dumps(sorted(os.listdir(base))))


def _must(*words: str) -> None:
    said = command(*words)
    if said.code:
        raise RuntimeError(said.err)
