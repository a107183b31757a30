"""Frozen parts of a model in training, for all of it or for its first epochs."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from smallfry._torch import BatchNorm
from smallfry.errors import UsageError, nearest
from smallfry.training.config import ModelConfig
from smallfry.training.processes import Processes
from smallfry.transforms.classifier import classifier_names

BACKBONE = "backbone"  # all but the classifier


class Freezing:
    """Parameters that are not trained, with their batch norms in evaluation mode.

    Args:
        model: The model.
        patterns: Shell patterns of parameters' names; ``backbone`` is all but the classifier.
        steps: Steps until they are trained too; None never trains them.

    Raises:
        UsageError: A pattern without a parameter, no classifier, or nothing left to train.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18", num_classes=3)
        >>> frozen = Freezing(model, ["backbone"], steps=100)
        >>> frozen.at(0)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['fc.weight', 'fc.bias']
        >>> frozen.at(100)
        >>> all(p.requires_grad for p in model.parameters())
        True
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str], steps: int | None) -> None:
        named = dict(model.named_parameters())
        names = {name for pattern in patterns for name in _matching(pattern, model, named)}
        if patterns and names >= {*named}:
            raise UsageError(
                f"model.freeze {' '.join(patterns)} leaves nothing to train; take narrower patterns"
            )
        self.parameters = [p for name, p in named.items() if name in names]
        self.norms = [
            module
            for prefix, module in model.named_modules()
            if isinstance(module, BatchNorm) and _is_frozen(module, prefix, patterns, names)
        ]
        self.steps = steps

    def at(self, step: int) -> None:
        """Freeze or train the parts as at this step; called in training mode before each one."""
        frozen = self.steps is None or step < self.steps
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)
        if frozen:
            for norm in self.norms:
                norm.eval()


def freeze(
    model: nn.Module, config: ModelConfig, steps_per_epoch: int, processes: Processes
) -> Freezing:
    """Freeze parts of a model as configured.

    Parts that are trained later are frozen at the first step, once the optimizer has them.

    Raises:
        UsageError: As ``Freezing``; or several processes, whose exchange of gradients is planned
            once.
    """
    if config.freeze_epochs is None:
        freezing = Freezing(model, config.freeze, None)
        freezing.at(0)
        return freezing
    if processes.count > 1:
        raise UsageError(
            "model.freeze_epochs works in one process: train the classifier in a first run, and "
            "start a second one from it with model.start"
        )
    return Freezing(model, config.freeze, round(config.freeze_epochs * steps_per_epoch))


def _matching(pattern: str, model: nn.Module, named: dict[str, nn.Parameter]) -> set[str]:
    if pattern == BACKBONE:
        heads = classifier_names(model)
        found = {n for n in named if not any(n.startswith(f"{head}.") for head in heads)}
        if not heads or len(found) == len(named):
            raise UsageError(
                f"model.freeze {BACKBONE}: {type(model).__name__} names no classifier; "
                "give patterns of its parameters' names, such as stem.*"
            )
        return found
    found = {name for name in named if fnmatchcase(name, pattern)}
    if not found:
        raise UsageError(
            f"model.freeze: no parameter is called '{pattern}'; patterns are those of a shell, "
            f"such as stem.*{nearest(pattern, named)}"
        )
    return found


def _is_frozen(module: nn.Module, prefix: str, patterns: Sequence[str], frozen: set[str]) -> bool:
    own = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
    if own:
        return frozen.issuperset(own)
    statistics = f"{prefix}.running_mean"  # of a norm without weights
    return any(p == BACKBONE or fnmatchcase(statistics, p) for p in patterns)
