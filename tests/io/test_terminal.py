"""No name that others gave commands the terminal, whatever prints it."""

import ast
import io
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import smallfry
import smallfry_runtime
from smallfry.cli import benchmark, export, main, share, study
from smallfry.cli._messages import StderrHandler, log_to_stderr
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import CleanFormatter, say
from smallfry.transforms.spec import ModelSpec

SOURCES = [Path(package.__file__).parent for package in (smallfry, smallfry_runtime)]
NASTY = "a\x1b]0;owned\x07\u202e[red]b"
SHOWN = r"a\x1b]0;owned\x07\u202e[red]b"
OF_RICH = r"a\x1b]0;owned"  # which leaves a bell out, and cuts a cell that has become longer
PRINTS = {"terminal.py"}  # what cleans all that is printed
PROTOCOLS = {"deploy/memory.py"}  # print JSON, in which no character is raw
WITHOUT_NAMES = {"demo/serve.py"}  # prints its own address


def calls(file):
    """Names of what a source file calls."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_everything_is_printed_through_what_cleans_it():
    found = {
        str(file.relative_to(folder))
        for folder in SOURCES
        for file in folder.rglob("*.py")
        if {"print", "Console", "sys.stdout.write", "sys.stderr.write"} & {*calls(file)}
    }
    assert found <= PRINTS | PROTOCOLS | WITHOUT_NAMES


def harmless(text, shown=SHOWN):
    assert not {"\x1b", "\x07", "\u202e"} & {*text}
    assert shown in text
    return True


def test_a_line_is_cleaned(capsys):
    say(NASTY)
    assert capsys.readouterr().out == f"{SHOWN}\n"


def test_a_line_and_its_end_are_written_together():
    class Stream(io.StringIO):
        def write(self, text):
            written.extend([text] if text else [])
            return super().write(text)

    written: list[str] = []
    say("step 3 is saved", Stream())
    assert written == ["step 3 is saved\n"]


@pytest.mark.parametrize("kind", [str, Text, "table", "title"])
def test_a_console_cleans_text_tables_and_their_titles(kind):
    stream = io.StringIO()
    console = CleanConsole(file=stream, width=200, highlight=False)
    shown = NASTY if kind is str else Text(NASTY)
    if kind in ("table", "title"):
        shown = Table(title=Text(NASTY) if kind == "title" else None)
        shown.add_column(Text(NASTY))
        shown.add_row(Text(NASTY))
    console.print(shown, markup=False)
    assert harmless(stream.getvalue(), OF_RICH)


def test_colours_and_moving_bars_are_as_richs_own():
    streams = io.StringIO(), io.StringIO()
    for kind, stream in zip((Console, CleanConsole), streams, strict=True):
        console = kind(file=stream, force_terminal=True, width=80, color_system="standard")
        console.print("[red]one[/red]", Text("two\nthree\tfour", style="bold"))
        console.clear()
    assert streams[0].getvalue() == streams[1].getvalue()
    assert "\x1b[31m" in streams[1].getvalue()


def test_a_log_line_is_cleaned():
    record = logging.LogRecord("smallfry", logging.INFO, "", 0, "into %s", (NASTY,), None)
    assert harmless(CleanFormatter("smallfry: %(message)s").format(record))
    log_to_stderr()
    ours = [h for h in logging.getLogger("smallfry").handlers if isinstance(h, StderrHandler)]
    assert ours
    for handler in ours:
        assert isinstance(handler.formatter, CleanFormatter)


def test_a_log_goes_to_the_standard_error_of_the_moment(monkeypatch):
    log_to_stderr()
    for _ in range(2):  # as two tests have two
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        logging.getLogger("smallfry.test").info("begun")
        assert stream.getvalue() == "smallfry: begun\n"
        stream.close()


def test_verbs_that_write_show_names_as_text(monkeypatch, tmp_path, capsys):
    from smallfry.deploy import benchmark_page, pretrained

    folder = tmp_path / NASTY
    monkeypatch.setattr("smallfry.deploy.export.export", lambda *_: folder)
    monkeypatch.setattr("smallfry.deploy.export.export_bytes", lambda *_: 10)
    monkeypatch.setattr(pretrained, "save_pretrained", lambda *_, **__: folder)
    plain = SimpleNamespace(spec=ModelSpec("m", {}))
    monkeypatch.setattr(pretrained, "load_trained", lambda *_: plain)
    monkeypatch.setattr("smallfry.studies.study.run_study", lambda *_: folder / "report.html")
    for verb, options in (
        (export, export.Options(run="run", to=folder)),
        (share, share.Options(run="run", to=folder)),
        (study, study.Options(study="pareto")),
    ):
        assert verb.run(options) == 0
        assert harmless(capsys.readouterr().out)
    monkeypatch.setattr("smallfry.deploy.benchmark.measure", lambda *_: None)
    monkeypatch.setattr(benchmark_page, "write_report", lambda *_: None)
    monkeypatch.setattr(benchmark_page, "print_tables", lambda *_: None)
    assert benchmark.run(benchmark.Options(models=("run",), folder=folder)) == 0
    assert harmless(capsys.readouterr().out)


def test_errors_of_verbs_that_write_show_names_as_text(tmp_path, capsys):
    folder = tmp_path / NASTY
    folder.mkdir()
    (folder / NASTY).write_text("of mine")
    for words in (
        ["export", "run", "--to", str(folder)],
        ["share", "run", "--to", str(folder)],
        ["benchmark", "run", "--folder", str(folder)],
        ["study", "pareto", "--data", "digits", "--folder", str(folder)],
        ["train", "--run", str(folder)],
    ):
        assert main(words) == 1
        assert harmless(capsys.readouterr().err)
    assert [entry.name for entry in folder.iterdir()] == [NASTY]


def test_progress_of_training_and_studies_shows_names_as_text(capsys):
    from smallfry.studies.grid_progress import GridProgress
    from smallfry.training.progress import PlainReporter, RichReporter

    with GridProgress([], {}) as progress:
        progress.heart.say(NASTY)
    assert harmless(capsys.readouterr().out, OF_RICH)
    for reporter in (PlainReporter(), RichReporter()):
        reporter.say(NASTY)
        assert harmless(capsys.readouterr().out, OF_RICH)
