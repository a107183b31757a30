"""One-line messages for jsonargparse errors, with the nearest valid name.

It has no structured errors: an ``ArgumentError`` is a text, made from the text of its cause. What
can be known without that text is: unknown options from the command line itself, and the type and
choices of an option from its dataclass. Taken from the text are the name of an unknown key in a
file, the option of a wrong value, and that value.
"""

import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError

from smallfry.cli._aliases import like_named
from smallfry.errors import UsageError, nearest

OF_ALL = ("help", "debug", "config", "print_config")  # options that jsonargparse or all verbs have


def explain(
    error: ArgumentError, arguments: Sequence[str], command: str, options: Mapping[str, Any]
) -> str:
    """Format the message of an error.

    Args:
        error: Error of jsonargparse.
        arguments: The command line behind the verb.
        command: The verb, or verb and subcommand.
        options: The type of every option, by dotted name.
    """
    message = " ".join(str(error).split())
    unknown = _unknown_option(arguments, options)
    if unknown is None and isinstance(error.__cause__, KeyError):
        # "Option 'nmae' is not accepted", or "Group 'data' does not accept option 'nmae'"
        unknown = ".".join(re.findall(r"'([\w.]+)'", message))
    if unknown:
        hint = "" if "." in unknown else like_named(unknown, options)
        hint = hint or nearest(unknown, _known(options))
        hint = hint or f"; smallfry {command} --help lists them"
        return f"{command} has no option '{unknown}'{hint}"
    # 'Parser key "data.limit": … Got value: x', at the end of which a union has 'Given value: x'
    match = re.fullmatch(r'Parser key "([\w.]+)":? ?(.*)', message)
    if match is None:
        return _other(message, command)
    name, reason = match.groups()
    _, wrong_value, value = reason.rpartition(" value: ")
    if not wrong_value or name not in options:
        return f"{name}: {reason}"
    expected, choices = _expected(options[name])
    close = nearest(value, choices) if choices else ""
    if get_origin(options[name]) is list and not value.startswith("["):
        close = f"; a list has brackets: '[{value}]'"
    return f"{name}: expected {expected}, got '{value}'{close}"


def _other(message: str, command: str) -> str:
    """Complete an error that is about no option's value."""
    if message.startswith("the following arguments are required:"):
        return f"{message}; smallfry {command} --help describes them"
    if message.startswith("Unexpected config: "):
        text = message.removeprefix("Unexpected config: ")
        return f"config: expected settings, such as 'epochs: 3' on a line, not '{text}'"
    return message


def unreadable(error: Exception) -> UsageError:
    """Build the error for settings that a library can't parse."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return UsageError(f"the settings can't be read: {reason}")


def _known(options: Mapping[str, Any]) -> set[str]:
    """List the names of all options and groups."""
    return {*options, *(name.rpartition(".")[0] or name for name in options), *OF_ALL}


def _unknown_option(arguments: Sequence[str], options: Mapping[str, Any]) -> str | None:
    """Return the first unknown option of a command line."""
    known = _known(options)
    for argument in arguments:
        if argument == "--":
            return None
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            # --model.options.key sets an entry of a mapping, --data.mean+ extends a list
            of_value = any(name.startswith(f"{option}.") for option in options)
            if name.rstrip("+") not in known and not of_value:
                return name
    return None


def _expected(hint: Any) -> tuple[str, list[str]]:
    """Return the name of a type, and its choices."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [_expected(each) for each in get_args(hint) if each is not NoneType]
        return " or ".join([*(kind for kind, _ in kinds), "null"]), kinds[0][1]
    if get_origin(hint) is Literal:
        choices = [str(value) for value in get_args(hint)]
        return f"one of {', '.join(choices)}", choices
    if get_origin(hint) in (list, tuple):
        return str(hint).replace("[typing.Any]", ""), []
    return (get_origin(hint) or hint).__name__, []
