"""Completion scripts, generated from the parsers of all verbs.

The scripts are complete in themselves: nothing of smallfry runs while a command is typed.
"""

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from smallfry.cli._aliases import ALIASES
from smallfry.cli._parser import form_of, subcommands_of
from smallfry.cli._verbs import load_verb, verb_names

SHELLS = ("bash", "zsh", "fish")
BASH = """\
_smallfry() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=
    local place="${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}"
    case "$place $previous" in
{values}
    *)
        if [[ $COMP_CWORD == 1 ]]; then
            words="{verbs}"
        elif [[ $current == -* ]]; then
            case "$place" in
{options}
            esac
        elif [[ $COMP_CWORD == 2 ]]; then
            case "${{COMP_WORDS[1]}}" in
{choices}
            *) ;;
            esac
        fi ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _smallfry smallfry"""
ZSH = """\
#compdef smallfry
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


class Option(NamedTuple):
    """Option of a command.

    Attributes:
        name: With its dashes.
        help: First sentence of its description.
        values: What can follow it, if these are few.
        is_flag: Nothing follows it.
    """

    name: str
    help: str
    values: tuple[str, ...] = ()
    is_flag: bool = False


def script(shell: Literal["bash", "zsh", "fish"]) -> str:
    """Return the completion script of a shell."""
    if shell == "fish":
        return "\n".join(_fish())
    return (ZSH if shell == "zsh" else "") + _bash()


def commands() -> dict[tuple[str, ...], list[Option]]:
    """Return the options of every command: a verb, or a verb and its subcommand."""
    found: dict[tuple[str, ...], list[Option]] = {}
    for verb in verb_names():
        choices = subcommands_of(verb)
        if not choices:
            found[verb,] = _options((verb,))
        for choice in choices:
            found[verb, choice] = _options((verb, choice))
    return found


def values_of(kind: Any) -> tuple[str, ...]:
    """Return all values of a type, if they are few: a truth value, or one of given names."""
    if kind is bool:
        return "true", "false"
    if get_origin(kind) is Literal:
        return tuple(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        inner = [values_of(each) for each in get_args(kind) if each is not NoneType]
        return sum(inner, ()) if all(inner) else ()
    return ()


def _options(words: tuple[str, ...]) -> list[Option]:
    """Return the options of a command, with the short names of groups and aliases."""
    form = form_of(words)
    found = {}
    for action in form.parser._actions:
        name = next((each for each in action.option_strings if each.startswith("--")), None)
        if name is None or name.startswith("--print_"):
            continue
        text = (
            " ".join((action.help or "").split())
            .partition(". ")[0]
            .partition("; ")[0]
            .removesuffix(".")
        )
        values = values_of(form.types.get(name[2:]))
        is_flag = action.nargs == 0
        found[name] = Option(name, text, () if is_flag else values, is_flag)
    for name in [name for name in found if name.endswith(".name")]:
        short = name.removesuffix(".name")
        found[short] = found[name]._replace(name=short)
    for name, alias in ALIASES.items():
        if f"--{alias.option}" in found:
            found[f"--{name}"] = found[f"--{alias.option}"]._replace(name=f"--{name}")
    return sorted(found.values())


def _bash() -> str:
    """Build the script of bash, which zsh can read too."""
    known = commands()
    choices: dict[str, list[str]] = {}
    for verb, *rest in known:
        choices.setdefault(verb, []).extend(rest)
    choices["completion"] = list(SHELLS)
    return BASH.format(
        verbs=" ".join(choices),
        values="\n".join(_bash_values(known)),
        options="\n".join(
            f'            {_place(words)}) words="{" ".join(o.name for o in options)}" ;;'
            for words, options in known.items()
        ),
        choices="\n".join(
            f'            {verb}) words="{" ".join(names)}" ;;'
            for verb, names in choices.items()
            if names
        ),
    )


def _bash_values(known: Mapping[tuple[str, ...], list[Option]]) -> Iterator[str]:
    for words, options in known.items():
        for option in options:
            if option.values:
                place = f'{_place(words)}" {option.name}"'
                yield f'    {place}) words="{" ".join(option.values)}" ;;'


def _place(words: tuple[str, ...]) -> str:
    """Return bash's pattern of a command's first two words."""
    return f'"{" ".join(words)}"' if len(words) > 1 else f'"{words[0]} "*'


def _fish() -> Iterator[str]:
    """Yield the lines of fish's script."""
    known = commands()
    for verb in dict.fromkeys(words[0] for words in known):
        purpose = _quoted(load_verb(verb).summary)
        yield f"complete -c smallfry -f -n __fish_use_subcommand -a {verb} -d {purpose}"
    for verb, names in ((verb, list(subcommands_of(verb))) for verb in verb_names()):
        for name in names:
            none = f"not __fish_seen_subcommand_from {' '.join(names)}"
            here = _quoted(f"__fish_seen_subcommand_from {verb}; and {none}")
            yield f"complete -c smallfry -f -n {here} -a {name}"
    shells = "__fish_seen_subcommand_from completion"
    yield f"complete -c smallfry -f -n '{shells}' -a '{' '.join(SHELLS)}'"
    for words, options in known.items():
        here = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words)
        for option in options:
            line = f"complete -c smallfry -n {_quoted(here)} -l {option.name[2:]}"
            line += "" if option.is_flag else " -r"
            line += f" -f -a {_quoted(' '.join(option.values))}" if option.values else ""
            yield f"{line} -d {_quoted(option.help)}"


def _quoted(text: str) -> str:
    """Quote a text for fish."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
