"""Settings of studies, their recipes, and their files when they are damaged."""

import pytest

from smallfry.errors import RunError, UsageError
from smallfry.report.runs import Outcome
from smallfry.studies import fast_recipe, grid
from smallfry.studies.config import OptimizersConfig, ParetoConfig, RunsConfig
from smallfry.studies.fast_recipe import OTHERS, RATES, rates_of
from smallfry.studies.folder import STUDY
from smallfry.studies.recipes import Planned, recipe
from smallfry.studies.study import run_study
from smallfry.studies.study_models import STUDY_MODELS, StudyModel
from smallfry.training.config import DataConfig, TrainConfig

# Recipes


def test_rates_are_those_of_the_longest_name_that_begins_a_models():
    for name in RATES:
        assert rates_of(StudyModel("x", name)) is RATES[name]
    for entry in STUDY_MODELS.values():
        fitting = [name for name in RATES if entry.model.startswith(name)]
        expected = RATES[max(fitting, key=len)] if fitting else OTHERS
        assert rates_of(entry) is expected, entry.model


@pytest.mark.parametrize(
    "data", ["cifar10", "cifar100", "mnist", "fashion_mnist", "digits", "a/cifar10"]
)
def test_crops_and_flips_at_the_test_are_of_small_named_pictures(data):
    config = ParetoConfig(data=DataConfig(data), threads=3, select_on="test")
    made = fast_recipe.fast_recipe(STUDY_MODELS["loopnet_1m"], config, 30, 2)
    is_sized = data in ("cifar10", "cifar100", "mnist", "fashion_mnist")
    assert (made.augment.crop_padding, made.augment.cutout) == ((2, 8) if is_sized else (None, 0))
    assert made.test_flips is data.startswith("cifar")
    assert (made.threads, made.select_on, made.schedule.warmup_epochs) == (3, "test", 3.0)
    assert made.objective.label_smoothing == 0.1


def test_means_that_are_given_replace_the_papers():
    entry = STUDY_MODELS["vit_small"]
    given = DataConfig("cifar10", mean=[0.1] * 3, std=[0.2] * 3)
    assert recipe(entry, RunsConfig(data=given), 64).data.mean == [0.1] * 3
    assert recipe(entry, RunsConfig(), 64).data.std == [0.247, 0.2435, 0.2616]
    made = recipe(
        entry, RunsConfig(precision="bf16-mixed", threads=2, select_on="test"), 64, seed=9
    )
    assert (made.precision, made.threads, made.select_on, made.seed) == ("bf16-mixed", 2, "test", 9)


# Settings and files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_lists_of_numbers_that_are_none_are_refused(tmp_path, value):
    config = OptimizersConfig(lr_factors=(1.0, value))
    with pytest.raises(UsageError, match="lr_factors: give at least one, all above 0 and finite"):
        run_study("optimizer", config, tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("changes", [{"minutes": 1.0}, {}])
@pytest.mark.parametrize("threads", [0, -2])
def test_threads_are_checked_before_anything_is_written(tmp_path, changes, threads):
    with pytest.raises(UsageError, match=f"threads must be at least 1, got {threads}"):
        run_study("pareto", ParetoConfig(threads=threads, **changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "{}", '{"study": "toy"}', '{"study": "toy", "runs": []}',
                '{"study": "toy", "runs": {"a": 3}}', "\xff"],
)  # fmt: skip
def test_what_is_no_study_file_is_named(tmp_path, content):
    (tmp_path / STUDY).write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=r"study.json: not a study file .*use another --folder"):
        grid.claim("toy", [Planned("a", {"seed": 0}, TrainConfig())], tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", "\xff"])
def test_a_damaged_note_of_a_failure_is_named(tmp_path, content):
    plan = Planned("a", {"seed": 0}, TrainConfig())
    run = grid.run_path(tmp_path, "a")
    run.mkdir(parents=True)
    assert grid.read_outcome(plan, tmp_path) is None
    (run / "failure.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"failure.json: damaged .*then the run is made again"):
        grid.read_outcome(plan, tmp_path)
    (run / "failure.json").write_text('{"failure": "nan"}')
    assert grid.read_outcomes([plan], tmp_path) == [Outcome("a", {"seed": 0}, None, [], "nan")]
