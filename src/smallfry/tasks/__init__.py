"""Tasks: the meaning of a model's outputs."""

from collections.abc import Callable
from typing import cast

from smallfry.errors import UsageError, nearest
from smallfry.io.plugins import kit_names, load_kit, load_plugins, scan
from smallfry.io.registry import add
from smallfry.tasks.task import (
    AddsTerms,
    Batch,
    Calibrated,
    Explained,
    FitsItself,
    Fitted,
    HasChoices,
    HasDefaults,
    HasFisher,
    HasRecipe,
    Judges,
    LimitsAugmentation,
    Pictured,
    ReadsText,
    ScoredByClass,
    ScoredByStep,
    Task,
)

__all__ = [
    "AddsTerms",
    "Batch",
    "Calibrated",
    "Explained",
    "FitsItself",
    "Fitted",
    "HasChoices",
    "HasDefaults",
    "HasFisher",
    "HasRecipe",
    "Judges",
    "LimitsAugmentation",
    "Pictured",
    "ReadsText",
    "ScoredByClass",
    "ScoredByStep",
    "Task",
    "create_task",
    "find_task",
    "register",
    "task_names",
]

_TASKS: dict[str, type[Task]] = {}


def register(kind: type[Task]) -> type[Task]:
    """Register a task by its name; a class decorator.

    Raises:
        UsageError: Another task has the name.
    """
    add(_TASKS, kind.name, kind, "tasks")
    return kind


def task_names() -> list[str]:
    """List the names of all tasks in alphabetical order: registered ones, and all kits'.

    Of a kit that has not been imported this is its own name, that of its first task.

    Example:
        >>> from smallfry.tasks import task_names
        >>> {"classification", "multilabel", "puzzle"} <= {*task_names()}
        True
    """
    scan(__name__)
    load_plugins()
    return sorted({*_TASKS, *kit_names()})


def create_task(name: str, label_smoothing: float = 0.0) -> Task:
    """Create a task by its name.

    Raises:
        UsageError: There is none, or it has no label smoothing.
        ModuleNotFoundError: Its kit needs a package that is not installed.

    Example:
        >>> from smallfry.tasks import create_task
        >>> create_task("classification", 0.1).label_smoothing
        0.1
    """
    kind = cast(Callable[..., Task], find_task(name))
    if "label_smoothing" in getattr(kind, "__dataclass_fields__", ()):
        return kind(label_smoothing=label_smoothing)
    if label_smoothing:
        raise UsageError(f"the task {name} has no label smoothing: leave out label_smoothing")
    return kind()


def find_task(name: str) -> type[Task]:
    """Find a task by its name.

    Raises:
        UsageError: There is none.
        ModuleNotFoundError: Its kit needs a package that is not installed.

    Example:
        >>> from smallfry.tasks import find_task
        >>> find_task("multilabel").likelihood
        'bernoulli'
    """
    load_kit(name)
    names = task_names()
    if name not in _TASKS:
        raise UsageError(f"unknown task '{name}'{nearest(name, names)}")
    return _TASKS[name]
