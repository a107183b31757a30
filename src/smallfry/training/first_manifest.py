"""Manifest of a new run: what its model is, and what it takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from smallfry.data import ImageData
from smallfry.training.config import TrainConfig
from smallfry.transforms.spec import ModelSpec
from smallfry_runtime.frames import PIXELS
from smallfry_runtime.names import path_of, text_of

__all__ = ["describe_model"]


def describe_model(
    config: TrainConfig,
    spec: ModelSpec,
    data: ImageData,
    moments: tuple[Sequence[float], Sequence[float]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe a model, its inputs and its data.

    Args:
        config: The configuration of the run.
        spec: Of the model.
        data: What it is trained on.
        moments: Mean and standard deviation that inputs are normalised with.
        facts: Entries on the source of its weights.
    """
    mean, std = moments
    return {
        "model": spec.to_dict(),
        **facts,
        "task": config.task,
        "classes": list(data.classes),
        "input": {
            "size": data.image_size,
            **({} if data.resize == "crop" else {"resize": data.resize}),
            **({} if data.frame.values == PIXELS else {"values": data.frame.values}),
            "channels": data.channels,
            "mean": list(mean),
            "std": list(std),
            "bit_depth": data.bit_depth,
        },
        # the name alone: manifests are published, and the paths of this machine are nobody's
        "data": {
            "name": text_of(path_of(data.name).name),
            "fingerprint": data.fingerprint,
            **({} if data.generated is None else {"generated": dict(data.generated)}),
        },
    }
