"""In-process runs of the ``smallfry`` command, with checks of its output."""

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from jsonargparse import ArgumentParser, Namespace

from smallfry import cli


def _defaults_once(real: Callable[..., Namespace]) -> Callable[..., Namespace]:
    """Cache the defaults of settings, a third of the time spent reading them."""
    known: WeakKeyDictionary[ArgumentParser, Namespace] = WeakKeyDictionary()

    @functools.wraps(real)
    def defaults(parser: ArgumentParser, *arguments: Any, **options: Any) -> Namespace:
        if parser not in known:
            known[parser] = real(parser, *arguments, **options)
        return known[parser].clone()

    return defaults


ArgumentParser.get_defaults = _defaults_once(ArgumentParser.get_defaults)  # type: ignore[method-assign]
UNFIT = ("an error inside smallfry", "Traceback (most recent")


class CommandOutput(NamedTuple):
    """Output of a command."""

    code: int
    out: str
    err: str

    @property
    def failure(self) -> str | None:
        """Fault in the output that a user should not see, if any."""
        for text in (self.err, self.out):
            for mark in UNFIT:
                if mark in text:
                    return text[text.index(mark) :][:300]
        if self.code not in (0, 1, 2, 130, 143):
            return f"exit code {self.code}"
        if self.code and not self.err.strip():
            return f"exit code {self.code} without a message"
        return None


def command(*arguments: str) -> CommandOutput:
    """Run the command here; an escaping exception is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return CommandOutput(code, out.getvalue(), err.getvalue())
