"""Registry of the settings of objectives by their names in configurations."""

from typing import Any, ClassVar, Protocol, TypeVar

from smallfry.io.plugins import scan
from smallfry.io.registry import add, require_frozen

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
    require_frozen(kind)
    add(_objectives, kind.name, kind, "objectives")  # type: ignore[attr-defined]
    return kind


def objectives() -> dict[str, type[ObjectiveSettings]]:
    """Return the settings class of every objective, by its name."""
    scan(PACKAGE)
    return dict(sorted(_objectives.items()))
