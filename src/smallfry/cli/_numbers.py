"""Lists of numbers on the command line: ``--data.image_size 96 64`` as ``[96,64]``."""

import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def join_numbers(arguments: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Join the numbers behind an option that takes a list of them.

    A single one becomes a list where the option takes nothing else.

    Args:
        arguments: A command line behind the verb.
        types: The type of every option, by dotted name.

    Example:
        >>> join_numbers(["--data.image_size", "96", "64"], {"data.image_size": int | list[int]})
        ['--data.image_size', '[96,64]']
        >>> join_numbers(["--data.mean=0.5"], {"data.mean": list[float] | None})
        ['--data.mean=[0.5]']
    """
    takes = {f"--{name}" for name, hint in types.items() if _takes_numbers(hint)}
    lists = {f"--{name}" for name, hint in types.items() if _takes_lists_alone(hint)}
    joined: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, value = argument.partition("=")
        if equals and name in lists and NUMBER.fullmatch(value):
            argument = f"{name}=[{value}]"
        joined.append(argument)
        if argument not in takes:
            continue
        numbers = []
        while left and NUMBER.fullmatch(left[0]):
            numbers.append(left.pop(0))
        is_list = len(numbers) > 1 or (numbers and argument in lists)
        joined += [f"[{','.join(numbers)}]"] if is_list else numbers
    return joined


def _takes_numbers(hint: Any) -> bool:
    return any(get_origin(k) is list and get_args(k)[0] in (int, float) for k in kinds(hint))


def _takes_lists_alone(hint: Any) -> bool:
    others = {*kinds(hint)} - {NoneType}
    return _takes_numbers(hint) and all(get_origin(kind) is list for kind in others)


def kinds(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
