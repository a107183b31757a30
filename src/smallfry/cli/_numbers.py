"""Lists of numbers on the command line: ``--data.image_size 96 64`` as ``[96,64]``."""

import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def join_numbers(arguments: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Join several numbers behind an option that takes a list of them.

    Args:
        arguments: A command line behind the verb.
        types: The type of every option, by dotted name.

    Example:
        >>> join_numbers(["--data.image_size", "96", "64"], {"data.image_size": int | list[int]})
        ['--data.image_size', '[96,64]']
    """
    takes = {f"--{name}" for name, hint in types.items() if _takes_numbers(hint)}
    joined: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        joined.append(argument)
        if argument not in takes:
            continue
        numbers = []
        while left and NUMBER.fullmatch(left[0]):
            numbers.append(left.pop(0))
        joined += [f"[{','.join(numbers)}]"] if len(numbers) > 1 else numbers
    return joined


def _takes_numbers(hint: Any) -> bool:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(get_origin(k) is list and get_args(k)[0] in (int, float) for k in kinds)
