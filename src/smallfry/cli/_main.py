"""Command-line driver: parse, run the verb, return an exit code."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence

from smallfry.cli._extras import explain_missing
from smallfry.cli._messages import (
    FAILED,
    MISUSED,
    complain,
    log_to_stderr,
    show_warning,
    speak_for_all,
)
from smallfry.cli._parser import Command, expand_home, read
from smallfry.errors import SmallfryError, Stopped, UsageError, is_out_of_memory, refusal
from smallfry.io.signals import Signalled, raising, second_ends
from smallfry.io.terminal import escape_unencodable, say
from smallfry.training.launch_env import is_launched, launch, rank

WAY_OUT = (
    "take a smaller batch_size, accumulate, or a smaller model; a saved run continues with --resume"
)
OUT_OF_MEMORY = f"out of memory; {WAY_OUT}"
NO_MEMORY_AT_ALL = f"smallfry: {OUT_OF_MEMORY}\n".encode()  # made while there is memory


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    Raises:
        ModuleNotFoundError: A package is missing that no extra of smallfry provides.
    """
    try:
        return _run_or_complain(arguments)
    except MemoryError:  # of the report: the frames of the error before it still hold the memory
        if "--debug" in arguments:
            raise
    try:
        return complain(OUT_OF_MEMORY, FAILED)  # here those frames are gone
    except MemoryError:
        os.write(2, NO_MEMORY_AT_ALL)
        return FAILED


def _run_or_complain(arguments: Sequence[str]) -> int:
    arguments = expand_home(arguments)
    escape_unencodable()
    log_to_stderr()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # smallfry reports what is wrong
        warnings.showwarning = show_warning  # type: ignore[assignment]
        if "--debug" in arguments:
            return _run(arguments)
        try:
            return _run(arguments)
        except BrokenPipeError:  # the reader of the output has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt as stop:
            if isinstance(stop, Signalled):
                return _stopped(stop)
            say("smallfry: interrupted", sys.stderr)
            return 128 + signal.SIGINT
        except Stopped as stop:
            return _stopped(stop)
        except Exception as error:
            return complain(_message(error), MISUSED if isinstance(error, UsageError) else FAILED)


def _run(arguments: Sequence[str]) -> int:
    command = read(arguments)
    if command.processes is not None and not is_launched():
        from smallfry.training.launch import run_in_processes

        return run_in_processes(arguments, command.processes)
    with second_ends(speak_for_all), raising():
        return _run_here(command)


def _run_here(command: Command) -> int:
    name, _, module = command.verb
    if not command.parallel and (count := launch().processes) > 1:
        if rank() > 0:
            return MISUSED  # the first process reports it
        raise UsageError(f"{name} supports one process, but {count} were started: start one")
    code: int = module.run(command.options)
    return code


def _stopped(stop: Stopped | Signalled) -> int:
    speak_for_all(str(stop))
    return 128 + stop.signal_number


def _message(error: Exception) -> Exception | str:
    if isinstance(error, SmallfryError):
        return error
    if isinstance(error, ModuleNotFoundError) and (missing := explain_missing(error)):
        return missing
    if is_out_of_memory(error):
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        return f"out of memory ({reason}); {WAY_OUT}"
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # Path.expanduser's
        return "a path begins with ~ and a user who has no home folder here: write all of it"
    if isinstance(error, OSError) and (refused := refusal(error)) is not None:
        return refused
    return (
        f"an error inside smallfry, {type(error).__name__}: {error}; "
        "--debug shows where, please report it"
    )
