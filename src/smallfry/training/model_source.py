"""Model of a training run: from a configuration, another model, or a checkpoint."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from smallfry.data import ImageData
from smallfry.errors import UsageError, is_out_of_memory, nearest
from smallfry.io.terminal import printable
from smallfry.models import FromImages
from smallfry.models.contract import FromTargets
from smallfry.models.critical_init import init_critical_
from smallfry.tasks import HasDefaults, Task
from smallfry.training.config import ModelConfig
from smallfry.training.evaluation import task_of
from smallfry.training.fine_tuning import START, kept_facts, make_from_start, start_facts
from smallfry.training.initial_weights import InitialWeights, unknown_model
from smallfry.training.run import TrainedModel
from smallfry.transforms.build import build, is_model
from smallfry.transforms.spec import OF_THE_FACTORY, ModelSpec

MOST_INITIAL = 256  # images that show the order and the inputs of layers
MOST_REASON = 300  # characters of a library's error


class ModelSource(NamedTuple):
    """Source of a run's model: a configuration, another model, weights or a checkpoint.

    Attributes:
        trained: A model to start from.
        weights: Weights of an architecture to start from.
        manifest: Of the checkpoint that a run is resumed from, which holds all weights.
    """

    trained: TrainedModel | None = None
    weights: InitialWeights | None = None
    manifest: Mapping[str, Any] | None = None

    @property
    def is_new(self) -> bool:
        """True if the weights are newly initialised."""
        return self.trained is None and self.weights is None and self.manifest is None

    def make(self, config: ModelConfig, data: ImageData, task: Task) -> tuple[nn.Module, ModelSpec]:
        """Build the model and its spec.

        Raises:
            UsageError: It can't be made for this data.
        """
        if self.trained is not None:
            made, spec = make_from_start(config, data, task, self.trained)
        elif self.weights is not None:
            made, spec = create_model(config, data, task, self.weights.arguments)
            return made, spec.portable()
        elif self.manifest is None:
            return create_model(config, data, task)
        elif START not in self.manifest:
            return create_model(_without_weights(config), data, task)
        else:
            spec = ModelSpec.from_dict(self.manifest["model"])
            made = build(spec)
        _recompute_blocks(made, config)
        return made, spec

    def note(self, config: ModelConfig, outputs: int) -> str | None:
        """Describe the initial weights for the log; None without any."""
        if self.trained is None and self.weights is None:
            return None
        if self.weights is not None:
            name, had = self.weights.name, self.weights.classes
        else:
            assert self.trained is not None
            name, had = str(config.start), len(self.trained.classes)
        kept = "classifier kept" if had == outputs else f"new classifier of {outputs} classes"
        return f"starting from {printable(name)}: {kept}"

    def facts(self, config: ModelConfig) -> dict[str, Any]:
        """Return entries of the run's manifests."""
        if self.trained is not None:
            return start_facts(self.trained, str(config.start))
        if self.weights is not None:
            return {START: self.weights.facts(config.name)}
        return kept_facts(self.manifest or {})


def _meant(name: str, reason: str) -> str:
    """Suggest an argument for one that the model's class does not have."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", reason)
    if found is None:
        return ""
    kind = getattr(sys.modules[model_entrypoint(name).__module__], found[1], None)
    return "" if kind is None else nearest(found[2], signature(kind).parameters)


def create_model(
    config: ModelConfig,
    data: ImageData,
    task: Task | None = None,
    weights: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """Create the configured model for this data, with its spec.

    Args:
        config: Its name and arguments.
        data: Gives classes, channels and size.
        task: Gives the number of outputs; default classification.
        weights: Arguments of timm's factory that name initial weights.
    """
    name = model_name(config, data, task)
    if not is_model(name):
        raise unknown_model(name)
    outputs = (task or task_of({})).outputs(len(data.classes))
    arguments: dict[str, Any] = {"num_classes": outputs, "in_chans": data.channels}
    decided = sorted({*arguments, "img_size"} & set(config.options))
    if decided:
        raise UsageError(f"model.options: {decided[0]} comes from the data; see data.image_size")
    _require_safe_options(config.options)
    arguments |= config.arguments() | dict(weights or {})
    if timm.get_pretrained_cfg(name).fixed_input_size:
        arguments["img_size"] = data.frame.plain
    try:
        model: nn.Module = timm.create_model(name, **arguments)
        with torch.inference_mode():
            model.eval()(torch.zeros(2, *data.input_shape))
    except Exception as error:  # of any of timm's models, given any options
        if is_out_of_memory(error):
            raise
        reason = " ".join((str(error) or repr(error)).split())[:MOST_REASON]
        if weights:
            raise UsageError(f"model.start: the weights do not fit {name}: {reason}") from error
        shape = "×".join(map(str, data.input_shape))
        raise UsageError(
            f"model {name} can't be built for images of {shape}: {reason}{_meant(name, reason)}"
        ) from error
    _recompute_blocks(model, config)
    return model, ModelSpec(name, arguments)


def initialize(
    model: nn.Module, config: ModelConfig, images: Callable[[], Tensor], labels: Tensor
) -> None:
    """Set the initial weights of a new model that depend on training images or labels.

    Args:
        model: Changed in place.
        config: Its configuration.
        images: Return normalised training images.
        labels: All training labels.
    """
    if isinstance(model, FromTargets):
        model.fit_outputs(labels)
    if isinstance(model, FromImages):
        model.initialize(images())
    if config.init == "critical":
        init_critical_(model, images()[:MOST_INITIAL])


def is_pretrained(config: ModelConfig) -> bool:
    """Return whether the model starts from timm's weights."""
    return bool(config.options.get("pretrained"))


def _recompute_blocks(model: nn.Module, config: ModelConfig) -> None:
    if not config.checkpoint_gradients:
        return
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # of timm's contract
    except (AssertionError, AttributeError, TypeError):
        raise UsageError(
            f"{config.name} can't recompute blocks: leave out model.checkpoint_gradients, or "
            "take a smaller batch_size and accumulate"
        ) from None


def _require_safe_options(options: Mapping[str, Any]) -> None:
    """Refuse arguments of timm that would read a pickle, as a configuration is untrusted."""
    for name in sorted(OF_THE_FACTORY & set(options)):
        value = options[name]
        if name == "pretrained" and isinstance(value, bool):
            continue
        file = value.get("file") if isinstance(value, dict) and len(value) == 1 else None
        if name == "pretrained_cfg_overlay" and str(file).endswith(".safetensors"):
            continue
        raise UsageError(
            f"model.options: {name} can't be {str(value)[:80]!r}; initial weights are "
            "pretrained: true, with pretrained_cfg_overlay: {file: NAME.safetensors}"
        )


def model_name(config: ModelConfig, data: ImageData, task: Task | None = None) -> str:
    """Return the model's name, with ``auto`` resolved by task and image size."""
    if config.name != "auto":
        return config.name
    if isinstance(task, HasDefaults):
        return task.defaults.models.get(data.frame.height, task.defaults.model)
    small = min(data.input_shape[1:]) <= 16
    return "vitrm_micro_patch4_8" if small else "vitrm_tiny_patch4_32"


def _without_weights(config: ModelConfig) -> ModelConfig:
    """Skip pretrained weights on resuming, since a checkpoint holds all weights."""
    kept = {k: v for k, v in config.options.items() if not k.startswith("pretrained")}
    return replace(config, options=kept)
