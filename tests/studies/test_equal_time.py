"""Study at equal time: epochs from a measured speed, and the report of finished runs."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from smallfry.errors import Stopped, UsageError
from smallfry.studies import deployed, equal_time, speed
from smallfry.studies.config import ParetoConfig
from smallfry.studies.equal_time import MODELS, is_on_front
from smallfry.studies.fast_recipe import fast_recipe
from smallfry.studies.speed import SpeedReporter, cores_of, epochs_within, measure_epoch
from smallfry.studies.study import run_study
from smallfry.studies.study_models import STUDY_MODELS, StudyModel
from smallfry.training.config import DataConfig, read_config
from smallfry.training.continuation import with_changes
from smallfry.training.run import RunFolder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECIPES = Path(__file__).parents[2] / "recipes" / "fast"
SMALL = ParetoConfig(
    data=DataConfig("digits", limit=60),
    device="cpu",
    threads=1,
    minutes=1e-6,
    speed_seconds=0.01,
    latency_rounds=3,
    models=("resnet_micro",),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that the tests only read."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    run_study("pareto", SMALL, folder)
    return folder


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    summary = json.loads((folder / "summary.json").read_text())
    models = summary["measured"]["Accuracy against cost"]["models"]
    return {row["model"]: row for row in models}


# Recipes


@pytest.mark.parametrize("size", ["2m", "300k", "70k"])
def test_recipes_of_loopnet_are_those_of_the_recipes_folder(size: str) -> None:
    kept = read_config(RECIPES / f"loopnet_{size}_cifar10.yaml")
    config = ParetoConfig(data=kept.data, threads=2)
    made = fast_recipe(STUDY_MODELS[f"loopnet_{size}"], config, kept.epochs, 0)
    made = replace(made, threads=None, progress=kept.progress, schedule=kept.schedule)
    assert replace(made, augment=replace(made.augment, flip=True)) == kept


def test_other_models_are_trained_as_their_kind_is() -> None:
    config = ParetoConfig(threads=2)
    made = {name: fast_recipe(STUDY_MODELS[name], config, 20, 3) for name in MODELS}
    adam = {name for name, each in made.items() if each.optimizer.name == "adamw"}
    assert adam == {"vitrm_thrifty", "vitrm_tiny", "cct_2_3x2", "cct_4_3x2"}
    assert made["vitrm_tiny"].objective.name == "deep_supervision"
    assert {n for n, m in made.items() if m.precision == "32-true"} == {"mobilenetv3_small"}
    assert {(m.seed, m.epochs, m.schedule.warmup_epochs) for m in made.values()} == {(3, 20, 2.0)}
    named = replace(config, precision="16-mixed")
    assert fast_recipe(STUDY_MODELS["resnet20_he"], named, 1, 0).precision == "16-mixed"


def test_small_images_are_neither_cropped_nor_blanked_by_sizes_for_larger_ones() -> None:
    made = fast_recipe(STUDY_MODELS["resnet_micro"], SMALL, 1, 0)
    assert (made.augment.crop_padding, made.augment.cutout, made.test_flips) == (None, 0, False)


def test_models_of_the_front_exist() -> None:
    for name in MODELS:
        if name != "simplenet_310k":
            assert timm.is_model(STUDY_MODELS[name].model), name


# Speed


def test_epochs_are_the_nearest_to_the_time_and_one_at_least() -> None:
    assert [epochs_within(s, {"epoch_seconds": 10.0}) for s in (1, 14, 16, 100)] == [1, 1, 2, 10]
    assert cores_of("cpu", 2) == 2
    assert cores_of("cuda", 2) == 1


def test_steps_are_counted_after_the_first_two_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([100.0, 7.0, 8.0, 9.0, 10.0, 12.5, 99.0])
    monkeypatch.setattr(speed.time, "process_time", lambda: next(clock))
    reporter = SpeedReporter(4.0, on_cpu=True)
    for _ in range(5):
        reporter.step(0.0, 1.0)
    with pytest.raises(speed.Measured):
        reporter.step(0.0, 1.0)
    assert (reporter.done, reporter.spent) == (6, 5.5)


def test_an_epochs_seconds_are_those_of_its_steps_and_of_the_evaluation() -> None:
    config = fast_recipe(STUDY_MODELS["resnet_micro"], SMALL, 1, 0)
    config = replace(config, batch_size=10, data=DataConfig("digits", limit=60, validation=0.2))
    found = measure_epoch(config, 0.02)
    assert found["steps"] >= speed.FEWEST
    assert found["steps_per_epoch"] > 1
    training = found["steps_per_epoch"] * found["step_seconds"]
    assert found["epoch_seconds"] == pytest.approx(training * (1 + 0.25 / 3))


# Whole


@pytest.mark.slow
def test_a_study_trains_as_many_epochs_as_fit_and_measures_what_is_deployed(whole: Path) -> None:
    (row,) = rows(whole).values()
    measured = json.loads((whole / "speed.json").read_text())["models"]["resnet_micro"]
    assert row["epochs"] == epochs_within(60e-6, measured) == 1
    assert row["test"] > 0
    assert row["cpu_minutes"] > 0
    assert row["int8_bytes"] < row["float32_bytes"] / 2
    assert min(row["int8_ms"], row["float32_ms"]) > 0
    assert abs(row["int8_points"]) <= 100
    page = (whole / "report.html").read_text()
    assert "1 of 1 runs have ended" in page
    assert "http" not in re.sub(r'http-equiv|"data:image[^"]*"', "", page)
    assert (whole / "pictures" / "pareto.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_was_measured_and_trained_is_kept(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    monkeypatch.setattr(equal_time, "measure_epoch", pytest.fail)
    monkeypatch.setattr(equal_time, "measure_deployed", pytest.fail)
    monkeypatch.setitem(STUDY_MODELS, "later", StudyModel("Later", "no_such_model"))
    run_study("pareto", replace(SMALL, models=("later", "resnet_micro")), folder)
    said = capsys.readouterr().out
    assert "later is left out: no_such_model is not registered with timm here" in said
    assert rows(folder) == rows(whole)
    with pytest.raises(UsageError, match="have epochs 1, not"):
        run_study("pareto", replace(SMALL, minutes=10.0), folder)


def test_a_study_stopped_while_it_measures_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, models=("resnet_micro", "cct_micro"))
    folder, step = tmp_path / "study", SpeedReporter.step

    def stop(self: SpeedReporter, *told: Any) -> None:
        if (folder / "speed.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, *told)

    with monkeypatch.context() as patch:
        patch.setattr(SpeedReporter, "step", stop)
        with pytest.raises(Stopped, match=r"what ended is in .*, the same command goes on"):
            run_study("pareto", config, folder)
    known = json.loads((folder / "speed.json").read_text())["models"]
    assert list(known) == ["resnet_micro"]
    again: list[str] = []

    def measure(config: Any, seconds: float) -> dict[str, float]:
        again.append(config.model.name)
        return {"epoch_seconds": 1.0}

    monkeypatch.setattr(equal_time, "measure_epoch", measure)
    monkeypatch.setattr(equal_time, "measure_deployed", lambda *_: {})
    monkeypatch.setattr(equal_time, "run_grid", lambda *_: [])
    run_study("pareto", config, folder)
    assert again == [STUDY_MODELS["cct_micro"].model]
    assert list(json.loads((folder / "speed.json").read_text())["models"]) == list(config.models)
    run_study("pareto", replace(config, threads=2), folder)  # another speed
    assert len(again) == 3


def test_a_model_that_can_not_be_trained_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = StudyModel("Wrong", "cct_2_3x2_32", {"embed_dim": 7})
    monkeypatch.setitem(STUDY_MODELS, "wrong", wrong)
    monkeypatch.setattr(equal_time, "run_grid", lambda *_: [])
    run_study("pareto", replace(SMALL, models=("wrong",)), tmp_path / "study")
    assert "wrong is left out: " in capsys.readouterr().out


# Finished runs


@pytest.fixture(scope="module")
def elsewhere(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs without weights, as ``benchmarks/runs.py`` keeps them, and other files."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("net-seed0", "net-seed1", "unfinished-seed0"):
        (folder / name).mkdir()
        for file in ("config.yaml", "metrics.csv", "summary.json"):
            shutil.copy(whole / "runs" / "resnet_micro-s0" / file, folder / name)
    (folder / "unfinished-seed0" / "summary.json").unlink()
    (folder / "log.json").write_text("{}")
    return folder


@pytest.mark.slow
def test_finished_runs_are_reported_and_deployed_without_their_weights(
    whole: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, minutes=None, finished=elsewhere, models=None)
    page = run_study("pareto", config, tmp_path / "study")
    (own,), (row,) = rows(whole).values(), rows(tmp_path / "study").values()
    assert (row["model"], row["runs"], row["deviation"]) == ("net", 2, 0.0)
    for name in ("test", "parameters", "macs", "epochs", "cpu_minutes"):
        assert row[name] == pytest.approx(own[name])
    for name in ("float32_bytes", "int8_bytes"):
        assert row[name] == pytest.approx(own[name], rel=0.02)
    assert row["int8_points"] is None
    assert "Pareto: digits, finished runs" in page.read_text()
    monkeypatch.setattr(equal_time, "measure_deployed", pytest.fail)
    run_study("pareto", config, tmp_path / "study")


def test_runs_that_are_not_there_are_named(elsewhere: Path, tmp_path: Path) -> None:
    config = replace(SMALL, minutes=None, finished=elsewhere, models=("net", "unfinished"))
    with pytest.raises(UsageError, match="no run NAME-seedN of unfinished with a summary"):
        run_study("pareto", config, tmp_path / "study")
    with pytest.raises(UsageError, match=r"no run NAME-seedN with a summary.json is there"):
        run_study("pareto", replace(config, finished=tmp_path, models=None), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_run_of_images_of_unknown_size_has_no_latency(elsewhere: Path, tmp_path: Path) -> None:
    run = tmp_path / "net-seed0"
    shutil.copytree(elsewhere / "net-seed0", run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("name: digits", "name: photos", 1))
    found = deployed.measure_deployed({"net": run}, None, 3, 1, lambda _: None)
    assert "size of its images is not known" in found["net"]["error"]
    assert RunFolder(run).read_summary() is not None


def test_contradictions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDY_MODELS, "later", StudyModel("Later", "no_such_model"))
    for changes, said in (
        ({"finished": tmp_path}, "give one"),
        ({"minutes": 0.0}, "minutes must be more than 0 and finite, got 0.0"),
        ({"minutes": float("inf")}, "minutes must be more than 0"),
        ({"speed_seconds": -1.0}, "speed_seconds must be more than 0"),
        ({"models": ("later",)}, "none of the models is registered: later"),
        ({"models": ("resnet_mikro",)}, "did you mean 'resnet_micro'"),
    ):
        with pytest.raises(UsageError, match=said):
            run_study("pareto", replace(SMALL, **changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_model_is_on_the_front_if_none_is_as_cheap_and_better() -> None:
    given = {
        "cheap": {"macs": 1, "test": 80.0},
        "beaten": {"macs": 3, "test": 85.0},
        "good": {"macs": 2, "test": 90.0},
        "twin": {"macs": 2, "test": 90.0},
        "equal": {"macs": 4, "test": 90.0},
        "failed": {"macs": 0, "test": None},
        "unknown": {"macs": None, "test": 99.0},
    }
    assert [n for n in given if is_on_front(n, "macs", given)] == ["cheap", "good", "twin"]


def test_the_queues_front_is_the_studys() -> None:
    entries = yaml.safe_load((BENCHMARKS / "lists" / "cpu.yaml").read_text())
    front = [entry for entry in entries if entry["name"].startswith("front_")]
    assert {entry["name"].removeprefix("front_") for entry in front} == set(MODELS)
    config = ParetoConfig(data=DataConfig("cifar10", validation=0.02), threads=1)
    for entry in front:
        model = STUDY_MODELS[entry["name"].removeprefix("front_")]
        listed = with_changes(read_config(BENCHMARKS.parent / entry["recipe"]), entry["settings"])
        made = fast_recipe(model, config, listed.epochs, 0)
        made = replace(made, augment=replace(made.augment, flip=True), progress=listed.progress)
        assert listed == made, entry["name"]
