"""NaN and infinity in training: it must stop with an error, and keep its last good state."""

import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from campaign.command import command
from campaign.runs import of_optimizer, without_pictures, write_config
from campaign.trials import Part, Verdict, generator
from smallfry.errors import RunError
from smallfry.training import model_source
from smallfry.training import train as training
from smallfry.training.checkpoint import load_checkpoint, save_checkpoint
from smallfry.training.config import DataConfig, ModelConfig, ObjectiveConfig
from smallfry.training.objective import Objective
from smallfry.training.optimization import NATURAL

VALUES = (math.nan, math.inf, -math.inf)
OPTIMIZERS = ("adamw", "sgd", "lamb", *NATURAL)
PLACES = ("loss", "gradient", "statistics", "weight", "checkpoint", "normalisation", "batch norm")
STEPS = 9  # of a run

real = training.build_objective, model_source.create_model, torch.autograd.grad


def prepare(folder: Path) -> Path:
    """Skip preparation."""
    return folder


def trial(folder: Path, number: int) -> Verdict:
    """Poison one run once."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        return _poisoned(Path(place), number)


def _poisoned(folder: Path, number: int) -> Verdict:
    random = generator("poison", number)
    place = PLACES[number % len(PLACES)]
    name = OPTIMIZERS[number // len(PLACES) % len(OPTIMIZERS)]
    value, at = random.choice(VALUES), random.randrange(2, STEPS)
    run, file = folder / f"run-{number}", folder / "config.yaml"
    without_pictures()
    training.build_objective, model_source.create_model, torch.autograd.grad = real
    changes: dict[str, Any] = {"optimizer": of_optimizer(name)}
    if place == "normalisation":
        changes["data"] = DataConfig(limit=200)
    if place == "batch norm":
        changes["model"] = ModelConfig("resnet10t", options={"stem_width": 8})
        changes["objective"] = ObjectiveConfig()
    write_config(file, run, **changes)
    what = f"{place}, {'natural gradient' if name in NATURAL else 'others'}"
    words = ["train", "--config", str(file)]
    if place == "normalisation":
        words += random.choice((["--data.mean=[.nan]", "--data.std=[1.0]"], ["--data.std=[.inf]"]))
        words += ["--data.mean=[.5]"] if len(words) == 4 else []
        said = command(*words)
        return Verdict(what, "refused", said.failure or (None if said.code == 2 else "was taken"))
    if place == "checkpoint":
        return _poisoned_checkpoint(what, words, run, value, random.choice((True, False)))
    POISONS[place](value, at)
    said = command(*words)
    if said.failure:
        return Verdict(what, "unfit", f"{said.failure} ({name}, {value}, step {at})")
    if said.code == 0:
        return Verdict(what, "left out of the step", _not_finite(run) and f"{name}: kept silently")
    told = "finite number" in said.err and said.code == 1
    failure = None if told else f"{name}: the output is {said.err[:200]}"
    return Verdict(what, "stopped, the checkpoint before is good", failure or _not_finite(run))


def _poisoned_checkpoint(
    what: str, words: list[str], run: Path, value: float, whole: bool
) -> Verdict:
    """Write a checkpoint with non-finite weights, which must neither predict nor train on."""
    if command(*words).code:
        return Verdict(what, "unfit", "the run itself failed")
    for place in (run / "best", run / "last"):
        manifest, weights, trainer = load_checkpoint(place)
        for tensor in (weights, (trainer or {}).get("weights", {})):
            for name in tensor:
                tensor[name].view(-1)[0] = value
        manifest.pop("files")
        save_checkpoint(place, manifest, weights, trainer)
    (run / "summary.json").unlink()
    said = command("evaluate", str(run)) if whole else command("train", "--resume", str(run))
    told = said.code == 1 and "finite" in said.err
    return Verdict(what, "refused", said.failure or (None if told else f"output: {said}"[:300]))


def _not_finite(run: Path) -> str | None:
    """Find non-finite values in a run's checkpoints, if any."""
    for place in ("last", "best"):
        try:
            kept = load_checkpoint(run / place)
        except RunError as error:
            if "there is no checkpoint" in str(error):
                continue
            return str(error)
        for name, weight in kept.weights.items():
            if not bool(weight.isfinite().all()):
                return f"{place}: {name} is not finite"
    return None


# Ways to poison a run


def _loss(value: float, at: int) -> None:
    counted = itertools.count(1)

    def build(config: ObjectiveConfig, model: nn.Module, *task: Any) -> Objective:
        objective = real[0](config, model, *task)

        class Poisoned(type(objective)):  # type: ignore[misc]
            def __call__(self, prepared: nn.Module, batch: Any) -> Any:
                for step in super().__call__(prepared, batch):
                    bad = next(counted) == at
                    yield step._replace(loss=step.loss * value) if bad else step

        return Poisoned(**vars(objective))

    training.build_objective = build


def _gradient(value: float, at: int) -> None:
    def create(config: ModelConfig, data: Any, *task: Any) -> tuple[nn.Module, dict[str, Any]]:
        model, spec = real[1](config, data, *task)
        counted = itertools.count(1)

        def spoil(gradient: Tensor) -> Tensor:
            return gradient * value if next(counted) == at else gradient

        next(p for p in model.parameters() if p.ndim > 1).register_hook(spoil)
        return model, spec

    model_source.create_model = create


def _weight(value: float, at: int) -> None:
    def create(config: ModelConfig, data: Any, *task: Any) -> tuple[nn.Module, dict[str, Any]]:
        model, spec = real[1](config, data, *task)
        counted = itertools.count(1)

        def spoil(module: nn.Module, arguments: Any, output: Any) -> None:
            if module.training and next(counted) == at:
                with torch.no_grad():
                    next(p for p in module.parameters() if p.ndim > 1).data.view(-1)[0] = value

        layer = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        layer.register_forward_hook(spoil)
        return model, spec

    model_source.create_model = create


def _statistics(value: float, at: int) -> None:
    counted = itertools.count(1)

    def grad(*arguments: Any, **options: Any) -> Any:
        found = real[2](*arguments, **options)
        if next(counted) != at // 3 + 1:
            return found
        return tuple(None if g is None else g * value for g in found)

    torch.autograd.grad = grad


def _batch_norm(value: float, at: int) -> None:
    def create(config: ModelConfig, data: Any, *task: Any) -> tuple[nn.Module, dict[str, Any]]:
        model, spec = real[1](config, data, *task)
        counted = itertools.count(1)

        def spoil(module: nn.Module, arguments: Any, output: Any) -> None:
            if module.training and next(counted) == at:
                module.running_var.data[0] = value

        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_hook(
            spoil
        )
        return model, spec

    model_source.create_model = create


POISONS: dict[str, Callable[[float, int], None]] = {
    "loss": _loss,
    "gradient": _gradient,
    "statistics": _statistics,
    "weight": _weight,
    "batch norm": _batch_norm,
}

PART = Part(
    "poison",
    "training stops with an error and the previous checkpoint is good, or the step is skipped",
    prepare,
    trial,
    count=504,
    short=7,
    seconds=120,
)
