"""Recipes of tasks: the settings of a run that names its task alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallfry.errors import UsageError
from smallfry.io.safe_yaml import load_yaml
from smallfry.tasks import HasRecipe, find_task

__all__ = ["recipe_of", "with_recipe"]


def recipe_of(task: str) -> Path | None:
    """Return the file with a task's recipe; None of a task without one.

    Raises:
        UsageError: There is no such task.
    """
    kind = find_task(task)
    return kind.recipe if isinstance(kind, HasRecipe) else None


def with_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the keywords of ``smallfry.train`` by the recipe of their task, if it has one.

    Data or a model that is named replaces the recipe's with all its settings; other groups are
    completed setting by setting.

    Raises:
        UsageError: There is no such task, or the task is no name.
    """
    task = settings.get("task")
    if task is None:
        return dict(settings)
    if not isinstance(task, str):
        raise UsageError(f"task must be a name, not {task!r}")
    file = recipe_of(task)
    if file is None:
        return dict(settings)
    found: dict[str, Any] = load_yaml(file.read_text())
    for name, value in settings.items():
        before = found.get(name)
        if isinstance(before, dict) and isinstance(value, Mapping) and "name" not in value:
            value = {**before, **value}
        found[name] = value
    return found
