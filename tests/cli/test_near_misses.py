"""Near misses on the command line: what was wrong, what was expected, and the exit code."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from torch import nn

from smallfry.cli import main
from smallfry.cli._explain import explain
from smallfry.cli._numbers import join_numbers
from smallfry.cli._parser import expand_home, form_of, read
from smallfry.cli._shared import EarlyExit
from smallfry.cli._tuning import LOWER_RATE, tuning_config
from smallfry.cli.compress import CompressConfig
from smallfry.errors import UsageError
from smallfry.training.config import DataConfig, ScheduleConfig, TrainConfig

ROUND = "[round_weights]"


def told(capsys, code, *words):
    """The one line that a wrong command prints."""
    assert main(words) == code
    error = capsys.readouterr().err
    assert "an error inside smallfry" not in error
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize("option", ["--task", "--resume", "--config", "--run", "--data.root"])
def test_an_option_without_its_value_is_wrong_usage(option, capsys):
    assert f"argument {option}: expected one argument" in told(capsys, 2, "train", option)
    assert f"argument {option}: expected" in told(capsys, 2, "train", "--epochs=1", option)
    said = told(capsys, 2, "train", option, "--epochs", "1")
    assert f"argument {option}: expected one argument" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--task="], "unknown task ''"),
        (["train", "--task", "puzle"], "unknown task 'puzle'; did you mean 'puzzle'?"),
        (["train", "--code"], "--code: expected one argument"),
        (["train", "extra"], "unrecognized arguments: extra"),
        (["train", "--epochs", "3", "4"], "unrecognized arguments: 4; smallfry train --help descr"),
        (
            ["train", "my photos"],
            "unrecognized arguments: my photos; did you mean --data 'my photos'",
        ),
        (
            ["train", "--data", "my", "photos"],
            "photos; smallfry train --help describes what it tak",
        ),
        (["train", "data=photos", "epochs=1"], "epochs=1; did you mean --data photos?"),
        (["export", "run", "new"], "unrecognized arguments: new; did you mean --to new?"),
        (["export", "run", "."], "unrecognized arguments: .; did you mean --data .?"),
        (["compress", "a", "--methods.lsq.bits", "8"], "compress has no option 'methods.lsq.bits'"),
        (
            ["fit", "--candidates", "a"],
            "expected list[str] or null, got 'a'; a list has brackets: '[a]'",
        ),
        (["train", "--augment.sizes", "8,16"], "got '8,16'; a list has brackets: '[8,16]'"),
        (["train", "--data.image_size", "8x8"], "expected int or list[int] or null, got '8x8'\n"),
        (["train", "--optimizer.lr.x=3"], "no option 'optimizer.lr.x'; did you mean 'optimizer.lr"),
        (["train", "--seed.x", "3"], "train has no option 'seed.x'; did you mean 'seed'"),
        (["train", "--data.image_size", "1.5"], "expected int or list[int] or null, got '1.5'"),
        (["evaluate"], "the following arguments are required: run"),
        (["evaluate", "a", "--eps"], "argument --eps: expected one argument"),
        (["evaluate", "a", "--checkpoint", "bset"], "one of best, last, got 'bset'; did you mean"),
        (["evaluate", "a", "--exit_drop", "0.1", "--exit_steps", "2"], "exit_drop excludes exit_"),
        (["predict", "a", "b", "--exit_drop=1", "--exit_threshold=1"], "excludes"),
        (["predict", "a", "b", "--top_k", "-1"], "top_k must be at least 1, got -1"),
        (["serve", "a", "--port", "many"], "port: expected int, got 'many'"),
        (["export", "a", "--precision", "int4"], "got 'int4'; did you mean 'int8'?"),
        (
            ["export", "a", "--target", "onx"],
            "there is no device format 'onx'; did you mean 'onnx'",
        ),
        (["share", "a"], "share needs either --to FOLDER, or --hub USER/NAME"),
        (["share", "a", "--to", "b", "--hub", "c/d"], "share needs either"),
        (["share", "a", "--to", "b", "--private"], "share needs either"),
        (["search"], "a search needs a folder: --to DIR"),
        (["evolve"], "an evolution needs a folder: --to DIR"),
        (["fit"], "a fit needs a budget of the device"),
        (["fit", "--max_kb", "100"], "a fit needs a folder: --to DIR"),
        (["fit", "--max_kb", "0", "--to", "x"], "max_kb"),
        (["fit", "--max_kb", "9", "--minutes", ".nan", "--to", "x"], "minutes"),
        (["study"], "expected a study: "),
        (["study", "recursoin"], "unknown study 'recursoin'; did you mean 'recursion'?"),
        (["analyze", "a", "--images", "1"], "images is at least 2"),
        (["analyze", "a", "colapse"], "unknown question 'colapse'; did you mean 'collapse'?"),
        (["models", "nothing*"], "no model of smallfry matches 'nothing*'"),
        (["completion"], "expected a shell: bash, zsh or fish"),
        (["completion", "bahs"], "did you mean 'bash'?"),
        (["compress", "a", "--methods", "round_weights"], "methods: expected list"),
        ([""], "unknown verb ''"),
        (["-x"], "smallfry has no option 'x'; see smallfry --help"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_told_in_a_line_with_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in told(capsys, 2, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {image-size: 3}", "train has no option 'data.image-size'; did you mean 'data.imag"),
        ("batch-size: 3", "train has no option 'batch-size'; did you mean 'batch_size'?"),
        ("größe: 3", "train has no option 'größe'; smallfry train --help lists them"),
        ("'a b': 3", "a b"),
        ("", "config: expected lines of settings, such as 'epochs: 3', got nothing"),
        ("- a\n- b", "expected lines of settings, such as 'epochs: 3', got - a - b"),
        ("just words", "expected lines of settings, such as 'epochs: 3', got just words"),
        ("x" * 5000, "config: expected lines of settings, such as 'epochs: 3', got xxx"),
        ("epochs: [1]", "epochs: expected int, got '[1]'"),
        ("data: {limit: x}", "data.limit: expected int or null, got 'x'"),
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_file_of_settings_is_told_in_a_line(text, message, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    error = told(capsys, 2, "train", "--config", str(tmp_path / "c.yaml"))
    assert message in error
    assert len(error) < 1200


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_an_option_with_two_letters_exchanged_is_recognised(verb):
    types = form_of((verb,)).types
    names = {*types}
    for name in names:
        group, dot, last = name.rpartition(".")
        if len(last) < 5:
            continue
        wrong = f"{group}{dot}{last[0]}{last[2]}{last[1]}{last[3:]}"
        if wrong in names or any(wrong.startswith(f"{each}.") for each in names):
            continue
        said = explain(SimpleNamespace(__cause__=None), [f"--{wrong}=1"], verb, types)
        assert said.startswith(f"{verb} has no option '{wrong}'; did you mean ")
        assert f"'{name}'" in said or "or" in said


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (int, "expected int"),
        (bool | None, "expected bool or null"),
        (Literal["a", "b"], "expected one of a, b"),
        (Literal[1, 2] | None, "expected one of 1, 2 or null"),
        (dict[str, Any], "expected dict"),
        (list[int] | int, "expected list[int] or int"),
        (Path | None, "expected Path or null"),
    ],
)
def test_every_type_has_a_name(hint, expected):
    class Wrong(Exception):
        def __str__(self):
            return 'Parser key "x": of no kind\n  Got value: v'

    assert explain(Wrong(), [], "train", {"x": hint}) == f"x: {expected}, got 'v'"


# Numbers


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--mean", "0.5"], ["--mean", "[0.5]"]),
        (["--mean=0.5"], ["--mean=[0.5]"]),
        (["--mean", "-1", "+.5", "1e-3", "2."], ["--mean", "[-1,+.5,1e-3,2.]"]),
        (["--mean", "[0.5,0.5]"], ["--mean", "[0.5,0.5]"]),
        (["--mean=[0.5]"], ["--mean=[0.5]"]),
        (["--mean", "null"], ["--mean", "null"]),
        (["--mean"], ["--mean"]),
        (["--mean", "--size", "3"], ["--mean", "--size", "3"]),
        (["--size", "3"], ["--size", "3"]),
        (["--size=3"], ["--size=3"]),
        (["--size", "3", "4"], ["--size", "[3,4]"]),
        (["--size", "3", "x", "4"], ["--size", "3", "x", "4"]),
        (["--names", "1", "2"], ["--names", "1", "2"]),
        (["--rate", "1", "2"], ["--rate", "1", "2"]),
        (["1", "2", "--mean", "3"], ["1", "2", "--mean", "[3]"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_behind_a_list_are_joined(words, joined):
    types = {"mean": list[float] | None, "size": int | list[int], "names": list[str], "rate": float}
    assert join_numbers(words, types) == joined


def test_a_single_mean_is_that_of_grey_images():
    words = ["train", "--data.mean", "0.5", "--data.std=0.25", "--schedule.milestones", "3"]
    words.append("--schedule.shape=steps")
    settings = read(words).options.settings
    assert (settings.data.mean, settings.data.std) == ([0.5], [0.25])
    assert settings.schedule.milestones == [3]
    assert read(["train", "--data.image_size", "32"]).options.settings.data.image_size == 32
    assert read(["train", "--data.image_size", "32", "16"]).options.settings.data.image_size == [
        *(32, 16)
    ]


def test_the_home_folder_stands_at_the_start_of_a_path_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["~", "~/a", "--to=~/b", "--data.root=~", "a~/b", "~you/c", "--to=a~", "--x", "~/d\ne"]
    assert expand_home(words) == [
        *("/home/me", "/home/me/a", "--to=/home/me/b", "--data.root=/home/me"),
        *("a~/b", "~you/c", "--to=a~", "--x", "/home/me/d\ne"),
    ]


NOBODY = "~nobody-of-this-name/x"


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, ["train", "--data", NOBODY], f"'{NOBODY}' is neither a folder nor a known data set"),
        (1, ["train", "--data=cifar10", "--data.root", NOBODY], f"/{NOBODY}'"),
        (1, ["train", "--resume", NOBODY], f"{NOBODY}: there is no such run folder"),
        (1, ["evaluate", NOBODY], f"{NOBODY}: there is no such file or folder"),
        (1, ["serve", NOBODY], f"{NOBODY}: no such export folder"),
        (1, ["train", "--show_batch", f"{NOBODY}.png"], "there is no such user here; write it"),
        (1, ["train", "--code", NOBODY], "there is no such user here; write it without ~"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_the_home_of_nobody_is_no_error_inside(code, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in told(capsys, code, *words)
    assert not list(tmp_path.iterdir())


def test_the_home_folder_is_meant_in_a_file_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.yaml").write_text("to: ~/small\nmethods: [round_weights]\n")
    options = read(["compress", "run", "--config", str(tmp_path / "c.yaml")]).options
    assert options.to == Path("/home/me/small")
    (tmp_path / "c.yaml").write_text("data: {root: ~/sets, name: digits}\nfolder: ~/s\n")
    found = read(["study", "recursion", "--config", str(tmp_path / "c.yaml")]).options
    assert found.folder == Path("/home/me/s")


def test_early_exits_exclude_each_other():
    assert EarlyExit(exit_drop=0.0).exit_drop == 0
    with pytest.raises(UsageError, match="exit_drop excludes exit_steps; use one of them"):
        EarlyExit(exit_drop=0.0, exit_steps=1.0)


# Compression


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, -math.inf])
def test_a_budget_is_a_finite_time(minutes):
    with pytest.raises(UsageError, match="minutes must be a finite number above 0, got"):
        CompressConfig(["round_weights"], minutes=minutes)
    assert CompressConfig(["round_weights"], minutes=0.1).tunes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": []}, "methods is empty"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 1, "minutes": 1}, "epochs excludes minutes"),
        ({"epochs": 1, "distill": 1.5}, "distill is 0 to 1, not 1.5"),
        ({"epochs": 1, "distill": math.nan}, "distill is 0 to 1, not nan"),
        ({"distill": 0.5}, "need a budget"),
        ({"tuning": {"batch_size": 3}}, "need a budget"),
    ],
)
def test_settings_of_a_compression_are_checked(settings, said):
    with pytest.raises(UsageError, match=said):
        CompressConfig(**{"methods": ["round_weights"], **settings})


def written(folder, config):
    """A run folder with nothing but settings."""
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(config.to_dict()))
    return str(folder)


def trained(splits=None):
    manifest = {"data": {} if splits is None else {"splits": splits}}
    return SimpleNamespace(model=nn.Linear(2, 2), manifest=manifest)


def tuned(run, place, data=None, changes=None, distill=0.0, model=None):
    return tuning_config(model or trained(), run, place, data, 7, 3, distill, changes or {})


def test_fine_tuning_has_a_tenth_of_the_rate_and_none_of_what_is_the_runs(tmp_path):
    before = TrainConfig(epochs=50, patience=5, batch_size=33, data=DataConfig("digits"))
    run = written(tmp_path / "run", before)
    found = tuned(run, tmp_path / "new")
    again = tuned(run, tmp_path / "new", changes={"optimizer.lr": 1.0})
    assert again.optimizer.lr == 1.0
    assert found.optimizer.lr < again.optimizer.lr
    assert (found.epochs, found.seed, found.run) == (7, 3, tmp_path / "new")
    assert (found.patience, found.references) == (None, False)
    assert (found.batch_size, found.data.name, found.model.start) == (33, "digits", run)
    assert found.distillation.teacher is None
    distilled = tuned(run, tmp_path / "new", distill=0.3)
    assert distilled.distillation.teacher == run
    rate = tuned(written(tmp_path / "other", TrainConfig(optimizer=again.optimizer)), tmp_path)
    assert rate.optimizer.lr == pytest.approx(LOWER_RATE)


def test_milestones_of_another_number_of_epochs_are_left_out(tmp_path):
    before = TrainConfig(schedule=ScheduleConfig(shape="steps", milestones=[30, 40]), epochs=50)
    schedule = tuned(written(tmp_path / "run", before), tmp_path / "new").schedule
    assert (schedule.shape, schedule.milestones) == ("cosine", [])


def test_a_shared_model_is_tuned_on_named_data_split_as_its_own(tmp_path):
    with pytest.raises(UsageError, match="the location of its data is not recorded; give --data"):
        tuned(str(tmp_path / "shared"), tmp_path)
    model = trained({"validation": 0.3, "split_seed": 5, "of_another_version": 1})
    found = tuned("shared", tmp_path, DataConfig("digits"), model=model).data
    assert (found.name, found.validation, found.split_seed) == ("digits", 0.3, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimiser.lr": 1}, "tuning has no setting 'optimiser.lr'; did you mean 'optimizer.lr'"),
        ({"optimizer": {"lr": 1}}, "tuning has no setting 'optimizer'"),
        ({"epochs": 3}, "tuning.epochs: the command sets it"),
        ({"model.name": "x"}, "tuning.model.name: the command sets it"),
        ({"seed": 1}, "tuning.seed: the command sets it"),
    ],
)
def test_settings_of_the_command_are_not_tuned(changes, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        tuned(written(tmp_path / "run", TrainConfig()), tmp_path / "new", changes=changes)
