"""Tasks: the meaning of a model's outputs."""

import importlib
import pkgutil
from functools import cache

from smallfry.errors import UsageError, nearest
from smallfry.tasks.task import (
    Batch,
    Calibrated,
    HasChoices,
    HasDefaults,
    Pictured,
    ReadsText,
    ScoredByClass,
    ScoredByStep,
    Task,
)

__all__ = [
    "Batch",
    "Calibrated",
    "HasChoices",
    "HasDefaults",
    "Pictured",
    "ReadsText",
    "ScoredByClass",
    "ScoredByStep",
    "Task",
    "find_task",
    "register",
    "task_names",
]

_TASKS: dict[str, type[Task]] = {}


def register(kind: type[Task]) -> type[Task]:
    """Register a task by its name; a class decorator.

    Raises:
        ValueError: Another task has the name.
    """
    known = _TASKS.setdefault(kind.name, kind)
    if known is not kind:
        raise ValueError(
            f"two tasks are named '{kind.name}': {known.__qualname__} and {kind.__qualname__}"
        )
    return kind


def task_names() -> list[str]:
    """List the names of all registered tasks in alphabetical order."""
    _scan()
    return sorted(_TASKS)


def find_task(name: str) -> type[Task]:
    """Find a task by its name.

    Raises:
        UsageError: There is none.
    """
    names = task_names()
    if name not in names:
        raise UsageError(f"unknown task '{name}'{nearest(name, names)}")
    return _TASKS[name]


@cache
def _scan() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
