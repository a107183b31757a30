"""Initial weights of a timm architecture: timm's own, or a local safetensors file."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors import SafetensorError, safe_open

from smallfry.errors import RunError, UsageError, nearest
from smallfry.training.config import ModelConfig, TrainConfig
from smallfry.transforms.spec import OF_THE_FACTORY
from smallfry_runtime.frames import ImageSize, frame_of
from smallfry_runtime.names import path_of, text_of

SUFFIX = ".safetensors"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
WAITING = 5.0  # seconds for the first answer of the hub
IMAGE = 224  # pixels, of weights that state no size


class InitialWeights(NamedTuple):
    """Initial weights of an architecture of timm's registry.

    Attributes:
        name: Of the file, or of timm's weights, such as resnet18.a1_in1k.
        arguments: Of ``timm.create_model``, which loads them.
        classes: Outputs of their classifier; None without one.
        channels: Of the images that they were trained on.
        size: Side of these images in pixels, or height and width.
        mean: Mean per channel that they were normalised with.
        std: Standard deviation per channel.
        license: Of timm's weights, where it is known.
        sha256: Of a local file.
    """

    name: str
    arguments: Mapping[str, Any]
    classes: int | None
    channels: int
    size: ImageSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str | None = None
    sha256: str | None = None

    def facts(self, model: str) -> dict[str, Any]:
        """Return the manifest entry on these weights."""
        known = {"license": self.license, "weights_sha256": self.sha256}
        return {"name": self.name, "model": model} | {k: v for k, v in known.items() if v}


def names_weights(config: ModelConfig) -> bool:
    """Return whether ``model.start`` names weights that timm loads, not a trained model."""
    return config.start == "true" or str(config.start).endswith(SUFFIX)


def find_weights(config: ModelConfig) -> InitialWeights | None:
    """Find the initial weights of ``model.start`` that timm loads; None if it names others.

    Raises:
        UsageError: No architecture for them, no such file, or weights that can't be had.
        RunError: The file is damaged.
    """
    if path_of(str(config.start)).suffix in PICKLES:
        raise UsageError(
            f"model.start {config.start}: pickled files are not read, as they can run code; save "
            f"their weights with safetensors.torch.save_file as NAME{SUFFIX}"
        )
    if not names_weights(config):
        return None
    if chosen := sorted(OF_THE_FACTORY & set(config.options)):
        raise UsageError(
            f"model.options: {chosen[0]} and model.start both name weights; leave one out"
        )
    if config.name == "auto":
        raise UsageError(
            f"model.start {config.start} needs the architecture of the weights: --model NAME"
        )
    if not timm.is_model(config.name):
        raise unknown_model(config.name)
    if config.start == "true":
        return _of_timm(config.name)
    return _of_file(path_of(str(config.start)), config.name)


def like_weights(config: TrainConfig, weights: InitialWeights) -> TrainConfig:
    """Adapt a configuration's image preprocessing to the initial weights.

    Size, channels, mean and standard deviation that are given stay.
    """
    data = config.data
    given: dict[str, Any] = {"image_size": weights.size, "channels": weights.channels}
    if data.channels in (None, weights.channels):
        given |= {"mean": list(weights.mean), "std": list(weights.std)}
    missing = {name: value for name, value in given.items() if getattr(data, name) is None}
    return replace(config, data=replace(data, **missing))


def _of_timm(model: str) -> InitialWeights:
    cfg = timm.get_pretrained_cfg(model)
    if not (cfg.has_weights and (cfg.hf_hub_id or cfg.url)):
        raise UsageError(
            f"timm has no weights for {model}; start from a run (--model.start RUN) or from a "
            f"file (--model.start NAME{SUFFIX})"
        )
    if cfg.hf_hub_id:
        _require_reachable(str(cfg.hf_hub_id), model)
    tag = f".{cfg.tag}" if cfg.tag else ""
    return _described(f"{model.partition('.')[0]}{tag}", model, {}, cfg.num_classes, None)


def _of_file(file: Path, model: str) -> InitialWeights:
    if not file.is_file():
        raise UsageError(f"model.start: there is no file {file}")
    cfg = timm.get_pretrained_cfg(model)
    names = cfg.classifier if isinstance(cfg.classifier, list | tuple) else (cfg.classifier,)
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: not a file of safetensors ({error})") from None
    classes = next((shapes[w][0] for n in names if (w := f"{n}.weight") in shapes), None)
    overlay = {"file": str(file), "num_classes": classes or -1, "custom_load": False}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return _described(text_of(file.name), model, overlay, classes, digest)


def _described(
    name: str, model: str, overlay: Mapping[str, Any], classes: int | None, sha256: str | None
) -> InitialWeights:
    cfg = timm.get_pretrained_cfg(model)
    arguments: dict[str, Any] = {"pretrained": True}
    if overlay:
        arguments["pretrained_cfg_overlay"] = dict(overlay)
    channels, *sides = cfg.input_size or (3, IMAGE, IMAGE)
    size = frame_of(sides).size
    mean, std = tuple(cfg.mean or ()), tuple(cfg.std or ())
    license = None if overlay else cfg.license
    return InitialWeights(name, arguments, classes, channels, size, mean, std, license, sha256)


def _require_reachable(repository: str, model: str) -> None:
    """Refuse at once, without timm's retries, where weights are neither cached nor to be had.

    Raises:
        UsageError: So, with what to do.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in files):
        return
    reason = "HF_HUB_OFFLINE is set"
    if not HF_HUB_OFFLINE:
        try:
            get_hf_file_metadata(hf_hub_url(repository, files[0]), timeout=WAITING)
            return
        except Exception as error:  # of a network: almost anything
            reason = type(error).__name__
    folder = os.environ.get("HF_HOME", "~/.cache/huggingface")
    raise UsageError(
        f"the weights of {model} are not in {folder} and the Hugging Face hub can't be reached "
        f"({reason}); give a file of them instead: --model.start NAME{SUFFIX}"
    )


def unknown_model(name: str) -> UsageError:
    """Build the error for an architecture that is not registered."""
    hint = nearest(name, timm.list_models()) or "; smallfry models lists those of smallfry"
    return UsageError(f"unknown model '{name}'{hint}")
