"""The console shows foreign text harmlessly, and leaves a closed output to the caller."""

import io
import os
import sys

import pytest
from rich.table import Table

from smallfry.cli import main
from smallfry.io.console import CleanConsole


def shown(item, **settings):
    stream = io.StringIO()
    CleanConsole(file=stream, width=60, highlight=False, **settings).print(item, **{})
    return stream.getvalue()


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "a\x07b", "\x9b31m", "\x1b]0;title\x07", "line\x08\x08\x08\x08gone"]
)
def test_control_characters_are_spelled_out(text):
    found = shown(text)
    assert not {character for character in found if ord(character) < 32} - {"\n"}
    assert "\x9b" not in found


def test_tables_are_clean_and_keep_their_lines():
    table = Table("name", "share")
    table.add_row("\x1b[31mred\x1b[0m", "50 %")
    found = shown(table)
    assert "\x1b" not in found
    assert "50 %" in found
    assert len(found.splitlines()) > 3


def test_colours_of_rich_itself_stay():
    found = shown("[bold]strong[/bold]", force_terminal=True, color_system="standard")
    assert "\x1b[1mstrong\x1b[0m" in found


def test_a_closed_output_is_an_error_that_can_be_caught():
    """rich ends the process, and lets other output go nowhere."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    before = os.fstat(1)
    with pytest.raises(BrokenPipeError):
        CleanConsole(file=Gone(), force_terminal=False).print("text")
    assert os.path.samestat(before, os.fstat(1))


def test_a_command_whose_reader_has_gone_ends_well(monkeypatch, capfd):
    """`smallfry models | head -1` has exit code 0, as commands that print without tables have."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["models", "vitrm_micro_patch4_8"]) == 0
    assert capfd.readouterr().err == ""
