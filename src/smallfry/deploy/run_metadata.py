"""Public metadata of a training run: settings and measurements, without local paths."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import yaml

from smallfry.costing import cost
from smallfry.data.named import HUB
from smallfry.io.json import strict
from smallfry.training.config import DataConfig, read_config
from smallfry.training.run import RunFolder, TrainedModel

SPLITS: Mapping[str, Any] = {  # fields of DataConfig that determine the splits, and their types
    "validation": int | float,
    "test": int | float,
    "split_seed": int,
    "limit": int | None,
    "label": str | None,
    "skip_unreadable": bool,
    "stream": bool | None,
    "remove_duplicates": bool,
}
LATER_SPLITS: Mapping[str, Any] = {"stream": None, "remove_duplicates": False}  # their defaults
LABEL_FORM: Mapping[str, Any] = {  # told of images with several classes alone
    "several_labels": bool,
    "labels": str | None,
    "image_column": str | None,
    "split_column": str | None,
    "label_columns": list,
    "label_separator": str | None,
}
UNKNOWN = "unknown"  # name and fingerprint of the data of a model without them
OF_THE_BEST = ("test", "best_epoch", "references")  # figures of no other weights
TOLD = (
    "checkpoint",
    "base_model",
    "start",
    "teacher",
    "methods",
    "data",
    "training",
    "measured",
    "provenance",
)


def metadata_of_run(run: Path, checkpoint: str, trained: TrainedModel) -> dict[str, Any]:
    """Collect the metadata of a run, as JSON values.

    Figures of the test split are left out where other weights than the best are meant: the test
    split was read once, for those.

    Args:
        run: The run folder; of one that has not ended only the costs are known.
        checkpoint: The weights that are meant, ``best`` or ``last``.
        trained: Those weights.

    Raises:
        RunError: Its summary or configuration is damaged.
    """
    folder = RunFolder(run)
    summary = folder.read_summary() or {}
    facts = {**metadata_of_model(trained), "checkpoint": checkpoint}
    facts["data"] |= summary.get("data", {})
    if folder.config.is_file():
        facts["data"] |= _origin(read_config(folder.config).data)
    if "measured" in summary:
        kept = dict(summary["measured"])
        for name in OF_THE_BEST if checkpoint != "best" else ():
            kept.pop(name, None)
        facts["measured"] = kept
    if "provenance" in summary:
        told = dict(summary["provenance"])
        facts["provenance"] = told | {"command": without_paths(str(told.get("command", "")))}
    return _plain(facts)


def metadata_of_model(trained: TrainedModel) -> dict[str, Any]:
    """Collect the metadata in a model's manifest, measuring its cost where missing."""
    facts = {name: trained.manifest[name] for name in TOLD if name in trained.manifest}
    facts["data"] = dict(facts.get("data", {}))
    if facts["data"].get("fingerprint") == UNKNOWN:
        facts["data"] = {}
    begun: Any = trained.model.pretrained_cfg
    if trained.manifest["model"]["arguments"].get("pretrained") and "tag" in begun:
        facts["base_model"] = f"timm/{begun['architecture']}.{begun['tag']}"
    if "parameters" not in facts.get("measured", {}):
        spent = cost(trained.model, torch.zeros(1, *trained.input_shape))
        facts["measured"] = {
            "parameters": spent.parameters,
            "macs": spent.macs,
            "weight_bytes": spent.bytes,
            "activation_bytes": spent.activation_bytes,
        }
    return _plain(facts)


def without_paths(command: str, keep_relative: bool = False) -> str:
    """Shorten the paths in a command line to file names.

    ``train --data /home/ann/cats --model.options={weights: a/b}`` becomes
    ``train --data cats --model.options={weights: b}``.

    Args:
        command: Command line in shell syntax.
        keep_relative: Keep paths below the working folder, so that the command can be pasted.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # an open quotation mark: not a command that was run
        return ""
    return shlex.join(_short_word(word, keep_relative) for word in words)


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a value to JSON values in canonical order."""
    return dict(strict({name: facts[name] for name in TOLD if name in facts}))


def _short_word(word: str, keep_relative: bool) -> str:
    if word.startswith("-") and "=" in word:
        option, _, value = word.partition("=")
        return f"{option}={_short_value(value, keep_relative)}"
    return _short_value(word, keep_relative)


def _short_value(value: str, keep_relative: bool = False) -> str:
    if "/" not in value and "\\" not in value:
        return value
    path = PurePosixPath(value)
    if keep_relative and not path.is_absolute() and not {"..", "~"} & {*path.parts, value[0]}:
        return value
    if value.lstrip()[:1] in ("{", "["):
        try:
            tree = yaml.safe_load(value)
        except yaml.YAMLError:
            return "…"
        return yaml.safe_dump(_short_leaves(tree), default_flow_style=True, width=10**6).strip()
    return PureWindowsPath(value).name or "…"  # splits at both kinds of slash


def _short_leaves(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {_short_leaves(key): _short_leaves(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_short_leaves(value) for value in tree]
    return _short_value(tree) if isinstance(tree, str) else tree


def _origin(config: DataConfig) -> dict[str, Any]:
    """Describe the split of the data, and its Hub name if it is a named data set."""
    splits = {name: getattr(config, name) for name in SPLITS}
    if config.several_labels:
        kept = config
        if config.labels is None or not is_within(config.labels):  # a path of this machine
            kept = replace(config, labels=None, image_column=None, split_column=None)
        splits |= {name: getattr(kept, name) for name in LABEL_FORM}
        splits["labels"] = None if kept.labels is None else kept.labels.as_posix()
    hub = {"hub": HUB[config.name].repository} if config.name in HUB else {}
    return {**hub, "splits": splits}


def is_within(path: Path) -> bool:
    """Return whether a path stays within a folder that it is relative to."""
    return not path.is_absolute() and ".." not in path.parts
