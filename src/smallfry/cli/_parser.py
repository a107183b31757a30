"""Parsers generated from the fields of a verb's dataclass.

jsonargparse parses types and YAML; the verb, and the subcommand of a verb that has some, are found
here, so that only the parser of the one that runs is made.
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from smallfry.cli._aliases import expand_aliases
from smallfry.cli._explain import explain, refused, unknown_option, unreadable
from smallfry.cli._fields import METAVAR, ROLE, Choice
from smallfry.cli._numbers import join_numbers
from smallfry.cli._verbs import Verb, load_verb, verb_names
from smallfry.errors import SmallfryError, UsageError, nearest
from smallfry.io.safe_yaml import YAML_MODE
from smallfry.version import __version__
from smallfry_runtime.names import path_of

PURPOSE = "Small networks that do the work of big ones."
SHOWING = ("-h", "--help", "--version")  # options that print and exit, before a verb


class Command(NamedTuple):
    """Parsed command line.

    Attributes:
        verb: The verb.
        options: An instance of its ``Options``.
        processes: Processes to run it in; None runs it in this one.
        parallel: The verb works in several processes.
    """

    verb: Verb
    options: Any
    processes: int | None
    parallel: bool


class _Form(NamedTuple):
    """Options of a verb or subcommand."""

    parser: ArgumentParser
    kind: type  # Options
    types: Mapping[str, Any]  # of every option, by dotted name
    places: tuple[str, ...]  # options that are given by their place
    settings: type | None  # class of the field that `settings_of` marks


def read(arguments: Sequence[str]) -> Command:
    """Parse a command line.

    Raises:
        UsageError: A word or setting that is unknown or invalid.
        SystemExit: It asked for help, the version or the configuration, which is printed.
    """
    words, rest = _words(arguments)
    verb = load_verb(words[0])
    choice = _choices(verb.module.Options)[1][words[1]] if len(words) > 1 else None
    presets = frozenset(each for each in (choice.presets if choice else ()) if f"--{each}" in rest)
    form = _form(words, presets)
    special: dict[str | None, Any] = {"choice": words[-1]}
    rest, special["command_only"] = _command_only(form.kind, rest)
    if (complete := getattr(verb.module, "complete", None)) is not None:
        rest = complete(rest)
    rest = join_numbers(expand_shorthand(rest, form.types), form.types)
    _refuse_empty_paths(rest, form.types)
    parsed = _parsed(form, rest, " ".join(words))
    for preset in choice.presets if choice else ():
        if parsed[preset] and preset not in presets:
            raise _not_in_file(preset)
    for name in special["command_only"]:
        if parsed[name] is not None:
            raise _not_in_file(name)
    marked = {entry.metadata.get(ROLE): entry for entry in fields(form.kind)}
    if "given" in marked and parsed[marked["given"].metadata["beside"]] is not None:
        special["given"] = _given(form, rest)
    options = _instance(form, form.kind, parsed, special)
    processes = getattr(options, marked["processes"].name) if "processes" in marked else None
    return Command(verb, options, processes, "processes" in marked)


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Replace ``~`` at the start of a path by the home folder, as in ``--to=~/exports``.

    Shells do so at the start of a word only.
    """
    named = re.compile(r"(--[\w.]+=)?(~(?:/.*)?)", re.DOTALL)
    matches = [named.fullmatch(argument) for argument in arguments]
    return [
        f"{match[1] or ''}{Path(match[2]).expanduser()}" if match else argument
        for match, argument in zip(matches, arguments, strict=True)
    ]


def expand_shorthand(arguments: Sequence[str], options: Iterable[str]) -> list[str]:
    """Expand ``--data cifar10`` to ``--data.name cifar10``, and the options of ``_aliases``.

    Args:
        arguments: A command line behind the verb.
        options: The options there are.
    """
    names = {*options}
    groups = {f"--{name.removesuffix('.name')}" for name in names if name.endswith(".name")}
    expanded = []
    for argument in expand_aliases(arguments, names):
        name, equals, value = argument.partition("=")
        expanded.append(f"{name}.name{equals}{value}" if name in groups else argument)
    return expanded


def _refuse_empty_paths(arguments: Sequence[str], types: Mapping[str, Any]) -> None:
    """Refuse an option of a path without a name, which is the current folder to pathlib."""
    for argument, following in zip_longest(arguments, arguments[1:]):
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--")
        hint = types.get(name) if option.startswith("--") else None
        if (value if equals else following) == "" and Path in (hint, *get_args(hint)):
            raise UsageError(f"{name} is empty: expected a path")


def _not_in_file(name: str) -> UsageError:
    return UsageError(f"{name} can't be set in a file; give it on the command line: --{name}")


def _command_only(
    kind: type, arguments: Sequence[str]
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Take options that no file may set off a command line, before files are read.

    Returns:
        The rest, and the values of each option.
    """
    names = [entry.name for entry in fields(kind) if entry.metadata.get(ROLE) == "command_only"]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}", action="append", default=[])
    try:
        found, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}") from error
    return rest, {name: tuple(getattr(found, name)) for name in names}


def subcommands_of(verb: str) -> Mapping[str, Choice]:
    """Return the subcommands of a verb; most have none."""
    return _choices(load_verb(verb).module.Options)[1]


def form_of(words: tuple[str, ...]) -> "_Form":
    """Return the parser and types of a verb, or of a verb and its subcommand."""
    return _form(words, frozenset())


# Verbs and subcommands


def _words(arguments: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Split arguments into the verb, with its subcommand if any, and the rest."""
    name, rest = _subcommand(arguments, "verb", dict.fromkeys(verb_names(), ""), ())
    kind, choices = _choices(load_verb(name).module.Options)
    if not choices:
        return (name,), rest
    purposes = {each: choice.purpose for each, choice in choices.items()}
    chosen, rest = _subcommand(rest, kind, purposes, (name,))
    return (name, chosen), rest


def _subcommand(
    arguments: Sequence[str], kind: str, purposes: Mapping[str, str], before: tuple[str, ...]
) -> tuple[str, list[str]]:
    """Split arguments into the subcommand and the rest.

    Args:
        arguments: The command line behind ``before``.
        kind: Name for the kind of subcommands, such as "verb".
        purposes: Purpose of each subcommand; if empty, that of the verb's module.
        before: The verb.
    """
    for position, argument in enumerate(arguments):
        if argument in SHOWING:
            _index(kind, purposes, before).parse_args([argument])
        elif argument in purposes:
            return argument, list(arguments[position + 1 :])
        elif not argument.startswith("-"):
            raise UsageError(f"unknown {kind} '{argument}'{nearest(argument, purposes)}")
        elif argument != "--debug":
            command = " ".join(("smallfry", *before))
            raise UsageError(
                f"{command} has no option '{argument.lstrip('-')}'; see {command} --help"
            )
    raise UsageError(f"expected a {kind}: {', '.join(purposes)}")


def _index(kind: str, purposes: Mapping[str, str], before: tuple[str, ...]) -> ArgumentParser:
    """Build the parser that only lists subcommands."""
    description = _docs(load_verb(before[0]).module.Options)[0] if before else PURPOSE
    parser = _parser(before, description)
    if not before:
        parser.add_argument("--version", action="version", version=f"smallfry {__version__}")
    subcommands = parser.add_subcommands(metavar=kind.upper())
    for name, purpose in purposes.items():
        subcommands.add_subcommand(name, ArgumentParser(), help=purpose or load_verb(name).summary)
    return parser


def _choices(kind: type) -> tuple[str, Mapping[str, Choice]]:
    """Return the field of ``Options`` for the subcommand, if any, and its choices."""
    for entry in fields(kind):
        if entry.metadata.get(ROLE) == "choice":
            return entry.name, entry.metadata["choices"]
    return "", {}


# Parsers


@cache
def _form(words: tuple[str, ...], presets: frozenset[str]) -> _Form:
    kind = load_verb(words[0]).module.Options
    choice = _choices(kind)[1][words[1]] if len(words) > 1 else None
    parser = _parser(words, choice.purpose if choice else _docs(kind)[0])
    marked = [entry for entry in fields(kind) if entry.metadata.get(ROLE) == "settings"]
    settings = None
    types: dict[str, Any] = {}
    if marked:
        settings = choice.settings if choice else get_type_hints(kind)[marked[0].name]
        parser.add_argument("--config", action="config", help="A YAML file with any of these.")
    _add_options(parser, kind, types)
    if settings is not None:
        parser.add_class_arguments(settings)
        types |= _leaves(settings)
    if choice is not None:
        parser.set_defaults(dict(choice.defaults))
        for preset in presets:
            parser.set_defaults(dict(choice.presets[preset]))
    return _Form(parser, kind, types, _places(kind), settings)


def _parser(words: tuple[str, ...], description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=" ".join(("smallfry", *words)),
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=YAML_MODE,
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _add_options(container: Any, kind: Any, types: dict[str, Any], prefix: str = "") -> None:
    """Add the fields of a dataclass; ``types`` gives the type of each."""
    hints, (_, helps) = get_type_hints(kind), _docs(kind)
    for entry in fields(kind):
        role, hint = entry.metadata.get(ROLE), hints[entry.name]
        if role in ("settings", "given", "choice"):
            continue
        if is_dataclass(hint):
            inner = container.add_argument_group(_docs(hint)[0].removesuffix("."))
            before = "" if role == "group" else f"{entry.name}."
            _add_options(inner, hint, types, before)
            continue
        name = f"{prefix}{entry.name}"
        types[name] = get_args(hint)[0] if get_origin(hint) is tuple else hint
        positional = _has_a_place(entry)
        details = _details(entry, hint, positional)
        container.add_argument(
            name if positional else f"--{name}", help=helps.get(entry.name), **details
        )


def _places(kind: Any) -> tuple[str, ...]:
    unnamed = ("settings", "given", "choice")
    found = [entry for entry in fields(kind) if entry.metadata.get(ROLE) not in unnamed]
    return tuple(entry.name for entry in found if _has_a_place(entry))


def _has_a_place(entry: "Field[Any]") -> bool:
    """Return whether a field is positional."""
    return entry.metadata.get(ROLE) == "argument" or _is_required(entry)


def _details(entry: "Field[Any]", hint: Any, positional: bool) -> dict[str, Any]:
    """Build the arguments of ``add_argument`` for a field."""
    if entry.metadata.get(ROLE) == "command_only":
        return {"metavar": entry.metadata[METAVAR], "default": None}
    if hint is bool:
        return {"action": "store_true"}
    details: dict[str, Any] = {}
    if METAVAR in entry.metadata:
        details["metavar"] = entry.metadata[METAVAR]
    if get_origin(hint) is tuple:
        hint, details["nargs"] = get_args(hint)[0], "+"
    elif positional and not _is_required(entry):
        details["nargs"] = "?"
    if not _is_required(entry):
        default = entry.default
        details["default"] = list(default) if isinstance(default, tuple) else default
    if hint is not str and not (positional and hint == str | None):
        details["type"] = hint  # text is taken as it is
    return details


def _is_required(entry: "Field[Any]") -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _docs(kind: Any) -> tuple[str, dict[str, str]]:
    """Return the first line of a dataclass's docstring and the description of each field."""
    found: dict[str, str] = {}
    first = ""
    for each in reversed(kind.__mro__):
        if is_dataclass(each):
            docstring = parse_docstring(each.__doc__ or "", style=DocstringStyle.GOOGLE)
            first = docstring.short_description or ""
            for parameter in docstring.params:
                text = " ".join((parameter.description or "").split())
                found[parameter.arg_name] = text.replace("``", "")
    return first, found


def _leaves(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Return the types of a configuration's settings, by dotted name."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        inner = _leaves(hint, f"{prefix}{name}.") if is_dataclass(hint) else {}
        found |= inner or {f"{prefix}{name}": hint}
    return found


# Values


def _parsed(form: _Form, arguments: Sequence[str], command: str) -> Namespace:
    try:
        parsed = form.parser.parse_args(list(arguments))
    except ArgumentError as error:
        message = explain(error, arguments, command, form.types, form.places)
        raise UsageError(message) from error
    except Exception as error:  # jsonargparse raises almost anything, given a foreign file
        raise unreadable(error) from error
    if entry := unknown_option(arguments, form.types):  # of a list, which has none by name
        raise UsageError(refused(entry, command, form.types, form.places))
    return parsed


def _given(form: _Form, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings given on the command line, without defaults."""
    given = form.parser.parse_args(list(arguments), defaults=False).as_dict()
    names = () if form.settings is None else [entry.name for entry in fields(form.settings)]
    return {name: given[name] for name in names if name in given}


def _instance(
    form: _Form, kind: Any, parsed: Namespace, special: Mapping[str | None, Any], prefix: str = ""
) -> Any:
    """Build the dataclass from parsed values."""
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for entry in fields(kind):
        role, hint = entry.metadata.get(ROLE), hints[entry.name]
        if role == "settings":
            assert form.settings is not None
            values[entry.name] = _configuration(form.parser, parsed, form.settings)
        elif role == "command_only":
            values[entry.name] = special[role][entry.name]
        elif role in ("choice", "given"):
            values |= {entry.name: special[role]} if role in special else {}
        elif is_dataclass(hint):
            before = "" if role == "group" else f"{entry.name}."
            values[entry.name] = _instance(form, hint, parsed, special, before)
        else:
            value = parsed[f"{prefix}{entry.name}"]
            if isinstance(value, Path):  # of a file, in which no shell expands it
                value = path_of(str(value))
            values[entry.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _configuration(parser: ArgumentParser, parsed: Namespace, kind: type) -> Any:
    hints = get_type_hints(kind)
    for name, expected in hints.items():
        if is_dataclass(expected) and not isinstance(parsed[name], Namespace | dict):
            raise UsageError(f"{name}: expected named settings, got '{parsed[name]}'")
    try:
        built = parser.instantiate(parsed)
        return kind(**{name: built[name] for name in hints})
    except SmallfryError:
        raise
    except Exception as error:  # such as a number that no float can hold
        raise unreadable(error) from error
