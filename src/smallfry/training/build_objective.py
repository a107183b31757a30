"""Choice of the configured objective for a model and a task."""

from dataclasses import replace

from torch import nn

from smallfry.models import Recursive
from smallfry.tasks import HasDefaults, Task, create_task
from smallfry.tasks.classification import Classification
from smallfry.training.objective import Objective
from smallfry.training.objective_config import AUTO, ObjectiveConfig


def build_objective(
    config: ObjectiveConfig,
    model: nn.Module,
    task: str | Task = "classification",
    parts: int = 1,
    resumed: bool = False,
    weights: tuple[float, ...] = (),
) -> Objective:
    """Build the configured objective.

    Args:
        config: Its name and settings.
        model: The model that will be trained.
        task: The task, or its name.
        parts: Micro-batches of a batch.
        resumed: Settings that the objective does not take are ignored, as earlier versions did.
        weights: Weights of the classes in the loss, if they differ.

    Raises:
        UsageError: The objective does not fit the task or the model, or does not take a setting.
    """
    meaning = create_task(task, config.label_smoothing) if isinstance(task, str) else task
    if weights and isinstance(meaning, Classification):
        meaning = replace(meaning, weights=weights)
    name, recursive = config.name, isinstance(model, Recursive)
    if name == AUTO and recursive and isinstance(meaning, HasDefaults):
        name = meaning.defaults.objective
    if name == AUTO:
        name = "deep_supervision" if recursive else "cross_entropy"
    if not resumed:
        config.require_taken(name)
    objective: Objective = config.settings(name).build(meaning, model, parts)
    return objective
