"""Fine-tuning: a training run from the weights and the spec of another model."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from smallfry.data import ImageData
from smallfry.errors import RunError, UsageError
from smallfry.tasks import Task
from smallfry.training.checkpoint import WEIGHTS, weights_digest
from smallfry.training.compression import DONE
from smallfry.training.config import ModelConfig, TrainConfig
from smallfry.training.initial_weights import names_weights
from smallfry.training.run import TrainedModel
from smallfry.transforms.build import build
from smallfry.transforms.classifier import with_classes
from smallfry.transforms.spec import OF_THE_FACTORY, ModelSpec
from smallfry_runtime.frames import Frame, frame_of
from smallfry_runtime.names import text_of

START = "start"  # entry of manifests and of provenance


def load_start(config: ModelConfig) -> TrainedModel | None:
    """Load the initial model of training; None without one.

    Raises:
        UsageError: Settings that contradict it.
        RunError: It can't be read.
    """
    if config.start is None or names_weights(config):
        return None
    # shared folders and the hub are read above this package, by what users call smallfry.load
    trained: TrainedModel = import_module("smallfry").load(str(config.start))
    architecture = trained.spec.architecture
    if config.name not in ("auto", architecture):
        raise UsageError(
            f"model.start {config.start} is a {architecture}: leave model.name out, or start from "
            f"a {config.name}"
        )
    if chosen := sorted(OF_THE_FACTORY & set(config.options)):
        raise UsageError(
            f"model.options: {chosen[0]} and model.start both name weights; leave one out"
        )
    return trained


def like_start(config: TrainConfig, trained: TrainedModel) -> TrainConfig:
    """Adapt a configuration's image preprocessing to the initial model.

    Size, channels, bit depth, mean and standard deviation that are given stay.
    """
    data, sample = config.data, trained.manifest["input"]
    same = data.channels in (None, trained.channels)
    given: dict[str, Any] = {
        "image_size": trained.frame.plain,
        "resize": trained.resize,
        "channels": trained.channels,
        "bit_depth": trained.bit_depth,
        "mean": list(sample["mean"]) if same else None,
        "std": list(sample["std"]) if same else None,
    }
    missing = {name: value for name, value in given.items() if getattr(data, name) is None}
    return replace(config, data=replace(data, **missing))


def make_from_start(
    config: ModelConfig, data: ImageData, task: Task, trained: TrainedModel
) -> tuple[nn.Module, ModelSpec]:
    """Build a run's model and spec from another trained model.

    The classifier is a new one where the number of classes is another.

    Args:
        config: Its arguments go over those of the model to start from.
        data: To be trained on.
        task: Gives the number of outputs.
        trained: The model to start from.

    Raises:
        UsageError: The images or arguments don't fit the weights.
    """
    spec, changes = trained.spec, config.arguments()
    if data.channels != trained.channels:
        raise UsageError(
            f"model.start {config.start} takes images of {trained.channels} channels, not "
            f"{data.channels}: leave data.channels out"
        )
    decided = sorted({"num_classes", "in_chans", "img_size"} & set(changes))
    if decided:
        raise UsageError(f"model.options: {decided[0]} comes from model.start and the data")
    spec = replace(spec, arguments={**spec.arguments, **changes})
    try:
        model = build(spec, trained.model.state_dict(), where=str(config.start))
    except RunError as error:
        if not changes:
            raise
        raise UsageError(
            f"model.start: {error}; leave out {', '.join(sorted(changes))}, or choose values "
            "that keep the weights"
        ) from error
    model, spec = _brought_to(data.frame, model, spec, str(config.start))
    outputs = task.outputs(len(data.classes))
    if getattr(model, "num_classes", outputs) != outputs:
        return with_classes(model, spec, outputs)
    return model, spec


def _brought_to(
    frame: Frame, model: nn.Module, spec: ModelSpec, start: str
) -> tuple[nn.Module, ModelSpec]:
    """Change the image size of a model, with its positions resampled.

    Raises:
        UsageError: It can't.
    """
    before = frame_of(spec.arguments.get("img_size", frame.size))
    if before.size == frame.size:
        return model, spec
    try:
        model.set_input_size(img_size=frame[:2])  # type: ignore[operator]  # as timm's models
    except (AttributeError, TypeError, ValueError, AssertionError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise UsageError(
            f"model.start {start} takes images of {before} pixels, not {frame.height}×"
            f"{frame.width}: leave data.image_size out{reason}"
        ) from error
    return model, replace(spec, arguments={**spec.arguments, "img_size": frame.plain})


def start_facts(trained: TrainedModel, name: str) -> dict[str, Any]:
    """Return manifest entries on the initial model and the methods applied to it."""
    manifest = trained.manifest
    noted = manifest.get("files", {}).get(WEIGHTS) or manifest.get("weights", {}).get("sha256")
    on_hub = name.partition(":")[0] in ("hf_hub", "hf-hub")
    facts = {
        # manifests are published, and the paths of this machine are nobody's
        "name": name if on_hub else text_of(Path(name).name),
        "model": trained.spec.architecture,
        "weights_sha256": noted or weights_digest(trained.model.state_dict()),
        "data": {key: manifest["data"].get(key) for key in ("name", "fingerprint")},
    }
    return {START: facts, **kept_facts({DONE: manifest.get(DONE)})}


def kept_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return those entries of a manifest on resuming."""
    return {name: manifest[name] for name in (START, DONE) if manifest.get(name)}
