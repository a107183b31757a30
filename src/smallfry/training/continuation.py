"""Changes of settings on resuming.

A batch is a function of seed and step, so the settings that decide which images a step takes are
fixed once a run has begun. The others may be changed, in ``config.yaml`` or beside ``--resume``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from smallfry.errors import RunError, UsageError
from smallfry.training.config import TrainConfig
from smallfry.training.objective_config import ObjectiveConfig, taken_settings

CHANGEABLE = (
    *("epochs", "patience", "device", "workers", "threads", "resident", "checkpoint_seconds"),
    *("progress", "callbacks", "loggers", "data.name", "data.root"),
)
UNREPORTED = ("run", "progress", "loggers", "checkpoint_seconds", "data.name", "data.root")


class Change(NamedTuple):
    """Changed setting since the last checkpoint."""

    name: str  # dotted, such as "optimizer.lr"
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {_as_yaml(self.before)} → {_as_yaml(self.now)}"


def dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names, one level deep."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key}.{name}".rstrip("."): found for name, found in inner}
    return flat


def require_changeable(names: Iterable[str]) -> None:
    """Require that settings may be given with ``--resume``.

    Raises:
        UsageError: One can't be changed any more.
    """
    for name in names:
        if name not in CHANGEABLE:
            raise UsageError(
                f"--resume uses the run's saved configuration, and {name} can't change any more: "
                f"remove it (can change: {', '.join(CHANGEABLE)}), or start a new run"
            )


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return a configuration with values replaced by dotted name.

    Data of another name has no ``data.root``, unless that is given too.
    """
    if "data.name" in changes:
        changes = {"data.root": None, **changes}
    for name, value in changes.items():
        group, _, inner = name.rpartition(".")
        if group:
            value = replace(getattr(config, group), **{inner: value})
        config = replace(config, **{group or name: value})
    return config


def changes_since(before: Mapping[str, Any], config: TrainConfig) -> list[Change]:
    """Return the changes since a checkpoint was saved.

    Args:
        before: The settings of then, by dotted name.
        config: The settings of now.

    Raises:
        RunError: One decides which images a step takes, so that epochs would repeat or be left
            out; or methods, which have begun.
    """
    now = dotted(config.to_dict())
    before = _effective(before)
    default = dotted(TrainConfig().to_dict())  # of settings that came after the checkpoint
    names = [name for name in (*before, *now) if name not in UNREPORTED]
    changes = [
        Change(name, before.get(name, default.get(name)), now.get(name))
        for name in dict.fromkeys(names)
    ]
    changed = [change for change in changes if change.before != change.now]
    fixed = next((c for c in changed if _decides_batches(c.name)), None)
    if fixed is not None:
        raise RunError(
            f"config.yaml has {fixed.name} {_as_yaml(fixed.now)}, and the run was trained with "
            f"{_as_yaml(fixed.before)} so far: images would repeat or be left out; write "
            f"{_as_yaml(fixed.before)} again, or start a new run"
        )
    methods = next((change for change in changed if change.name == "methods"), None)
    if methods is not None:
        raise RunError(
            f"config.yaml has methods {methods.now}, and the run began with {methods.before}: "
            "write those again, or start a new run"
        )
    return changed


def _effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that the objective of the name does not have."""
    start = "objective."
    given = {k.removeprefix(start): v for k, v in settings.items() if k.startswith(start)}
    others = {key: value for key, value in settings.items() if not key.startswith(start)}
    return others | dotted({"objective": ObjectiveConfig(**taken_settings(given)).to_dict()})


def require_whole_epochs(step: int, epochs: int, steps_per_epoch: int, where: str) -> None:
    """Require that a saved position fits the current number of steps in an epoch.

    Args:
        step: Steps done.
        epochs: Epochs that have ended.
        steps_per_epoch: By the settings of now.
        where: For the error.

    Raises:
        RunError: It does not.
    """
    if step // steps_per_epoch != epochs:
        raise RunError(
            f"{where}: {epochs} epochs had ended after step {step}, and with this config.yaml "
            f"they would be {step // steps_per_epoch}: batch_size or data differ from the "
            "run's; restore the original file, or start a new run"
        )


def _decides_batches(name: str) -> bool:
    known = ("data.bit_depth",)  # which the fingerprint of the pixels covers
    others = ("batch_size", "seed", "balance.sampler", "augment.repeats")
    return name in others or (name.startswith("data.") and name not in known)


def _as_yaml(value: Any) -> Any:
    return "null" if value is None else value
