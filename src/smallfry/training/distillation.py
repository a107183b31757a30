"""Distillation as a wrapper of any objective.

    loss = (1 − w) · objective + w T² KL(softmax(t/T) ‖ softmax(s/T)) + v · similarity(features)

with the teacher's logits t and the student's s (Hinton, Vinyals, Dean, arXiv 1503.02531). The last
term compares images by the inner products of their features, each row of these normalised, so that
the two models may have features of any widths (Tung, Mori, arXiv 1907.09682).
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.data import ImageData
from smallfry.errors import RunError, UsageError
from smallfry.tasks import Batch
from smallfry.training.augment import Normalize
from smallfry.training.distillation_config import DistillationConfig
from smallfry.training.fine_tuning import START, start_facts
from smallfry.training.objective import Objective
from smallfry.training.objective_steps import Step
from smallfry.training.run import TrainedModel, require_classes
from smallfry.training.wrapped_objective import WrappedObjective

TEACHER = "teacher"  # entry of manifests
MIXED = {  # precisions with autocast, and Fabric's short names of them
    **dict.fromkeys(("bf16-mixed", "bf16"), torch.bfloat16),
    **dict.fromkeys(("16-mixed", "16"), torch.float16),
}


def logit_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute T² KL(teacher ‖ student), the mean over rows of logits (batch, classes)."""
    logs = [(each / temperature).log_softmax(-1) for each in (student, teacher.to(student))]
    divergence = F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean")
    return temperature**2 * divergence


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of normalised similarities between the rows.

    Args:
        student: Features, (batch, ...).
        teacher: Features, (batch, ...), of any size.
    """
    grams = []
    for each in (student, teacher.to(student)):
        rows = each.flatten(1)
        grams.append(F.normalize(rows @ rows.T, dim=1))
    return (grams[0] - grams[1]).square().mean()


class Teacher:
    """Trained model that gives logits and features for a student's inputs.

    Args:
        trained: The model, which stays as it is.
        normalize: Normalisation of the student's images, which is undone.
        precision: Fabric's precision of the training, which a mixed one shares with the teacher.
    """

    def __init__(
        self, trained: TrainedModel, normalize: Normalize, precision: str = "32-true"
    ) -> None:
        self.model = trained.model.eval().requires_grad_(False)
        self._scale = trained.normalize.scale / normalize.scale
        self._shift = trained.normalize.shift - normalize.shift * self._scale
        self._features = _classifier_inputs(self.model, training=False)
        self._lower = MIXED.get(precision)

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and features of a batch normalised for the student."""
        self._features.clear()
        inputs = images.float() * self._scale.to(images.device) + self._shift.to(images.device)
        with torch.autocast(inputs.device.type, self._lower, enabled=self._lower is not None):
            logits = self.model(inputs)
        return logits, self._features[-1]


class Distilled(WrappedObjective):
    """Objective with a teacher; works with every objective for classification.

    Args:
        objective: The student's.
        teacher: Trained model of the same classes.
        config: Weights and temperature.
    """

    def __init__(self, objective: Objective, teacher: Teacher, config: DistillationConfig) -> None:
        super().__init__(objective)
        self.teacher, self.config = teacher, config
        self._features: list[Tensor] = []

    @property
    def changes_gradients(self) -> bool:
        """Always True: the teacher is in the loss."""
        return True

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the module of the wrapped objective, and move the teacher to its device."""
        self.teacher.to(next(model.parameters()).device)
        if self.config.features:
            self._features = _classifier_inputs(model, training=True)
        return super().prepare(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Yield the wrapped objective's steps, with the teacher in their losses."""
        calls = _Calls(prepared)
        inputs, answer = None, None
        self._features.clear()
        for step in self.objective(calls, batch):  # type: ignore[arg-type]  # called, no more
            if calls.inputs is not inputs or answer is None:
                inputs, answer = calls.inputs, self.teacher(calls.inputs)
            loss = (1 - self.config.weight) * step.loss
            if self.config.weight:
                distance = logit_distance(calls.logits, answer[0], self.config.temperature)
                loss = loss + self.config.weight * distance
            if self.config.features:
                features = self._features[-1]
                loss = loss + self.config.features * similarity_distance(features, answer[1])
            self._features.clear()
            yield step._replace(loss=loss)


class _Calls:
    """Prepared module, with the inputs and logits of its last call."""

    def __init__(self, prepared: nn.Module) -> None:
        self._prepared = prepared
        self.inputs: Tensor = torch.empty(0)
        self.logits: Tensor = torch.empty(0)

    def __call__(self, inputs: Tensor, *others: Any) -> Any:
        outputs = self._prepared(inputs, *others)
        self.inputs = inputs
        if hasattr(outputs, "logits"):
            self.logits = outputs.logits
        else:  # features and logits, or logits alone
            self.logits = outputs[-1] if isinstance(outputs, tuple) else outputs
        return outputs


def distilled(
    config: DistillationConfig,
    objective: Objective,
    data: ImageData,
    normalize: Normalize,
    precision: str,
) -> tuple[Objective, dict[str, Any]]:
    """Wrap an objective with the configured teacher.

    Args:
        config: Without a teacher, the objective is returned as it is.
        objective: The student's.
        data: To be trained on.
        normalize: Normalisation of the student's images.
        precision: Fabric's precision of the training.

    Returns:
        The objective, and the manifest's entries on the teacher.

    Raises:
        UsageError: Another task, or a teacher of other images or classes.
        RunError: It can't be read.
    """
    if config.teacher is None:
        return objective, {}
    if objective.task.name != "classification":
        raise UsageError(f"distillation is for classification, not {objective.task.name}")
    # shared folders and the hub are read above this package, by what users call smallfry.load
    trained: TrainedModel = import_module("smallfry").load(config.teacher)
    shapes = trained.input_shape, data.input_shape
    if shapes[0] != shapes[1]:
        theirs, ours = ("×".join(map(str, shape)) for shape in shapes)
        raise UsageError(
            f"distillation.teacher {config.teacher} takes images of {theirs}, the run's are "
            f"{ours}: take data.image_size and data.channels as the teacher's"
        )
    require_classes(trained, data.classes, data.origin)
    facts = start_facts(trained, config.teacher)[START]
    return Distilled(objective, Teacher(trained, normalize, precision), config), {TEACHER: facts}


def require_same_teacher(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Require a resumed run's teacher to have the weights that it had.

    Raises:
        RunError: It has others, or is there no more.
    """
    digests = [each.get(TEACHER, {}).get("weights_sha256") for each in (before, now)]
    if digests[0] != digests[1]:
        raise RunError(
            f"{where}: the teacher's weights are not those of the start; bring them back, or start "
            "a new run"
        )


def _classifier_inputs(model: nn.Module, training: bool) -> list[Tensor]:
    """Return a list to which each call of the classifier in a mode appends its inputs.

    Raises:
        UsageError: The model has no classifier by timm's contract.
    """
    classifier = getattr(model, "get_classifier", lambda: None)()
    if not isinstance(classifier, nn.Module):
        raise UsageError(
            f"distillation needs a model with get_classifier, and {type(model).__name__} has none"
        )
    taken: list[Tensor] = []

    def take(module: nn.Module, inputs: Any) -> None:
        if module.training == training:  # not in an average of weights, a copy with this hook
            taken.append(inputs[0])

    classifier.register_forward_pre_hook(take)
    return taken
