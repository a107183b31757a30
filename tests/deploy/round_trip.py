"""Comparison of an export in a device format with the same model in ONNX, through the runtime."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from smallfry.deploy import Runtime
from smallfry.deploy.export import export, export_bytes
from smallfry.deploy.targets import find_target
from smallfry.errors import ExportError
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run


def require_packages(target: str) -> None:
    """Skip tests where a format's packages are not installed."""
    for package in find_target(target).packages:
        pytest.importorskip(package.replace("-", "_"), reason=f"{package} is not installed")


def pixels_of(run: Path, count: int) -> np.ndarray:
    return load_like(load_run(run), run)[1].images[:count].numpy()


def check_float32(folder: Path, onnx: Path, pixels: np.ndarray) -> None:
    """Check answers, halting and early exit against the same in ONNX, for several batches."""
    ours, theirs = Runtime(folder, threads=1), Runtime(onnx, threads=1)
    assert {**vars(ours.manifest), "files": 0, "engine": 0, "exits": 0} == {
        **vars(theirs.manifest),
        "files": 0,
        "engine": 0,
        "exits": 0,
    }
    np.testing.assert_allclose(ours.manifest.exits, theirs.manifest.exits, atol=1e-3)
    for count in (1, 5, len(pixels)):
        given, wanted = (each.predict(pixels[:count], batch_size=4) for each in (ours, theirs))
        np.testing.assert_allclose(given.probabilities, wanted.probabilities, atol=1e-4)
        np.testing.assert_allclose(given.halting, wanted.halting, atol=1e-4)
    threshold = middle(theirs.predict(pixels, threshold=0.0).halting)
    given, wanted = (each.predict(pixels, threshold=threshold) for each in (ours, theirs))
    assert given.steps.tolist() == wanted.steps.tolist()
    assert {*given.steps.tolist()} > {1}  # some leave and some stay
    np.testing.assert_allclose(given.probabilities, wanted.probabilities, atol=1e-4)


def middle(halting: np.ndarray) -> float:
    """Return a threshold in the widest gap of the middle half of the probabilities."""
    kept = np.sort(halting)[len(halting) // 4 : 3 * len(halting) // 4 + 1]
    at = int(np.diff(kept).argmax())
    return float((kept[at] + kept[at + 1]) / 2)


def check_int8(folder: Path, plain: Path, onnx_int8: Path, pixels: np.ndarray) -> None:
    """Check that an int8 export answers as those in float32 and as ONNX in int8 do, about."""
    given = Runtime(folder, threads=1).predict(pixels).probabilities
    assert Runtime(folder).manifest.precision == "int8"
    for other in (plain, onnx_int8):
        wanted = Runtime(other, threads=1).predict(pixels).probabilities
        assert np.abs(given - wanted).mean() < 0.01
        assert not np.array_equal(given, wanted)


def check_damage(folder: Path, names: Iterable[str]) -> None:
    """Check that a changed file is refused."""
    assert export_bytes(folder) == sum((folder / name).stat().st_size for name in names)
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        with pytest.raises(ExportError, match=f"{name}: truncated or damaged"):
            Runtime(folder)
        (folder / name).write_bytes(content)


def exported(run: Path, place: Path, target: str, precision: str) -> Path:
    return export(run, place / f"{target}-{precision}", "anytime", precision, target=target)
