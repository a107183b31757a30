"""benchmarks/plus.py: a form's figures are that form's, of that model, under settings that suit."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "plus.py"


@pytest.fixture(scope="module")
def plus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_plus", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(plus: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plus.py", *arguments])
    assert plus.main() == 0


def test_runs_of_another_model_are_not_taken_for_this_ones(
    plus: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, Path]] = []
    summary = {"test": {"accuracy": 1.0}, "training_seconds": 1, "parameters": 1, "macs": 1}

    def train(config):  # type: ignore[no-untyped-def]
        asked.append((config.model.name, config.run))
        config.run.mkdir(parents=True)
        (config.run / "metrics.csv").write_text("seconds,validation_accuracy\n1,1\n2,1\n")
        return {"measured": summary}

    monkeypatch.setattr(plus, "train", train)
    out = tmp_path / "out.json"
    told = ["without", "--data", "digits", "--only", "all", "--runs", str(tmp_path), "--minutes"]
    call(plus, monkeypatch, *told, "0.1", "--out", str(out))
    first = [folder for _, folder in asked]
    asked.clear()
    call(plus, monkeypatch, *told, "0.1", "--model", "vitrm_plus_tiny_32", "--out", str(out))
    assert {name for name, _ in asked} == {"vitrm_plus_tiny_32"}
    assert not {folder for _, folder in asked} & set(first)
    assert json.loads(out.read_text())["measured"]["model"] == "vitrm_plus_tiny_32"


def test_a_run_that_was_told_otherwise_is_refused(
    plus: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = plus.configure(arguments(plus, tmp_path), {}, 0, 3, tmp_path / "run")
    told.run.mkdir()
    plus.RunFolder(told.run).begin(told.to_dict())
    monkeypatch.setattr(plus, "resume", lambda run: {"resumed": run})
    assert plus.finished(told) == {"resumed": told.run}
    other = plus.configure(arguments(plus, tmp_path), {"drop_rate": 0.0}, 0, 3, tmp_path / "run")
    with pytest.raises(SystemExit, match="was told model"):
        plus.finished(other)


def test_natural_gradient_decays_as_adamw_does_and_is_not_clipped_twice(
    plus: ModuleType, tmp_path: Path
) -> None:
    forms = plus.STAGES["recipe"]
    usual, kfac = (
        plus.optimizer(arguments(plus, tmp_path), forms[name]) for name in ("all", "with kfac")
    )
    rate = 0.192 / 64
    assert usual.lr is None  # of the width
    assert kfac.lr * kfac.weight_decay == pytest.approx(rate * usual.weight_decay)
    assert kfac.clip is None
    assert kfac.options == {"damping": 1.0, "fallback_lr": rate}


def arguments(plus: ModuleType, folder: Path):  # type: ignore[no-untyped-def]
    given = {"data": "digits", "root": None, "model": None, "device": "cpu", "runs": folder}
    return plus.argparse.Namespace(**given)
