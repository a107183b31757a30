"""Parsers made from ``Options``: every rule of ``_fields``, by a verb of this file."""

import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
from jsonargparse import ArgumentError, ArgumentParser

import smallfry.cli
from smallfry.cli import _parser, _verbs, main
from smallfry.cli._fields import (
    Choice,
    argument,
    choice_of,
    given_settings,
    group_of,
    option,
    process_count,
    settings_of,
)
from smallfry.cli._parser import expand_shorthand, read
from smallfry.errors import UsageError

VERBS = _verbs.verb_names()


@dataclass(frozen=True)
class Data:
    """Data to use.

    Args:
        name: Name of the data.
        root: Folder of the data.
    """

    name: str = "none"
    root: Path | None = None


@dataclass(frozen=True)
class Limits:
    """Limits of the work.

    Args:
        sizes: Sizes of the work.
    """

    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Settings:
    """Settings of the work.

    Args:
        data: The data.
        rate: Rate of the work.
        kind: Kind of the work.
        more: Whatever else.
        mean: Mean of the data.
    """

    data: Data = field(default_factory=Data)
    rate: float = 0.5
    kind: Literal["slow", "fast"] = "slow"
    more: dict[str, Any] = field(default_factory=dict)
    mean: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Work on images; without options, on none.

    Args:
        run: The ``run``
            folder.
        inputs: Files.
        to: Folder of the result.
        json: Print JSON.
        processes: Processes to work in.
        limits: The limits.
        other: Other data.
        settings: The settings.
        given: Given settings.
    """

    run: str
    inputs: tuple[str, ...]
    to: Path | None = option(metavar="DIR")
    json: bool = False
    processes: int | None = process_count()
    limits: Limits = group_of(Limits)
    other: Data = field(default_factory=Data)
    settings: Settings = settings_of(Settings)
    given: Mapping[str, Any] = given_settings(beside="to")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Compare works.

    Args:
        work: The work.
        pattern: A pattern.
        short: Compare quickly.
        settings: The settings.
    """

    work: str = choice_of(
        {
            "one-way": Choice(
                "Go one way.", Settings, {"data.name": "way"}, {"short": {"rate": 2}}
            ),
            "limits": Choice("Set limits.", Limits),
        }
    )
    pattern: str = argument("*")
    short: bool = False
    settings: Settings | Limits = settings_of(Settings)


def install(monkeypatch, options):
    """A verb ``work`` as if its module were in the package; what it was run with."""
    done: list[Any] = []
    module = types.ModuleType("smallfry.cli.work", "Work on images.\n\nAnd more.")
    module.Options, module.run = options, lambda options: done.append(options) or 0
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_parser, "verb_names", lambda: ["models", "work"])
    for cached in (_verbs.load_verb, _parser._form):
        cached.cache_clear()
    return done


@pytest.fixture(autouse=True)
def _forget():
    yield
    for cached in (_verbs.load_verb, _parser._form):
        cached.cache_clear()


@pytest.fixture
def work(monkeypatch):
    return install(monkeypatch, Options)


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return " ".join(capsys.readouterr().out.split())


def test_every_kind_of_field_is_parsed(work):
    assert main(["work", "r", "a.png", "b.png"]) == 0
    assert work[-1] == Options(run="r", inputs=("a.png", "b.png"))
    words = ["work", "r", "1", "--to", "x", "--json", "--sizes", "3", "4", "--other", "cifar10"]
    words += ["--data=mnist", "--rate=1e-3", "--kind", "fast", "--more.depth=2", "--data.root", "d"]
    assert main(words) == 0
    assert work[-1] == Options(
        run="r",
        inputs=("1",),
        to=Path("x"),
        json=True,
        limits=Limits((3, 4)),
        other=Data("cifar10"),
        settings=Settings(Data("mnist", Path("d")), 1e-3, "fast", {"depth": 2}),
        given={
            "data": {"name": "mnist", "root": Path("d")},
            **{"rate": 1e-3, "kind": "fast", "more": {"depth": 2}},
        },
    )


def test_given_settings_are_those_without_defaults_and_only_beside_their_option(work, tmp_path):
    (tmp_path / "c.yaml").write_text("rate: 0.5\n")
    words = ["work", "r", "i", "--config", str(tmp_path / "c.yaml"), "--data.name", "none"]
    assert main([*words, "--to", "x"]) == 0
    assert work[-1].given == {"rate": 0.5, "data": {"name": "none"}}  # although they are defaults
    assert main(words) == 0
    assert work[-1].given == {}


def test_a_configuration_is_read_once_so_that_it_may_be_a_pipe(work, monkeypatch):
    reads = []
    real = ArgumentParser.parse_args
    monkeypatch.setattr(
        ArgumentParser, "parse_args", lambda *given, **more: reads.append(1) or real(*given, **more)
    )
    assert main(["work", "r", "i", "--rate", "3"]) == 0
    assert len(reads) == 1


def test_help_is_the_docstrings(work, capsys):
    text = shown(capsys, "work", "--help")
    for part in (
        *("usage: smallfry work [--debug]", "Work on images; without options, on none."),
        *("The run folder. (required)", "--to DIR", "Folder of the result.", "Print JSON."),
        *("Limits of the work:", "--sizes SIZES [SIZES ...]", "Data to use:", "--other.name NAME"),
        *("Settings of the work:", "--kind {slow,fast}", "Rate of the work.", "--processes N"),
    ):
        assert part in text
    assert "work on images" in shown(capsys, "--help")


def test_a_printed_configuration_can_be_given_back(work, capsys, tmp_path):
    words = ["work", "r", "i", "--rate=3", "--more.depth=2", "--sizes", "7"]
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert main(["work", "r", "i", "--config", str(tmp_path / "c.yaml")]) == 0
    expected = Settings(rate=3.0, more={"depth": 2})
    assert work[-1] == Options(run="r", inputs=("i",), limits=Limits((7,)), settings=expected)


def test_a_subcommand_has_settings_defaults_and_presets_of_its_own(monkeypatch, capsys, tmp_path):
    done = install(monkeypatch, Chosen)
    assert main(["work", "one-way"]) == 0
    assert done[-1] == Chosen(work="one-way", settings=Settings(Data("way")))
    assert main(["work", "--debug", "one-way", "x*", "--short", "--data", "mine"]) == 0
    expected = Settings(Data("mine"), rate=2)
    assert done[-1] == Chosen(work="one-way", pattern="x*", short=True, settings=expected)
    assert main(["work", "limits", "--sizes", "[5]"]) == 0
    assert done[-1] == Chosen(work="limits", settings=Limits((5,)))
    text = shown(capsys, "work", "--help")
    assert "usage: smallfry work [--debug] WORK ..." in text
    assert "one-way Go one way." in text
    assert "Go one way." in shown(capsys, "work", "one-way", "--help")
    (tmp_path / "c.yaml").write_text("short: true\n")
    assert main(["work", "one-way", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "short can't be set in a file; give it on the command line" in capsys.readouterr().err
    for words, message in (
        ([], "expected a work: one-way, limits"),
        (["on-way"], "unknown work 'on-way'; did you mean 'one-way'?"),
        (["--x"], "smallfry work has no option 'x'; see smallfry work --help"),
        (["limits", "--x"], "work limits has no option 'x'"),
    ):
        assert main(["work", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r"], "the following arguments are required: inputs"),
        (["r", "i", "--sizes", "x"], "sizes: expected int, got 'x'"),
        (["r", "i", "--rate", "x"], "rate: expected float, got 'x'"),
        (["r", "i", "--kind", "fats"], "one of slow, fast, got 'fats'; did you mean 'fast'?"),
        (["r", "i", "--mean", "[a]"], "mean: expected list[float] or null, got '['a']'"),
        (["r", "i", "--more", "3"], "more: expected dict, got '3'"),
        (["r", "i", "--data.nmae=x"], "no option 'data.nmae'; did you mean 'data.name'?"),
        (["r", "i", "--more.x=1", "--rats=1"], "work has no option 'rats'; did you mean 'rate'?"),
        (["r", "i", "--rate"], "argument --rate: expected one argument"),
        (["r", "i", "--processes", "many"], "processes: expected int or null, got 'many'"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained_in_one_line(words, message, work, capsys):
    assert main(["work", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert work == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rats: 1", "work has no option 'rats'; did you mean 'rate'?"),
        ("data: {nmae: x}", "work has no option 'data.nmae'; did you mean 'data.name'?"),
        ("rate: x", "rate: expected float, got 'x'"),
        ("data: {root: [1]}", "data.root: expected Path or null, got '[1]'"),
    ],
)
def test_a_mistake_in_a_file_is_explained_alike(text, message, work, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["work", "r", "i", "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_what_the_explanations_take_from_jsonargparse():
    """The only texts of its errors that are read; a change of them fails here, by name."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--one", type=int)
    parser.add_argument("--two", type=int | None)
    parser.add_argument("--config", action="config")
    texts = {
        "--one=x": r'(?s)Parser key "one":.* Got value: x',
        "--two=x": r'(?s)Parser key "two":.* Given value: x',
        "--config={three: 1}": r"Option 'three' is not accepted",
    }
    for words, text in texts.items():
        with pytest.raises(ArgumentError, match=text) as raised:
            parser.parse_args([words])
        assert isinstance(raised.value.__cause__, KeyError) == words.startswith("--config")


def test_a_verb_is_one_module_with_options_that_are_explained():
    assert set(VERBS) >= {"train", "evaluate", "export", "benchmark", "predict", "demo", "share"}
    for name in VERBS:
        verb = _verbs.load_verb(name)
        assert verb.summary
        assert verb.summary[0].islower()
        kind = verb.module.Options
        assert is_dataclass(kind)
        assert kind.__dataclass_params__.frozen
        described = _parser._docs(kind)[1]
        for entry in fields(kind):
            assert described.get(entry.name), f"{name} does not describe {entry.name}"
        nested = [hint for hint in get_type_hints(kind).values() if is_dataclass(hint)]
        for each in nested:
            assert set(_parser._docs(each)[1]) >= {entry.name for entry in fields(each)}


def test_the_verb_of_the_documentation_is_one_file(monkeypatch, tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "api" / "command.md").read_text()
    (tmp_path / "count.py").write_text(page.split("```python\n")[1].split("```")[0])
    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr(smallfry.cli, "__path__", [*smallfry.cli.__path__, str(tmp_path)])
    monkeypatch.setattr(smallfry.cli, "count", None, raising=False)  # which its import sets
    monkeypatch.setitem(sys.modules, "smallfry.cli.count", None)
    del sys.modules["smallfry.cli.count"]
    assert main(["count", str(tmp_path), "--suffix", ".jpg"]) == 0
    assert capsys.readouterr().out == "1\n"
    assert "count images" in shown(capsys, "--help")
    assert main(["count"]) == 2
    assert main(["cont", "x"]) == 2
    assert "did you mean 'count'?" in capsys.readouterr().err


def test_the_shorthand_of_a_group_is_its_name():
    options = ["data.name", "data.root", "epochs", "model.name"]
    words = ["--data", "x", "--model=y", "--epochs", "3", "--data.root=--data"]
    assert expand_shorthand(words, options) == [
        *("--data.name", "x", "--model.name=y", "--epochs", "3", "--data.root=--data")
    ]


def test_words_before_the_verb():
    assert read(["--debug", "models"]).verb.name == "models"
    with pytest.raises(UsageError, match="smallfry has no option 'bogus'"):
        read(["--bogus", "models"])
    with pytest.raises(UsageError, match="expected a verb: analyze, benchmark, completion"):
        read(["--debug"])
    with pytest.raises(UsageError, match="use one of them"):
        read(["predict", "r", "i", "--exit_steps", "2", "--exit_threshold", "0.5"])
