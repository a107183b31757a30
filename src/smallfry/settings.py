"""Strict conversion of configuration values to the fields' types."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from smallfry.errors import UsageError, shortened

MOST_NUMBER = 2**31  # of whole numbers but seeds; PyTorch counts much with 32 bits
NUMPY = (np.number, np.bool_)
PLAIN = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
T = TypeVar("T", bound=type)


def check(holds: bool, message: str) -> None:
    """Raise a UsageError unless a condition holds."""
    if not holds:
        raise UsageError(message)


def check_values(config: Any, group: str) -> None:
    """Refuse values that no setting can have, before a library gets them; as ``settle``."""
    settle(config, group)
    for entry in fields(config):
        _check_numbers(getattr(config, entry.name), f"{group}{entry.name}")


def strict(kind: T) -> T:
    """Check the values given to a dataclass as ``check_values`` does; a decorator.

    Messages have the ``name`` of the class before that of a field.
    """
    plain: Any = kind.__init__  # type: ignore[misc]
    expected = signature(plain)

    @wraps(plain)
    def init(self: Any, *values: Any, **named: Any) -> None:
        given = expected.bind(self, *values, **named).arguments
        kinds = get_type_hints(kind)
        for entry, value in list(given.items())[1:]:
            name = f"{getattr(kind, 'name', kind.__name__)}.{entry}"
            given[entry] = fitted(value, kinds[entry], name)
            _check_numbers(given[entry], name)
        plain(**given)

    kind.__init__ = init  # type: ignore[misc]
    return kind


def _check_numbers(value: Any, name: str) -> None:
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, float):
            check(not math.isnan(number), f"{name} is not a number (NaN)")
        elif isinstance(number, int) and not name.endswith("seed"):
            check(abs(number) < MOST_NUMBER, f"{name} must be below 2**31")


def check_switched_on(config: Any, group: str, switch: str, example: str) -> None:
    """Refuse settings other than the defaults where what they belong to is switched off.

    Args:
        config: A frozen dataclass.
        group: Prefix of field names in messages, such as "data.".
        switch: The field that switches it on.
        example: Value of it, for the message.
    """
    for entry in fields(config):
        if not getattr(config, switch) and getattr(config, entry.name) not in (None, entry.default):
            raise UsageError(f"{group}{entry.name} needs {group}{switch}, such as {example}")


def settle(config: Any, group: str) -> None:
    """Convert the fields of a frozen dataclass to their types, in its ``__post_init__``.

    A string is taken for a path, and for a group of settings that has a name, such as
    ``data="digits"``; a mapping is taken for any group.

    Args:
        config: The dataclass.
        group: Prefix of field names in messages, such as "data.".

    Raises:
        UsageError: A value of another type.
    """
    kinds = get_type_hints(type(config))
    for entry in fields(config):
        name, value = f"{group}{entry.name}", getattr(config, entry.name)
        object.__setattr__(config, entry.name, fitted(value, kinds[entry.name], name))


def fitted(value: Any, kind: Any, name: str) -> Any:
    """Convert a value to a type.

    Args:
        value: The value.
        kind: A plain type, path, choice, dataclass, collection or union of these; any other type
            is not checked.
        name: Name of the setting, for the message.

    Raises:
        UsageError: A value of another type.

    Example:
        >>> from smallfry.settings import fitted
        >>> fitted([1, 2], tuple[int, ...], "widths")
        (1, 2)
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _one_of(value, [each for each in inner if each is not NoneType], name)
    if value is None:
        raise UsageError(f"{name} can't be null")
    if is_dataclass(kind):
        return _group(value, kind, name)
    if origin is Literal:
        _require(value in inner, name, f"one of {', '.join(map(str, inner))}", value)
    elif kind is Path:
        _require(isinstance(value, str | Path), name, "a path", value)
        return Path(value)
    elif origin is dict:
        _require(isinstance(value, Mapping), name, "settings by their names", value)
        return dict(value)
    elif origin in (list, tuple):
        return _several(value, origin, inner, name)
    elif kind in PLAIN:
        if isinstance(value, NUMPY):
            value = value.item()
        right = isinstance(value, int | float if kind is float else kind)
        right = right and (kind is bool or not isinstance(value, bool))
        _require(right, name, PLAIN[kind], value)
    return value


def _one_of(value: Any, kinds: list[Any], name: str) -> Any:
    """Convert a value to the first type of a union that takes it."""
    lists = [each for each in kinds if get_origin(each) in (list, tuple)]
    several = lists if isinstance(value, list | tuple) else []
    refused = list[UsageError]()
    for kind in several or kinds:
        try:
            return fitted(value, kind, name)
        except UsageError as error:
            refused.append(error)
    raise refused[0]


def _group(value: Any, kind: Any, name: str) -> Any:
    if isinstance(value, kind):
        return value
    known = [entry.name for entry in fields(kind)]
    if isinstance(value, str | Path) and "name" in known:
        return kind(name=str(value))
    wanted = kind.__name__ + (", a name or a mapping" if "name" in known else " or a mapping")
    _require(isinstance(value, Mapping), name, wanted, value)
    unknown = [key for key in value if key not in known]
    if unknown:
        raise UsageError(f"{name} has no setting '{unknown[0]}'; there are {', '.join(known)}")
    return kind(**value)


def _several(value: Any, origin: Any, inner: tuple[Any, ...], name: str) -> Any:
    fixed = origin is tuple and inner[-1] is not Ellipsis
    wanted = f"{len(inner)} values" if fixed else "a list"
    right = isinstance(value, list | tuple) and (not fixed or len(value) == len(inner))
    _require(right, name, wanted, value)
    kinds = inner if fixed else inner[:1] * len(value)
    return origin(fitted(one, kind, name) for one, kind in zip(value, kinds, strict=True))


def _require(right: bool, name: str, wanted: str, value: Any) -> None:
    if not right:
        given = shortened(" ".join(repr(value).split()))
        raise UsageError(f"{name} must be {wanted}, not {given}")
