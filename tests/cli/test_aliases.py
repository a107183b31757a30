"""Short names of options, and hints for the names of other tools."""

from pathlib import Path

import pytest

from smallfry.cli import main
from smallfry.cli._aliases import ALIASES, ELSEWHERE, PLACES, expand_aliases, like_named
from smallfry.cli._parser import expand_shorthand, form_of, read

OPTIONS = ["model.name", "model.start", "model.freeze", "model.freeze_epochs", "optimizer.lr"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--pretrained"], ["--model.start", "true"]),
        (["--pretrained", "--freeze"], ["--model.start", "true", "--model.freeze", "[backbone]"]),
        (["--pretrained", "runs/a"], ["--model.start", "runs/a"]),
        (["--pretrained=a=b"], ["--model.start", "a=b"]),
        (["--freeze", "stem.*"], ["--model.freeze", "[stem.*]"]),
        (["--freeze", "[a, b]"], ["--model.freeze", "[a, b]"]),
        (["--freeze_epochs", "3"], ["--model.freeze_epochs", "3"]),
        (["--model", "--pretrainedx", "freeze"], ["--model.name", "--pretrainedx", "freeze"]),
    ],
)
def test_short_names_become_options(given, expected):
    assert expand_shorthand(given, OPTIONS) == expected


def test_a_verb_without_the_option_keeps_the_word():
    assert expand_aliases(["--freeze", "x"], ["data.name"]) == ["--freeze", "x"]


def test_every_alias_is_an_option_of_training_and_every_hint_one_of_a_verb():
    training = form_of(("train",)).types
    assert {alias.option for alias in ALIASES.values()} <= {*training}
    verbs = ("export", "predict", "benchmark", "fit")
    known = {*training}.union(*(form_of((verb,)).types for verb in verbs))
    for hints in (*ELSEWHERE.values(), *PLACES.values()):
        assert {*hints} <= known


def test_the_picture_of_a_batch_has_a_default_name():
    assert read(["train", "--show_batch"]).options.show_batch == Path("batch.png")
    assert read(["train", "--show_batch", "x.png"]).options.show_batch == Path("x.png")
    assert read(["train"]).options.show_batch is None


def test_short_names_are_read():
    command = ["train", "--model", "resnet18", "--pretrained", "--freeze", "--freeze_epochs", "2"]
    model = read(command).options.settings.model
    assert (model.start, model.freeze, model.freeze_epochs) == ("true", ["backbone"], 2.0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("img-size", "data.image_size"),
        ("img_size", "data.image_size"),
        ("imgsz", "data.image_size"),
        ("lr", "optimizer.lr"),
        ("learning-rate", "optimizer.lr"),
        ("batch-size", "batch_size"),
        ("weight-decay", "optimizer.weight_decay"),
        ("label-smoothing", "objective.label_smoothing"),
        ("max_epochs", "epochs"),
        ("wd", "optimizer.weight_decay"),
        ("lr0", "optimizer.lr"),
        ("output-dir", "run"),
        ("project", "run"),
        ("random_state", "seed"),
        ("weights", "model.start"),
    ],
)
def test_names_of_other_tools_get_the_right_one(name, hint, capsys):
    assert main(["train", f"--{name}", "1"]) == 2
    assert f"train has no option '{name}'; did you mean '{hint}'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["export", "RUN", "--format", "onnx"], "no option 'format'; did you mean 'target'?"),
        (["export", "RUN", "--output", "x"], "export has no option 'output'; did you mean 'to'?"),
        (["evaluate", "RUN", "--output", "x"], "evaluate has no option 'output'; there are attack"),
        (["fit", "--model", "resnet18"], "fit has no option 'model'; did you mean 'candidates'?"),
        (["export", "RUN", "--half"], "export has no option 'half'; did you mean 'precision'?"),
        (["benchmark", "RUN", "--output", "x"], "did you mean 'folder'?"),
        (["train", "--num-classes", "3"], "leave it out: the classes are those of the data"),
        (["train", "--model.num_classes", "3"], "leave it out: the classes are those of the data"),
    ],
)  # fmt: skip
def test_names_of_other_tools_are_those_of_the_verb(words, hint, capsys):
    assert main(words) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "inputs", "model", "source", "weights"])
def test_a_value_with_a_place_needs_no_option(name, capsys):
    assert main(["predict", f"--{name}", "x"]) == 2
    hint = f"; give its value without '--{name}': smallfry predict RUN INPUTS"
    assert f"predict has no option '{name}'{hint}" in capsys.readouterr().err


def test_a_name_like_none_gets_no_hint():
    assert like_named("xyzzy", OPTIONS) == ""
    assert like_named("name", ["model.name", "data.name"]) == (
        "; did you mean 'data.name' or 'model.name'?"
    )
