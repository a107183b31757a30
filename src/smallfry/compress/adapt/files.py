"""Files of adapters alone: kilobytes beside a base model that many of them can share.

A file holds every tensor that was trained, the description of the whole model, and the digest of
the frozen tensors, so that it fits no other base.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smallfry.errors import RunError
from smallfry.training.checkpoint import safetensors_bytes, save_checkpoint, weights_digest
from smallfry.training.run import TrainedModel, load_run
from smallfry.training.run_folder import RunFolder
from smallfry.transforms.adapters import CHILD, Adapters
from smallfry.transforms.classifier import classifier_names
from smallfry.transforms.norms import is_norm
from smallfry.transforms.spec import ModelSpec
from smallfry_runtime.files import parse_json

FILE = "adapters.safetensors"
WRITTEN = ("format", "smallfry", "files", "digest")  # entries of manifests that saving makes anew


def pack_adapters(model: nn.Module, manifest: Mapping[str, Any]) -> bytes:
    """Pack the trained tensors of a model with adapters, as a safetensors file.

    Args:
        model: The model.
        manifest: Its manifest, as of a checkpoint.
    """
    trained, weights = trained_names(model), model.state_dict()
    original = _original_names(manifest)
    frozen = {original(name): tensor for name, tensor in weights.items() if name not in trained}
    kept = {name: value for name, value in manifest.items() if name not in WRITTEN}
    notes = {"manifest": json.dumps(kept), "base": weights_digest(frozen)}
    return safetensors_bytes({name: weights[name] for name in sorted(trained)}, notes)


def attach_adapters(base: TrainedModel, file: str | Path) -> TrainedModel:
    """Attach the adapters of a file to the model that they were trained on.

    Args:
        base: Result of ``smallfry.load``; left as it is.
        file: ``adapters.safetensors`` of a run.

    Returns:
        The adapted model, with the classes and images of its training: its ``origin`` is the run
        that the file is in, and None if it is in none.

    Raises:
        RunError: The file can't be read, or belongs to another model.

    Example:
        >>> import smallfry  # doctest: +SKIP
        >>> from smallfry.compress.adapt.files import attach_adapters  # doctest: +SKIP
        >>> base = smallfry.load("runs/base")  # doctest: +SKIP
        >>> tuned = attach_adapters(base, "runs/cats/adapters.safetensors")  # doctest: +SKIP
    """
    try:
        with safe_open(str(file), "pt") as content:
            notes = content.metadata() or {}
            weights: dict[str, Tensor] = {n: content.get_tensor(n) for n in content.keys()}  # noqa: SIM118
        manifest, digest = parse_json(notes["manifest"].encode()), notes["base"]
        original = _original_names(manifest)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: no file of adapters ({error})") from error
    own = base.model.state_dict()
    names = {original(name) for name in weights}
    frozen = {name: tensor for name, tensor in own.items() if name not in names}
    if weights_digest(frozen) != digest:
        raise RunError(
            f"{file}: these adapters were trained on another model than "
            f"{base.origin or 'this one'}: load the one that their run started from"
        )
    layers = set(_adapted(manifest))
    for name, tensor in frozen.items():
        owner, _, leaf = name.rpartition(".")
        weights[f"{owner}.layer.{leaf}" if owner in layers else name] = tensor
    with TemporaryDirectory() as place:  # read again with all checks of a checkpoint
        folder = Path(place) / "best"
        save_checkpoint(folder, manifest, weights)
        trained = load_run(folder)
    run = RunFolder(Path(file).resolve().parent)
    return trained._replace(origin=run.path if run.config.is_file() else None)


def trained_names(model: nn.Module) -> set[str]:
    """List the trained tensors of a model with adapters.

    They are the adapters with their rules, the norms with their statistics, and the heads.
    """
    norms = [name for name, module in model.named_modules() if is_norm(module)]
    parts = (*classifier_names(model), *norms, "halt_head", CHILD)
    return {
        name
        for name in model.state_dict()
        if ".adapters." in name or any(name.startswith(f"{part}.") for part in parts)
    }


def _adapted(manifest: Mapping[str, Any]) -> list[str]:
    """List the names of the adapted layers."""
    transforms = ModelSpec.from_dict(manifest["model"]).transforms
    return [name for each in transforms if isinstance(each, Adapters) for name in each.layers]


def _original_names(manifest: Mapping[str, Any]) -> Callable[[str], str]:
    """Return a function from the names of tensors to those in the base model."""
    layers = _adapted(manifest)

    def original(name: str) -> str:
        for layer in layers:
            if name.startswith(f"{layer}.layer."):
                return f"{layer}.{name.removeprefix(f'{layer}.layer.')}"
        return name

    return original
