"""Readers of ``config.json`` and ``model.safetensors`` of a shared folder.

Both may come from anyone. Nothing in them is run or unpickled, no other file is opened and nothing
is fetched for them; what does not make a model is refused with the reason. A model that timm wrote,
not smallfry, is read as far as its description goes.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg
from torch import Tensor, nn

from smallfry.deploy.run_metadata import LABEL_FORM, LATER_SPLITS, SPLITS, UNKNOWN, is_within
from smallfry.errors import RunError, SmallfryWarning, UsageError
from smallfry.training.augment import Normalize
from smallfry.training.checkpoint import WEIGHTS
from smallfry.training.config import CLASSIFICATION, MULTILABEL
from smallfry.training.run import TrainedModel
from smallfry.transforms.build import build
from smallfry.transforms.spec import OF_THE_FACTORY, ModelSpec
from smallfry.version import __version__
from smallfry_runtime.files import read_json, read_large
from smallfry_runtime.frames import RESIZES, frame_of
from smallfry_runtime.images import LARGEST_SIDE, is_bit_depth

# without and with transforms, with images that are not cropped, and with several classes per image;
# older versions stop at theirs
PLAIN_FORMAT, TRANSFORMED, RESIZED, FORMAT = 1, 2, 3, 4
CONFIG = "config.json"
INTERPOLATION, CROP = "bilinear", 1.0  # what smallfry_runtime.images does

CROP_MODES = {"crop": "center", "letterbox": "border", "squash": "squash"}  # timm's

OF_THE_SOURCE = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}


def read_config(file: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        RunError: Missing, damaged, of another library, or written by a newer smallfry.
    """
    try:
        config = read_json(file)
    except FileNotFoundError:
        raise RunError(f"{file.parent}: not a shared model, {CONFIG} is missing") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: can't be read ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise RunError(
            f"{file}: does not describe a timm model, as it has no architecture; models of other "
            f"libraries are not supported"
        )
    facts = config.get("smallfry")
    if facts is None:
        return config
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise RunError(f"{file}: damaged, its entry 'smallfry' has no format")
    if facts["format"] > FORMAT:
        raise RunError(
            f"{file.parent}: written by smallfry {facts.get('version', '?')} in format "
            f"{facts['format']}; this is smallfry {__version__}, which reads up to format "
            f"{FORMAT}: install a newer one"
        )
    return config


def read_weights(folder: Path, facts: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Read the weights of a folder, with their hash checked against ``facts`` if present.

    Raises:
        RunError: Missing or damaged.
    """
    file, again = folder / WEIGHTS, "copy or fetch it again"
    try:
        data = read_large(file)
    except FileNotFoundError:
        raise RunError(
            f"{folder}: {WEIGHTS} is missing; weights are read from no other file, since pickles "
            f"can run code"
        ) from None
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "out of memory"
        raise RunError(f"{file}: can't be read ({reason}); {again}") from error
    if facts is not None:
        noted = facts.get("weights")
        if not isinstance(noted, dict) or hashlib.sha256(data).hexdigest() != noted.get("sha256"):
            raise RunError(f"{file}: damaged, its hash is not that in {CONFIG}; {again}")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise RunError(f"{file}: damaged ({error}); {again}") from error


def described(
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None,
    classes: Sequence[str] | None,
    weights: Mapping[str, Tensor],
    where: str,
) -> TrainedModel:
    """Build the model that ``config.json`` describes, with its weights, in evaluation mode.

    Args:
        config: Its content.
        facts: Metadata written by smallfry; None for a timm model.
        classes: Names of the classes, in place of its own.
        weights: Those of the folder, which bound how large the model can be.
        where: Prefix of error messages.

    Raises:
        UsageError: No names of classes, or not as many as there are classes.
        RunError: A model that can't be built, that its weights don't fit, or that smallfry can't
            feed.
        Exception: Another kind, if an entry is missing or of another type.
    """
    wanted = dict(config.get("pretrained_cfg", config))
    labels = _labels(config, wanted, classes, where)
    channels, height, width = wanted["input_size"]
    arguments = dict(config.get("model_args", {}))
    channels = arguments.get("in_chans", channels)
    sides = (height, width)
    mean, std = _normalization(wanted, channels, sides, where)
    if facts is None:
        _warn_of_another_view(wanted, where)
    told = dict(facts or {})
    squash = "squash" if facts is None and wanted.get("crop_mode") == "squash" else "crop"
    resize = told.pop("resize", squash)
    if resize not in RESIZES:
        raise ValueError(f"smallfry.resize is {resize!r}")
    frame = frame_of(sides, resize)
    model, spec = _build(
        {
            "name": config["architecture"],
            "arguments": arguments,
            "transforms": told.pop("transforms", []),
        },
        *(wanted, len(labels), weights, where),
    )
    _require_facts(told, len(labels))
    version, number = told.pop("version", None), told.pop("format", None)
    bit_depth = told.pop("bit_depth", None)
    if not is_bit_depth(bit_depth):
        raise ValueError(f"smallfry.bit_depth is {bit_depth!r}")
    manifest = {
        **told,
        "format": number,
        "smallfry": version,
        "model": spec.to_dict(),
        "classes": list(labels),
        "input": {
            **{"size": frame.size, "channels": channels, "mean": list(mean), "std": list(std)},
            **({} if frame.resize == "crop" else {"resize": frame.resize}),
            "bit_depth": bit_depth,
        },
        "data": _data(told.get("data", {})),
    }
    if wanted.get("license"):
        manifest["license"] = str(wanted["license"])
    normalize = Normalize(mean, std)
    return TrainedModel(
        *(model, labels, frame.size, channels, normalize, manifest, bit_depth), resize=frame.resize
    )


def _normalization(
    wanted: Mapping[str, Any], channels: Any, sides: tuple[Any, Any], where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std by channel, of images that smallfry supports."""
    is_fit = all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides)
    if channels not in (1, 3) or not is_fit:
        raise RunError(
            f"{where}: expects images of {channels}×{sides[0]}×{sides[1]}; smallfry supports at "
            f"most {LARGEST_SIDE} pixels per side, with 1 or 3 channels"
        )
    mean, std = (tuple(map(float, wanted[key])) for key in ("mean", "std"))
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise RunError(f"{where}: its mean {mean} and std {std} don't fit {channels} channels")
    return mean, std


def _require_facts(told: Mapping[str, Any], classes: int) -> None:
    """Require metadata of the right types, and a task of classes."""
    if not isinstance(told.get("methods", []), list):
        raise TypeError("smallfry.methods is no list")
    _require_task(told, classes)
    for name in ("data", "training", "measured", "provenance", "start", "teacher"):
        if not isinstance(told.get(name, {}), Mapping):
            raise TypeError(f"smallfry.{name} is no object")


def _require_task(told: Mapping[str, Any], classes: int) -> None:
    """Require a task of classes, with a threshold for each if they are several an image."""
    if told.get("task", CLASSIFICATION) not in (CLASSIFICATION, MULTILABEL):
        raise ValueError(f"smallfry.task is {told['task']!r}")
    cuts = told.get("thresholds", [])
    if not isinstance(cuts, list) or not all(type(cut) in (int, float) for cut in cuts):
        raise TypeError("smallfry.thresholds is no list of numbers")
    if len(cuts) not in (0, classes) or not all(0 <= cut <= 1 for cut in cuts):
        raise ValueError(f"smallfry.thresholds are not {classes} numbers from 0 to 1")


def _data(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data's description; its split only in the form of ``DataConfig``."""
    data = {"name": UNKNOWN, "fingerprint": UNKNOWN, **told}
    splits = data.pop("splits", None)
    if isinstance(splits, dict):
        splits = splits | {k: v for k, v in LATER_SPLITS.items() if k not in splits}
        several = splits.get("several_labels") is True
        forms = {**SPLITS, **(LABEL_FORM if several else {})}
        known = splits.keys() == forms.keys()
        if known and all(isinstance(splits[name], kind) for name, kind in forms.items()):
            data["splits"] = splits
            if not is_within(Path(splits.get("labels") or "labels.csv")):
                raise ValueError(f"smallfry.data.splits.labels is {splits['labels']!r}")
    return data


def _labels(
    config: Mapping[str, Any],
    wanted: Mapping[str, Any],
    classes: Sequence[str] | None,
    where: str,
) -> tuple[str, ...]:
    """Return the class names, in the order of the logits."""
    count = config.get("num_classes", wanted.get("num_classes"))
    told = config.get("label_names", wanted.get("label_names")) if classes is None else classes
    if told is None:
        raise UsageError(
            f"{where}: does not name its {count} classes (label_names in {CONFIG}); pass them to "
            f"from_pretrained(…, classes=[…]), or use the model with timm"
        )
    if isinstance(told, Mapping):  # from indices, as JSON has them, to names
        told = [told[key] for key in sorted(told, key=int)]
    names = tuple(map(str, told))
    if len(names) != count or count < 1:
        error = RunError if classes is None else UsageError
        raise error(f"{where}: has {count} classes, but {len(names)} names for them")
    return names


def _warn_of_another_view(wanted: Mapping[str, Any], where: str) -> None:
    seen = wanted.get("interpolation", "bicubic"), wanted.get("crop_pct", 0.875)
    if seen != (INTERPOLATION, CROP):
        warnings.warn(
            f"{where}: was evaluated on images scaled {seen[0]} and cropped to {seen[1]} of their "
            f"side; smallfry scales {INTERPOLATION} without a crop, so results may differ",
            SmallfryWarning,
            stacklevel=4,
        )


def _build(
    content: Mapping[str, Any],
    wanted: Mapping[str, Any],
    classes: int,
    weights: Mapping[str, Tensor],
    where: str,
) -> tuple[nn.Module, ModelSpec]:
    """Build a model of timm's registry in evaluation mode, and its spec, without downloads."""
    spec = ModelSpec.from_dict(content, where)
    foreign = OF_THE_FACTORY & set(spec.arguments)
    if foreign:
        raise RunError(f"{where}: model_args in {CONFIG} may not hold {', '.join(sorted(foreign))}")
    known = {field.name for field in fields(PretrainedCfg)} - OF_THE_SOURCE
    cfg = {key: value for key, value in wanted.items() if key in known} | {"num_classes": classes}
    model = build(spec, weights, where=where, pretrained_cfg=cfg)
    if getattr(model, "num_classes", classes) != classes:
        raise RunError(f"{where}: its model_args and its {classes} classes contradict each other")
    # the number of classes came from pretrained_cfg, which is not in the spec
    return model, replace(spec, arguments={**spec.arguments, "num_classes": classes})
