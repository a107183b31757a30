"""benchmarks/gpu.py: what a part has found outlives it, and the next part comes all the same."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
FIRST_FIGURE = """
import json, os, pathlib, signal, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[2:] if "=" in word)
file = pathlib.Path(given["file"])
"""
GOOD = FIRST_FIGURE + "file.write_text(json.dumps({'figure': {'brief': 'fast'}}))"
HANGING = GOOD + "\ntime.sleep(600)"
DEAF = FIRST_FIGURE + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANGING
DYING = "raise RuntimeError('no such device')"
LEAVING = GOOD + (
    "\nimport subprocess"
    "\nleft = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    "\n(file.parent / 'pid').write_text(str(left.pid))"
)


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Patient(subprocess.Popen):  # type: ignore[type-arg]
    """A part whose seconds begin when its figure is written, if it ever is."""

    def wait(self, timeout: float | None = None) -> int:
        file = next(Path(word[7:]) for word in self.args if word.startswith("--file="))
        while timeout is not None and self.poll() is None and not file.exists():
            time.sleep(0.01)
        return super().wait(timeout)


@pytest.fixture
def call(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """``call({name: program}, {name: seconds})`` runs such parts; the exit code."""
    patient = SimpleNamespace(Popen=Patient, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu, "subprocess", patient)

    def run(programs: dict[str, str], most: dict[str, float], *more: str) -> int:
        parts = {}
        for name, program in programs.items():
            script = tmp_path / f"{name}.py"
            script.write_text(program)
            parts[name] = gpu.Part(str(script), 0.5, most.get(name, 300.0), grace=1.0)
        monkeypatch.setattr(gpu, "PARTS", parts)
        words = ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path), "--parts", *parts]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words, *more])
        return int(gpu.main())

    return run


def found(folder: Path, part: str) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "out" / f"{part}.json").read_text())


def test_parts_share_the_budget_and_one_that_needs_more_is_left_out(gpu: ModuleType) -> None:
    assert gpu.seconds_for("smoke", 1000, []) == gpu.PARTS["smoke"].most
    kept = gpu.PARTS["optimizers"].reserved
    assert gpu.seconds_for("accuracy", 300, ["optimizers", "rivals"]) == 300 - kept
    assert gpu.seconds_for("accuracy", 300, ["rivals"]) == 300
    assert gpu.seconds_for("accuracy", gpu.PARTS["accuracy"].least - 1, []) == 0


def test_a_part_that_fails_hangs_or_is_deaf_costs_no_figure_and_not_the_next(
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {"dying": DYING, "hanging": HANGING, "deaf": DEAF, "good": GOOD}
    assert call(programs, {"hanging": 2.0, "deaf": 2.0}, "--device", "cpu") == 1
    assert "no such device" in found(tmp_path, "dying")["error"]
    for part, ended in {"hanging": "asked to", "deaf": "killed", "good": "by itself"}.items():
        record = found(tmp_path, part)
        assert record["figure"] == {"brief": "fast"}
        assert record["process"]["ended"].startswith(ended)
    said = capsys.readouterr().out
    assert "RuntimeError: no such device" in said
    assert "figure: fast" in said


def test_a_part_leaves_no_process_behind(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert call({"leaving": LEAVING}, {}) == 0
    pid = int((tmp_path / "out" / "pid").read_text())
    while Path(f"/proc/{pid}").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.01)


def test_what_does_not_fit_is_left_out(
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    assert call({"good": GOOD}, {}, "--budget", "0.1") == 0
    assert not (tmp_path / "out" / "good.json").exists()
    assert "good: left out" in capsys.readouterr().out


def test_images_of_tables_can_be_written_as_folders_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FILE.parent))
    from gpu_common import as_folders

    from smallfry.training.config import DataConfig
    from smallfry.training.evaluation_data import load_config_data

    write_images(tmp_path / "tables")
    as_folders(tmp_path / "tables", tmp_path / "folders")
    data = load_config_data(DataConfig(str(tmp_path / "folders")))
    table = load_config_data(DataConfig(str(tmp_path / "tables")))
    assert [len(data.train), len(data.validation), len(data.test)] == [270, 30, 50]

    def all_of(split):  # type: ignore[no-untyped-def]
        pairs = zip(split.images, split.labels, strict=True)
        return sorted((int(label), image.numpy().tobytes()) for image, label in pairs)

    assert all_of(data.test) == all_of(table.test)


@pytest.mark.slow
@pytest.mark.skipif(
    "SMALLFRY_REHEARSE" not in os.environ, reason="takes long; SMALLFRY_REHEARSE=1 asks for it"
)
def test_every_part_runs_in_a_rehearsal(tmp_path: Path) -> None:
    root = tmp_path / "cifar"
    write_images(root)
    words = ["--rehearse", "--root", str(root), "--out", str(tmp_path / "out")]
    words += ["--scratch", str(tmp_path / "scratch"), "--budget", "3000"]
    command = [sys.executable, str(FILE), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log[-5000:]
    for part in ("smoke", "speed", "accuracy", "fast", "optimizers", "rivals"):
        assert found(tmp_path, part)["process"]["ended"] == "by itself"
    assert (tmp_path / "out" / "accuracy_run.tar.gz").exists()
    fast = found(tmp_path, "fast")
    assert [fast[f"{epochs} epochs"]["error"] for epochs in (1, 2) if "error" in fast] == []


def write_images(root: Path) -> None:
    """A table with CIFAR-10's columns and ten classes of colours, and another to test on."""
    import io

    import datasets

    random = np.random.default_rng(0)
    names = [f"class {label}" for label in range(10)]
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=names))
    root.mkdir()
    for split, count in {"train": 300, "test": 50}.items():
        images = []
        for _ in range(count):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        rows = {"img": images, "label": [number % 10 for number in range(count)]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(root / f"{split}-00000-of-00001.parquet")


@pytest.mark.slow
def test_the_fast_part_takes_more_epochs_until_they_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FILE.parent))
    import gpu_common
    import gpu_parts

    from smallfry.training.config import TrainConfig

    reached = {12: 0.92, 19: 0.935, 30: 0.941, 45: 0.95}

    def train(config: TrainConfig) -> dict[str, object]:
        return {"test": {"accuracy": reached[config.epochs]}, "seconds": 2.0 * config.epochs}

    def taken(seconds: float) -> dict[str, dict[str, object]]:
        places = (tmp_path / "fast.json", tmp_path, "cpu", None, False, False, None, None)
        settings = gpu_common.Settings("fast", time.time() + seconds, *places)
        gpu_parts.fast(settings, gpu_common.Record(settings))
        return json.loads((tmp_path / "fast.json").read_text())

    monkeypatch.setattr(gpu_parts, "readable", lambda _: {})
    monkeypatch.setattr(gpu_parts, "_fast", train)
    assert list(taken(1000)) == ["data", "12 epochs", "19 epochs", "30 epochs"]
    short = taken(gpu_parts.FAST_OVERHEAD + 55)  # enough for 19 epochs, not for 30
    assert list(short) == ["data", "12 epochs", "19 epochs", "30 epochs"]
    assert short["30 epochs"] == {"error": "left out: out of seconds"}
