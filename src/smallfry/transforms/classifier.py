"""Replacement of a model's classifier, after any transforms."""

from dataclasses import replace
from typing import Any

from torch import nn

from smallfry.errors import UsageError
from smallfry.transforms.build import build
from smallfry.transforms.spec import ModelSpec, Transform


def with_classes(model: nn.Module, spec: ModelSpec, classes: int) -> tuple[nn.Module, ModelSpec]:
    """Replace a model's classifier by a new, uncompressed one for other classes.

    All other weights are kept. A transform that has to do with the classifier has a method
    ``without_classifier(name, classes)`` that gives it as it is without one, or None.

    Args:
        model: Left as it is.
        spec: Its own.
        classes: Their number.

    Returns:
        A model in evaluation mode on the CPU, and its spec.

    Example:
        >>> from smallfry.transforms import ModelSpec, build
        >>> from smallfry.transforms.classifier import with_classes
        >>> spec = ModelSpec("resnet18", {"num_classes": 10})
        >>> tuned, spec = with_classes(build(spec), spec, 3)
        >>> tuned.fc.out_features, spec.arguments["num_classes"]
        (3, 3)

    Raises:
        UsageError: The classifier can't be told from the rest of the model.
    """
    names = classifier_names(model)
    transforms: tuple[Transform, ...] = spec.transforms
    for name in names:
        transforms = tuple(t for each in transforms if (t := _without(each, name, classes)))
    arguments = {**spec.arguments, "num_classes": classes}
    new_spec = replace(spec, arguments=arguments, transforms=transforms)
    new, old = build(new_spec), model.state_dict()
    weights = new.state_dict()
    fresh = {name for name in weights if any(name.startswith(f"{each}.") for each in names)}
    for name in weights.keys() - fresh:
        if name not in old or old[name].shape != weights[name].shape:
            raise UsageError(
                f"{spec.architecture}: '{name}' is another one with {classes} classes, and is no "
                f"part of the classifier ({', '.join(names) or 'which the model does not name'}); "
                "take data with as many classes as the model has"
            )
        weights[name] = old[name]
    new.load_state_dict(weights)
    return new, new_spec


def classifier_names(model: nn.Module) -> list[str]:
    """List the names of timm's classifier modules; several for a distilled model."""
    found: Any = getattr(model, "get_classifier", lambda: ())()
    parts = found if isinstance(found, list | tuple) else (found,)
    return [name for name, module in model.named_modules() if any(module is p for p in parts)]


def _without(transform: Transform, name: str, classes: int) -> Transform | None:
    change: Any = getattr(transform, "without_classifier", None)
    changed: Transform | None = transform if change is None else change(name, classes)
    return changed
