"""Command ``smallfry-runtime``: the answers of an export, one JSON object a line."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smallfry_runtime.errors import SmallfryError, UsageError
from smallfry_runtime.runtime import Runtime
from smallfry_runtime.terminal import escape_unencodable, say
from smallfry_runtime.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    escape_unencodable()
    try:
        settings = _settings(options)
        runtime = Runtime(options.export, options.threads)
        if options.budget_ms is not None:
            runtime = runtime.within(options.budget_ms)
        threshold = runtime.exit_threshold(
            options.exit_steps, options.exit_drop, options.exit_threshold
        )
        inputs = runtime.find(options.inputs, sys.stdin.buffer)
        failed = False
        for answer in runtime.answer_each(inputs, settings, threshold):
            failed |= answer.error is not None
            content = answer.to_dict() if answer.error is None else {"error": answer.error}
            say(json.dumps(content, ensure_ascii=False))
    except BrokenPipeError:  # the reader has enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except SmallfryError as error:
        say(f"smallfry-runtime: {error}", sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return int(failed)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Read the settings of the answers."""
    try:
        settings = json.loads(options.decoding)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"decoding is not JSON ({error}): quote it, as '{{\"beam\": 10}}'"
        ) from error
    if not isinstance(settings, dict):
        raise UsageError(
            f"decoding is an object of JSON, such as '{{\"beam\": 10}}', got {settings!r}"
        )
    return settings if options.top_k is None else {**settings, "top_k": options.top_k}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smallfry-runtime", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("export", type=Path, help="The folder that smallfry export wrote.")
    parser.add_argument("inputs", nargs="+", help="Files, folders, globs, or - for stdin.")
    parser.add_argument("--threads", type=int, help="CPU threads; default all cores.")
    parser.add_argument("--top_k", type=int, help="Classes to name per image; default 3.")
    parser.add_argument(
        "--decoding", default="{}", metavar="JSON", help="Settings of the task's decoder."
    )
    parser.add_argument("--budget_ms", type=float, help="Best sub-model within this time.")
    early = parser.add_mutually_exclusive_group()
    early.add_argument("--exit_drop", type=float, help="Early exit at this loss of accuracy.")
    early.add_argument("--exit_steps", type=float, help="Early exit at this average of steps.")
    early.add_argument("--exit_threshold", type=float, help="Early exit at this probability.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
