"""Speeds and deployed figures of a study at equal time: measured once, and again where needed."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from smallfry.errors import TrainingError
from smallfry.studies import deployed, equal_time
from smallfry.studies.config import ParetoConfig
from smallfry.studies.deployed import EVALUATED, Subject
from smallfry.studies.speed import epochs_within
from smallfry.studies.study import run_study
from smallfry.studies.study_models import STUDY_MODELS
from smallfry.training.config import DataConfig

DAMAGED = ["", "{", "[]", "null", "3", "\xff", '{"asked": 1}', '{"models": []}']
CONFIG = ParetoConfig(data=DataConfig("digits"), device="cpu", threads=1, minutes=1.0)
NAMES = ("resnet_micro", "vit_micro")
MODELS = {name: STUDY_MODELS[name] for name in NAMES}


@pytest.fixture(autouse=True)
def no_provenance(monkeypatch):
    """Looking at the machine takes longer than all else here."""
    monkeypatch.setattr(equal_time, "provenance", lambda device: {"device": "a machine"})


# Accuracy of int8


class Session:
    """Logits by the first pixel of an image, with one image in so many wrong."""

    def __init__(self, wrong, steps):
        self.wrong, self.steps, self.batches = wrong, steps, []

    def run(self, names, inputs):
        images = inputs["images"]
        self.batches.append(len(images))
        numbers = images[:, 0, 0, 0].astype(int)
        classes = (numbers + (numbers % self.wrong == 0)) % 4
        logits = np.eye(4, dtype=np.float32)[classes]
        if self.steps:
            first = np.eye(4, dtype=np.float32)[(classes + 2) % 4]
            return [np.stack([first] * (self.steps - 1) + [logits], axis=1)]
        return [logits]


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("count", [1, EVALUATED, EVALUATED + 1, 150])
def test_points_are_the_change_of_accuracy_in_percent(steps, count):
    images = np.zeros((count, 1, 2, 2), np.float32)
    images[:, 0, 0, 0] = np.arange(1, count + 1)
    labels = torch.arange(1, count + 1) % 4
    sessions = {"float32": Session(1000, steps), "int8": Session(5, steps)}
    subject = Subject(nn.Identity(), images[:1], (images, labels))
    wrong = sum(number % 5 == 0 for number in range(1, count + 1))
    assert deployed._points(subject, sessions) == pytest.approx(-100 * wrong / count)
    assert sum(sessions["int8"].batches) == count
    assert max(sessions["int8"].batches) <= EVALUATED
    assert deployed._points(subject._replace(validation=None), sessions) is None


# Speeds


@pytest.fixture
def measure(monkeypatch):
    """Speeds without training: models that were measured."""
    found = []

    def epoch(config, seconds):
        found.append(config.model.name)
        return {"epoch_seconds": float(len(found))}

    monkeypatch.setattr(equal_time, "measure_epoch", epoch)
    return found


def speeds(folder, **changes):
    settings = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    return equal_time._speeds(ParetoConfig(**{**settings, **changes}), MODELS, folder)


def test_a_speed_is_measured_once_for_the_same_machine_and_data(measure, tmp_path):
    first = speeds(tmp_path)
    assert list(first) == list(NAMES)
    assert speeds(tmp_path, minutes=9.0, seeds=4) == first
    assert len(measure) == 2
    for number, changes in enumerate(
        [{"threads": 2}, {"precision": "32-true"}, {"data": DataConfig("digits", limit=9)}], start=2
    ):
        speeds(tmp_path, **changes)
        assert len(measure) == 2 * number


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_speeds_are_measured_again(measure, tmp_path, content):
    first = speeds(tmp_path)
    (tmp_path / "speed.json").write_bytes(content.encode("latin-1"))
    assert list(speeds(tmp_path)) == list(first)
    assert len(measure) == 4
    assert json.loads((tmp_path / "speed.json").read_text())["asked"]["data"] == "digits"


def test_a_model_that_fails_is_tried_again_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    def fail(config, seconds):
        if config.model.name == STUDY_MODELS["vit_micro"].model:
            raise TrainingError("the loss is nan")
        return {"epoch_seconds": 2.0}

    monkeypatch.setattr(equal_time, "measure_epoch", fail)
    assert speeds(tmp_path) == {"resnet_micro": {"epoch_seconds": 2.0}}
    assert "vit_micro is left out: the loss is nan" in capsys.readouterr().out
    monkeypatch.setattr(equal_time, "measure_epoch", lambda *_: {"epoch_seconds": 5.0})
    assert speeds(tmp_path) == {
        "resnet_micro": {"epoch_seconds": 2.0},
        "vit_micro": {"epoch_seconds": 5.0},
    }


def test_epochs_are_those_whose_time_is_nearest():
    draw = np.random.default_rng(0)
    for seconds, epoch in zip(draw.uniform(1, 500, 40), draw.uniform(0.5, 90, 40), strict=True):
        found = epochs_within(seconds, {"epoch_seconds": epoch})
        gaps = [abs(n * epoch - seconds) for n in range(1, 1200)]
        assert found == 1 + int(np.argmin(gaps))


def test_planned_epochs_fill_the_minutes_of_all_cores():
    settings = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    config = ParetoConfig(**{**settings, "threads": 2, "seeds": 2})
    measured = {"resnet_micro": {"epoch_seconds": 30.0}, "vit_micro": {"epoch_seconds": 1e4}}
    found = {p.name: p.config.epochs for p in equal_time.plan(config, MODELS, measured)}
    assert found == {
        **{"resnet_micro-s0": 4, "vit_micro-s0": 1},
        **{"resnet_micro-s1": 4, "vit_micro-s1": 1},
    }
    del measured["vit_micro"]
    assert len(equal_time.plan(config, MODELS, measured)) == 2


# Deployed figures, and finished runs


def write_run(folder, name, accuracy):
    """A run that ended elsewhere, without weights."""
    run = folder / name
    run.mkdir(parents=True)
    scores = {"accuracy": accuracy, "macro_f1": accuracy}
    measured = {"test": scores, "select_on": "validation", "best_epoch": 1, "epochs": 2}
    measured |= {"parameters": 500, "macs": 4000, "training_seconds": 90.0, "references": []}
    measured |= {"seed": 0}
    content = {"measured": measured, "model": {"name": "resnet18_cifar"}, "run": name}
    content |= {"data": {"name": "digits", "train": 900, "test": 359}, "provenance": {}}
    (run / "summary.json").write_text(json.dumps(content))
    (run / "metrics.csv").write_text("epoch,seconds,validation_accuracy\n1,40,0.5\n2,90,0.4\n")
    return run


@pytest.fixture
def deploy(monkeypatch):
    """Figures of ONNX files without files: the runs that were measured."""
    found = []

    def measure(runs, root, rounds, threads, tell):
        found.append({name: path.name for name, path in runs.items()})
        one = {"bytes": 2000, "median_ms": 0.5}
        return {name: {"int8_points": -1.0, "float32": one, "int8": one} for name in runs}

    monkeypatch.setattr(equal_time, "measure_deployed", measure)
    monkeypatch.setattr(
        equal_time, "draw_panels", lambda panels, file: file.write_bytes(b"\x89PNG")
    )
    return found


def finished(source, **changes):
    return ParetoConfig(data=DataConfig("digits"), finished=source, **changes)


def rows(folder):
    told = json.loads((folder / "summary.json").read_text())["measured"]
    return {row["model"]: row for row in told["Accuracy against cost"]["models"]}


def test_runs_are_read_by_their_names_and_seeds(deploy, tmp_path):
    source = tmp_path / "runs"
    for name, accuracy in (("a-seed0", 0.5), ("a-seed12", 0.7), ("a-seed1-seed2", 0.9)):
        write_run(source, name, accuracy)
    write_run(source, "b-seedx", 0.1)
    write_run(source, "-seed3", 0.1)
    (source / "c-seed0").mkdir()
    run_study("pareto", finished(source), tmp_path / "study")
    found = rows(tmp_path / "study")
    assert set(found) == {"a", "a-seed1"}
    assert (found["a"]["runs"], found["a"]["test"]) == (2, pytest.approx(60))
    assert (found["a"]["minutes"], found["a"]["epochs"]) == (1.5, 2)
    assert found["a"]["int8_points"] == -1
    assert deploy == [{"a": "a-seed0", "a-seed1": "a-seed1-seed2"}]
    run_study("pareto", finished(source, models=("a-seed1",)), tmp_path / "one")
    assert set(rows(tmp_path / "one")) == {"a-seed1"}


def test_figures_are_measured_again_for_other_runs_of_the_same_names(deploy, tmp_path):
    study = tmp_path / "study"
    write_run(tmp_path / "first", "a-seed0", 0.5)
    write_run(tmp_path / "second", "a-seed0", 0.75)
    run_study("pareto", finished(tmp_path / "first"), study)
    run_study("pareto", finished(tmp_path / "first"), study)
    assert len(deploy) == 1
    run_study("pareto", finished(tmp_path / "second"), study)
    assert len(deploy) == 2
    assert rows(study)["a"]["test"] == 75
    run_study("pareto", finished(tmp_path / "second", latency_rounds=9), study)
    assert len(deploy) == 3


def test_figures_of_an_earlier_version_are_kept(deploy, tmp_path):
    study = tmp_path / "study"
    write_run(tmp_path / "first", "a-seed0", 0.5)
    run_study("pareto", finished(tmp_path / "first"), study)
    known = json.loads((study / "deployed.json").read_text())
    del known["summaries"]
    (study / "deployed.json").write_text(json.dumps(known))
    run_study("pareto", finished(tmp_path / "first"), study)
    assert len(deploy) == 1


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_figures_are_measured_again(deploy, tmp_path, content):
    study = tmp_path / "study"
    write_run(tmp_path / "first", "a-seed0", 0.5)
    run_study("pareto", finished(tmp_path / "first"), study)
    (study / "deployed.json").write_bytes(content.encode("latin-1"))
    run_study("pareto", finished(tmp_path / "first"), study)
    assert len(deploy) == 2
    assert rows(study)["a"]["int8_ms"] == 0.5
