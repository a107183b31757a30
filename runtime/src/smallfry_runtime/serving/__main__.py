"""Command ``smallfry-serve``: serve an export over HTTP."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from smallfry_runtime.errors import SmallfryError, UsageError
from smallfry_runtime.runtime import Runtime
from smallfry_runtime.serving.limits import Limits
from smallfry_runtime.serving.server import serve
from smallfry_runtime.terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    The exit code is 0 once it is stopped, 1 for a failure, 2 for wrong usage, and 130 for Ctrl-C
    before it serves.
    """
    options = _parser().parse_args(arguments)
    try:
        limits = Limits(**{name: getattr(options, name) for name in Limits.__dataclass_fields__})
        runtime = Runtime(options.export, options.threads)
        threshold = runtime.exit_threshold(
            options.exit_steps, options.exit_drop, options.exit_threshold
        )
        serve(runtime, options.host, options.port, threshold, limits)
    except KeyboardInterrupt:
        return 130
    except SmallfryError as error:
        say(f"smallfry-serve: {error}", sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smallfry-serve", description=__doc__)
    parser.add_argument("export", type=Path, help="The folder that smallfry export wrote.")
    parser.add_argument("--host", default="127.0.0.1", help="Address; 0.0.0.0 for all machines.")
    parser.add_argument("--port", type=int, default=8000, help="Port; 0 selects a free one.")
    parser.add_argument("--threads", type=int, help="CPU threads; default all cores.")
    early = parser.add_mutually_exclusive_group()
    early.add_argument("--exit_drop", type=float, help="Early exit at this loss of accuracy.")
    early.add_argument("--exit_steps", type=float, help="Early exit at this average of steps.")
    early.add_argument("--exit_threshold", type=float, help="Early exit at this probability.")
    defaults = Limits()
    for name, help in (
        ("images", "Most images, or other inputs, of a request."),
        ("megabytes", "Most megabytes of a request."),
        ("seconds", "Most seconds of a request."),
        ("waiting", "Most images that wait."),
        ("batch", "Most images computed together."),
    ):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=help)
    return parser


if __name__ == "__main__":
    sys.exit(main())
