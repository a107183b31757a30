"""Metadata in ONNX files: classes and images, for other tools than smallfry's runtime."""

import json
from collections.abc import Mapping
from typing import Any

from onnx import ModelProto

from smallfry.training.run import TrainedModel, thresholds_of

__all__ = ["metadata_of", "with_metadata"]


def metadata_of(trained: TrainedModel) -> dict[str, Any]:
    """Return a model's classes, and how pictures become its input."""
    sample, frame = trained.manifest["input"], trained.frame
    thresholds = thresholds_of(trained)
    return {
        "classes": list(trained.classes),
        "height": frame.height,
        "width": frame.width,
        "channels": trained.channels,
        "resize": frame.resize,
        "interpolation": "bilinear",
        "mean": list(sample["mean"]),
        "std": list(sample["std"]),
        **({} if thresholds is None else {"thresholds": list(thresholds)}),
    }


def with_metadata(content: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Add entries to a serialised ONNX model, each value as JSON.

    The bytes before stay: parts of a message may follow each other.
    """
    more = ModelProto()
    for key, value in metadata.items():
        more.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    return bytes(content + more.SerializeToString())
