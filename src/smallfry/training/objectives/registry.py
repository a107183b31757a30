"""Registry of the settings of objectives by their names in configurations."""

from dataclasses import is_dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from smallfry.errors import UsageError
from smallfry.io.plugins import scan

PACKAGE = "smallfry.training.objectives"
T = TypeVar("T", bound=type)

_objectives: dict[str, Any] = {}


class ObjectiveSettings(Protocol):
    """Settings of an objective: a frozen dataclass of plain values, all with a default.

    Attributes:
        name: Name in configurations.
    """

    name: ClassVar[str]

    def build(self, task: Any, model: Any, parts: int) -> Any:
        """Build the objective.

        Args:
            task: Meaning of the model's outputs.
            model: The model that will be trained.
            parts: Micro-batches of a batch.

        Raises:
            UsageError: The objective does not fit the task or the model.
        """


def register_objective(kind: T) -> T:
    """Register settings of an objective by their ``name``; a decorator.

    Raises:
        UsageError: No frozen dataclass, or another objective has the name.
    """
    parameters = getattr(kind, "__dataclass_params__", None)
    if not is_dataclass(kind) or parameters is None or not parameters.frozen:
        raise UsageError(f"{kind.__name__} must be a frozen dataclass")
    name = kind.name  # type: ignore[attr-defined]
    other = _objectives.setdefault(name, kind)
    if other is not kind and other.__qualname__ != kind.__qualname__:
        raise UsageError(f"two objectives are named '{name}': {other!r} and {kind!r}")
    _objectives[name] = kind
    return kind


def objectives() -> dict[str, type[ObjectiveSettings]]:
    """Return the settings class of every objective, by its name."""
    scan(PACKAGE)
    return dict(sorted(_objectives.items()))
