"""Shared models: as a folder, or as a repository on the Hugging Face Hub.

model.safetensors      the weights
config.json            timm's description of the model, and the run's metadata under ``smallfry``
README.md              the model card, drawn from config.json
confusion_matrix.png   of the test split, if the run has it

``timm.create_model("hf_hub:USER/NAME", pretrained=True)`` and ``"local-dir:FOLDER"`` read it too,
smallfry's own architectures once smallfry is imported. Nothing in it is a pickle, and nothing in it
names a folder of the machine that it comes from.
"""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf

from smallfry.deploy.hub import NAME, check_name, download, upload
from smallfry.deploy.hub_config import (
    CONFIG,
    CROP,
    CROP_MODES,
    FORMAT,
    INTERPOLATION,
    PLAIN_FORMAT,
    RESIZED,
    TRANSFORMED,
    described,
    read_config,
    read_weights,
)
from smallfry.deploy.model_card import model_card
from smallfry.deploy.run_metadata import metadata_of_model, metadata_of_run
from smallfry.errors import RunError, UsageError
from smallfry.io.replace import replacing
from smallfry.training.checkpoint import MANIFEST, WEIGHTS, write_file
from smallfry.training.config import MULTILABEL
from smallfry.training.run import (
    RUN_CONFIG,
    RunFolder,
    TrainedModel,
    load_run,
    require_class_answers,
    thresholds_of,
)
from smallfry.version import __version__
from smallfry_runtime.manifest import is_export
from smallfry_runtime.names import path_of
from smallfry_runtime.stages import entries, obstacle

CARD, PICTURE = "README.md", "confusion_matrix.png"
HUB, LOCAL = ("hf_hub", "hf-hub"), "local-dir"  # timm's prefixes for places of models


def save_pretrained(
    run: str | Path | TrainedModel,
    folder: str | Path,
    *,
    checkpoint: str = "best",
    license: str | None = None,
    repository: str | None = None,
) -> Path:
    """Write a trained model into a new folder for sharing.

    Args:
        run: A run folder, a checkpoint in one, a folder that was shared, or a model itself, of
            which less is known.
        folder: Destination; it must not exist, or be empty.
        checkpoint: The weights of the ``best`` epoch or of the ``last`` step.
        license: License identifier of the weights, such as ``apache-2.0``; none is assumed.
        repository: USER/NAME that the card's examples load; default the folder.

    Raises:
        UsageError: An invalid license or repository.
        RunError: The run can't be read, or the folder is taken or can't be written.
    """
    if repository is not None:
        check_name(repository)
    license = _checked_license(license)
    place = Path(folder).expanduser()
    try:
        with replacing(place, lambda: _require_free(place)) as new:
            trained, facts, picture = gather(run, checkpoint)
            require_class_answers(trained)
            license = license or trained.manifest.get("license")
            config = _write_model(new, trained, facts, license)
            if picture is not None:
                shutil.copyfile(picture, new / PICTURE)
            name = f"{HUB[0]}:{repository}" if repository else f"{LOCAL}:{place.resolve().name}"
            write_file(new / CARD, _card(config, name, picture is not None))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{place}: could not be written ({error})") from error
    return place


def push_to_hub(
    run: str | Path | TrainedModel,
    repository: str,
    *,
    checkpoint: str = "best",
    license: str | None = None,
    private: bool = False,
) -> str:
    """Upload a trained model to the Hugging Face Hub; return the address of its page.

    The repository is made if there is none; in one that is there, files of the same name, the
    card among them, get a new version.

    Args:
        run: See ``save_pretrained``.
        repository: USER/NAME.
        checkpoint: See ``save_pretrained``.
        license: See ``save_pretrained``.
        private: Show it to nobody else; an existing repository must be private already.

    Raises:
        UsageError: An invalid license or repository.
        RunError: The run can't be read.
        HubError: No token, no permission or no connection.
    """
    check_name(repository)
    with TemporaryDirectory() as place:
        folder = save_pretrained(
            run,
            Path(place) / "model",
            checkpoint=checkpoint,
            license=license,
            repository=repository,
        )
        return upload(folder, repository, private, f"Share a model with smallfry {__version__}")


def from_pretrained(
    name: str | Path, revision: str | None = None, *, classes: Sequence[str] | None = None
) -> TrainedModel:
    """Load a shared model, in evaluation mode on the CPU.

    Args:
        name: A folder; or USER/NAME of a repository on the hub, with or without ``hf_hub:`` before
            and ``@REVISION`` behind it. A folder of that name goes first.
        revision: Branch, tag or commit of a repository; default its main branch.
        classes: Names of the classes, where a model of timm does not have them.

    Raises:
        UsageError: Not a name, or the classes don't fit.
        HubError: The hub can't be reached, or has no such model for this user.
        RunError: The folder can't be used: incomplete, damaged, or of a newer version.
    """
    folder = _find(str(name), revision)
    config = read_config(folder / CONFIG)
    facts = config.get("smallfry")
    weights = read_weights(folder, facts)
    try:
        trained = described(config, facts, classes, weights, str(name))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(f"{folder / CONFIG}: damaged or incomplete ({error!r})") from error
    return trained


def load_trained(run: str | Path, checkpoint: str = "best") -> TrainedModel:
    """Load a trained model by the command's RUN argument.

    Args:
        run: A run folder, a checkpoint in one, a folder that was shared, or ``hf_hub:USER/NAME``.
        checkpoint: ``best`` or ``last``, of a run folder.

    Raises:
        UsageError, HubError, RunError: As ``require_model``, ``from_pretrained`` and ``load_run``.

    Example:
        >>> import smallfry
        >>> trained = smallfry.load("runs/digits")  # doctest: +SKIP
        >>> trained.predict("photo.png")[0].top  # doctest: +SKIP
    """
    require_model(run)
    path = path_of(str(run))
    if _is_named(run):
        return from_pretrained(run)
    if is_shared(path):
        return from_pretrained(path)
    if is_export(path):
        raise RunError(
            f"{run}: is an export, for predict, serve and benchmark; pass its run instead"
        )
    return load_run(run, checkpoint)


def require_model(run: str | Path, *, exports: bool = False) -> None:
    """Require that a RUN argument looks like a trained model.

    Args:
        run: See ``load_trained``.
        exports: Whether exports are accepted too, by which an error lists what is.

    Raises:
        RunError: It is another folder, a file, or nothing.
        UsageError: It is no name.
    """
    if not isinstance(run, str | Path):
        raise UsageError(
            f"a trained model is named by its folder, or is what smallfry.load returns, not "
            f"{type(run).__name__}; torch.onnx.export takes models of your own"
        )
    path = path_of(str(run))
    if str(run) and (_is_named(run) or _is_model(path)):
        return
    kinds = ["a run folder", "a checkpoint in one", "a shared folder", *["an export"] * exports]
    expected = f"expected {', '.join(kinds)} or {HUB[0]}:USER/NAME"
    if not str(run):
        raise RunError(f"the name of the model is empty; {expected}")
    if not path.is_dir():
        found = "is a file" if path.exists() else "there is no such file or folder"
        raise RunError(f"{run}: {found}; {expected}")
    names = entries(path)
    held = f"holds {', '.join(names[:3])}{', …' * (len(names) > 3)}" if names else "is empty"
    inner = [path / name for name in names if _is_model(path / name)]
    meant = [each for each in inner if exports or not is_export(each)][:1]
    hint = "".join(f"; did you mean {each}?" for each in meant)
    raise RunError(f"{run}: the folder {held}; {expected}{hint}")


def _is_named(run: str | Path) -> bool:
    """Return whether a RUN argument names a place of models on the Hub, or a local copy."""
    return str(run).partition(":")[0] in (*HUB, LOCAL)


def _is_model(folder: Path) -> bool:
    """Return whether a folder claims to be a run, a checkpoint, a shared model or an export."""
    return any((folder / name).is_file() for name in (MANIFEST, RUN_CONFIG, CONFIG))


def is_shared(folder: Path) -> bool:
    """Return whether a folder holds a shared model, rather than a run or checkpoint."""
    return (folder / CONFIG).is_file() and not (folder / MANIFEST).is_file()


# Writing


def _require_free(place: Path) -> None:
    if obstacle(place) is not None:
        raise RunError(f"{place}: not empty; use another folder")


def gather(
    run: str | Path | TrainedModel, checkpoint: str
) -> tuple[TrainedModel, dict[str, Any], Path | None]:
    """Collect a model, its metadata and its picture."""
    trained = run if isinstance(run, TrainedModel) else load_trained(run, checkpoint)
    if isinstance(run, TrainedModel):
        return run, metadata_of_model(run), None
    path, picture = path_of(str(run)), None
    if str(run).partition(":")[0] in (*HUB, LOCAL) or is_shared(path):
        facts, picture = metadata_of_model(trained), path / PICTURE
    else:
        if (path / MANIFEST).is_file():
            path = path.resolve()
            path, checkpoint = path.parent, path.name.removesuffix(".previous")
        facts = metadata_of_run(path, checkpoint, trained)
        picture = RunFolder(path).pictures / PICTURE
    shown = picture.is_file() and "test" in facts["measured"]
    return trained, facts, picture if shown else None


def _write_model(
    folder: Path, trained: TrainedModel, facts: Mapping[str, Any], license: str | None
) -> dict[str, Any]:
    """Write weights and ``config.json`` as timm does, with added metadata; return the latter."""
    spec, taken = trained.spec, trained.manifest["input"]
    model: Any = copy.deepcopy(trained.model).to(memory_format=torch.contiguous_format)
    kept = ("fixed_input_size", "first_conv", "classifier")  # the rest is of timm's own weights
    model.pretrained_cfg = {
        **{key: model.pretrained_cfg.get(key) for key in kept},
        "architecture": spec.architecture.partition(".")[0],
        "num_classes": len(trained.classes),
        "input_size": trained.input_shape,
        "mean": tuple(taken["mean"]),
        "std": tuple(taken["std"]),
        "interpolation": INTERPOLATION,
        "crop_pct": CROP,
        "crop_mode": CROP_MODES[trained.resize],
        **({"license": license} if license else {}),
    }
    arguments = {key: value for key, value in spec.arguments.items() if value is not None}
    labels = {"label_names": list(trained.classes)}
    try:
        save_for_hf(model, folder, labels, arguments, safe_serialization=True)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise RunError(
            f"timm has no configuration for this {spec.architecture} ({error})"
        ) from error
    config = read_config(folder / CONFIG)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    transforms = spec.to_dict().get("transforms", [])
    version = RESIZED if trained.resize != "crop" else TRANSFORMED if transforms else PLAIN_FORMAT
    thresholds = thresholds_of(trained)
    version = version if thresholds is None else FORMAT
    head: dict[str, Any] = {
        "format": version,
        "version": __version__,
        "weights": {"sha256": digest},
    }
    if thresholds is not None:
        head |= {"task": MULTILABEL, "thresholds": list(thresholds)}
    if transforms:
        head["transforms"] = transforms
    if trained.resize != "crop":
        head["resize"] = trained.resize
    if trained.bit_depth is not None:
        head["bit_depth"] = trained.bit_depth
    config["smallfry"] = {**head, **facts}
    written = config.get("model_args", {})
    if "img_size" in written:  # where timm gives two sides, not every model takes them
        written["img_size"] = trained.frame.plain
    write_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return config


def _card(config: Mapping[str, Any], name: str, has_picture: bool) -> str:
    try:
        return model_card(config, name, PICTURE if has_picture else None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"the run's metadata is damaged ({error!r})") from error


def _checked_license(license: str | None) -> str | None:
    if license is None:
        return None
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license.lower()):
        raise UsageError(
            f"'{license}' is not a license of the Hub: expected an identifier such as "
            "apache-2.0, mit, cc-by-4.0 or other"
        )
    return license.lower()


# Reading


def _find(name: str, revision: str | None) -> Path:
    """Return the folder of a name, downloaded if it is on the Hub."""
    scheme, colon, rest = name.partition(":")
    on_hub = bool(colon) and scheme in HUB
    folder = Path(rest if colon and scheme == LOCAL else name).expanduser()
    if not on_hub and folder.is_dir():
        if revision is not None:
            raise UsageError(f"{name}: is a folder, which has no revision; remove the revision")
        return folder
    repository, at, tagged = (rest if on_hub else name).partition("@")
    if not on_hub and not NAME.fullmatch(repository):
        raise RunError(
            f"{name}: no such folder; use USER/NAME or hf_hub:USER/NAME for a model on the Hub"
        )
    if at and revision is not None:
        raise UsageError(f"{name}: contradicts revision={revision!r} another")
    return download(repository, revision or tagged or None, [CONFIG, WEIGHTS, CARD])
