"""One-line messages for jsonargparse errors, with the nearest valid name.

It has no structured errors: an ``ArgumentError`` is a text, made from the text of its cause. What
can be known without that text is: unknown options from the command line itself, and the type and
choices of an option from its dataclass. Taken from the text are the name of an unknown key in a
file, the option of a wrong value, and that value.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentError

from smallfry.cli._aliases import PLACES, UNNEEDED, like_named
from smallfry.cli._numbers import NUMBER, kinds
from smallfry.errors import UsageError, nearest, shortened

NO_SETTINGS = "Unexpected config:"  # how jsonargparse begins about a file without names
OF_ALL = ("help", "debug", "config", "print_config")  # options that jsonargparse or all verbs have


def explain(
    error: ArgumentError,
    arguments: Sequence[str],
    command: str,
    options: Mapping[str, Any],
    places: Sequence[str] = (),
) -> str:
    """Format the message of an error.

    Args:
        error: Error of jsonargparse.
        arguments: The command line behind the verb.
        command: The verb, or verb and subcommand.
        options: The type of every option, by dotted name.
        places: Those of them that are given by their place, without a name.
    """
    message = " ".join(str(error).split())
    named = {name: hint for name, hint in options.items() if name not in places}
    unknown = unknown_option(arguments, named)
    if unknown is None and isinstance(error.__cause__, KeyError):
        # "Option 'nmae' is not accepted", or "Group 'data' does not accept option 'nmae'"
        unknown = ".".join(re.findall(r"'([^']+)'", message))
    if unknown:
        return refused(unknown, command, named, places)
    if message.startswith(NO_SETTINGS):
        content = shortened(message.removeprefix(NO_SETTINGS).strip()) or "nothing"
        return f"config: expected lines of settings, such as 'epochs: 3', got {content}"
    # 'Parser key "data.limit": … Got value: x', at the end of which a union has 'Given value: x'
    match = re.fullmatch(r'Parser key "([\w.]+)":? ?(.*)', message)
    if match is None:
        return _other(message, arguments, command, named)
    name, reason = match.groups()
    _, wrong_value, value = reason.rpartition(" value: ")
    if not wrong_value or name not in options:
        return f"{name}: {reason}"
    expected, choices = _expected(options[name])
    close = nearest(value, choices) if choices else ""
    if not close.startswith("; did you mean"):  # all of them are named already
        close = ""
    if _lacks_brackets(value, options[name]):
        close = f"; a list has brackets: '[{value}]'"
    return f"{name}: expected {expected}, got '{value}'{close}"


def refused(unknown: str, command: str, named: Mapping[str, Any], places: Sequence[str]) -> str:
    """Format the message about an unknown option.

    Args:
        unknown: The option.
        command: As in ``explain``.
        named: The type of every option with a name.
        places: Names of the values that are given by their place.
    """
    plain = unknown.replace("-", "_").rpartition(".")[2]
    if not {plain, *PLACES.get(plain, ())}.isdisjoint(places):
        usage = " ".join(("smallfry", command, *map(str.upper, places)))
        hint = f"; give its value without '--{unknown}': {usage}"
    else:
        hint = UNNEEDED.get(plain, "") or ("" if "." in unknown else like_named(unknown, named))
    hint = hint or nearest(unknown, _known(named))
    return f"{command} has no option '{unknown}'{hint or f'; smallfry {command} --help lists them'}"


def _other(message: str, arguments: Sequence[str], command: str, named: Mapping[str, Any]) -> str:
    """Complete an error that is about no option's value."""
    _, unexpected, words = message.partition("unrecognized arguments: ")
    if unexpected and (meant := _meant(words, arguments, named)):
        return f"{message}; did you mean {meant}?"
    return f"{message}; smallfry {command} --help describes what it takes"


def _meant(words: str, arguments: Sequence[str], named: Mapping[str, Any]) -> str:
    """Return the option that words without one are meant for; or nothing."""
    name, equals, value = words.split()[0].partition("=")
    if equals and name in _known(named):  # as ultralytics has its options
        return f"--{name} {value}"
    places = ("data.name", "to") if os.path.isdir(words) else ("to", "data.name")
    place = next((each.removesuffix(".name") for each in places if each in named), None)
    given = {argument.partition("=")[0] for argument in arguments}
    if (
        place is None
        or NUMBER.fullmatch(words)
        or not given.isdisjoint({f"--{place}", f"--{place}.name"})
    ):
        return ""
    return f"--{place} {shlex.quote(words)}"


def unreadable(error: Exception) -> UsageError:
    """Build the error for settings that a library can't parse."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return UsageError(f"the settings can't be read: {reason}")


def _known(options: Mapping[str, Any]) -> set[str]:
    """List the names of all options and groups."""
    return {*options, *(name.rpartition(".")[0] or name for name in options), *OF_ALL}


def unknown_option(arguments: Sequence[str], options: Mapping[str, Any]) -> str | None:
    """Return the first unknown option of a command line."""
    known = _known(options)
    for argument in arguments:
        if argument == "--":
            return None
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            # --model.options.key sets an entry of a mapping, --data.mean+ extends a list
            of_value = any(
                name.startswith(f"{option}.") and _has_entries(hint)
                for option, hint in options.items()
            )
            if name.rstrip("+") not in known and not of_value:
                return name
    return None


def _has_entries(hint: Any) -> bool:
    """Return whether a type has values with entries to be set one by one."""
    return hint is Any or any((get_origin(kind) or kind) in (dict, Mapping) for kind in kinds(hint))


def _lacks_brackets(value: str, hint: Any) -> bool:
    """Return whether a value in brackets would be a list of the type."""
    lists = [kind for kind in kinds(hint) if get_origin(kind) in (list, tuple)]
    of_names = any(get_args(kind)[0] in (str, Any) for kind in lists)
    of_numbers = bool(lists) and all(map(NUMBER.fullmatch, value.split(",")))
    return not value.startswith("[") and (of_names or of_numbers)


def _expected(hint: Any) -> tuple[str, list[str]]:
    """Return the name of a type, and its choices."""
    if len(kinds(hint)) > 1:
        found = [_expected(each) for each in kinds(hint) if each is not NoneType]
        names = [kind for kind, _ in found] + ["null"] * (NoneType in kinds(hint))
        return " or ".join(names), found[0][1]
    if get_origin(hint) is Literal:
        choices = [str(value) for value in get_args(hint)]
        return f"one of {', '.join(choices)}", choices
    if get_origin(hint) in (list, tuple):
        return str(hint).replace("tuple", "list").replace("[typing.Any]", "").replace(
            ", ...", ""
        ), []
    return (get_origin(hint) or hint).__name__, []
