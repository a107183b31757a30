"""Compression methods in a training run, from their start to the final model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smallfry.data import ImageData
from smallfry.errors import RunError, TrainingError, UsageError
from smallfry.io.json import strict
from smallfry.training.augment import Normalize
from smallfry.training.calibration import CalibrationBatches
from smallfry.training.checkpoint import load_checkpoint, save_checkpoint, write_file
from smallfry.training.method import (
    MethodSettings,
    Running,
    Setting,
    files_of,
    packing_of,
    to_dict,
)
from smallfry.transforms.build import build
from smallfry.transforms.spec import ModelSpec

DONE, UNFINISHED = "methods", "unfinished"  # entries of a manifest: applied, and still at work
REPORTS = "methods.json"  # in the run folder: what the methods report
CHOICE, LAST_EPOCH = "choice", "last epoch"  # entry of a summary's figures where no epoch is chosen


Scores = Callable[[nn.Module], dict[str, float]]


class InTraining(NamedTuple):
    """Checkpoint of a run with active methods."""

    manifest: Mapping[str, Any]
    weights: Mapping[str, Tensor]  # the average, if there is one
    position: Mapping[str, Any]  # epoch and step
    state: Mapping[str, Any]  # of the methods


@dataclass(frozen=True)
class MethodPlan:
    """Methods of a training run, with the context of their start.

    Args:
        methods: Their settings; may be none.
        spec: Spec of the trained model.
        data: Its training images are calibrated with.
        normalize: Normalisation of the images.
        steps: Optimizer steps of the run at most.
        seed: Random seed.
    """

    methods: tuple[MethodSettings, ...]
    spec: ModelSpec
    data: ImageData
    normalize: Normalize
    steps: int = 0
    seed: int = 0

    @property
    def trains(self) -> bool:
        """True if a method acts at optimizer steps, so that the last weights are its result."""
        return any(each.trains for each in self.methods)

    def begin(self, model: nn.Module, rehearsal: bool = False) -> Running:
        """Start the methods on a model, in place; the random state is unchanged."""
        if not self.methods:
            return Running((), model, Setting(self.spec, torch.empty(0)))
        batches = CalibrationBatches(self.data.train, self.normalize, model)
        given = (self.spec, batches.example(), batches, self.steps, self.seed)
        setting = Setting(*given, rehearsal)
        with _own_random_state():
            return Running(self.methods, model, setting)

    def rehearse(self) -> None:
        """Start and finish on an untrained model, to detect errors before training.

        Raises:
            UsageError: Layers that the model does not have, or methods in the wrong order.
        """
        if not self.methods:
            return
        with _own_random_state():
            running = self.begin(build(self.spec), rehearsal=True)
            try:
                running.finish()
            except ValueError as error:
                raise UsageError(f"methods: {error}") from error

    def finish(
        self, state: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device
    ) -> tuple[nn.Module, Running]:
        """Return the final model in evaluation mode, and the methods, with its spec and reports.

        Args:
            state: Of the methods at work, as ``Running.state_dict``.
            weights: Those to finish, of the model in training; left as they are.
            device: Target device.
        """
        with _own_random_state():
            model = build(self.spec).to(device)
            running = self.begin(model)
            running.load_state_dict(state)
            model.load_state_dict(weights)
            running.finish()
            return model.eval(), running

    def unfinished(self) -> dict[str, Any]:
        """Return the manifest entry of active methods; empty without methods."""
        return {UNFINISHED: [to_dict(each) for each in self.methods]} if self.methods else {}

    def conclude(self, best: Path, kept: InTraining, scores: Scores, device: torch.device) -> None:
        """Save the final model, and files of the methods beside its folder.

        Its weights are those of the last step where a method has acted on them, and else those of
        the best epoch.

        Args:
            best: The checkpoint of the best epoch, which the finished model replaces.
            kept: The run at its end.
            scores: Scores of the final model on the selecting split.
            device: Device for finishing and scoring.

        Raises:
            UsageError, TrainingError: It can't be finished, or its outputs are not finite.
        """
        weights, position = kept.weights, kept.position
        if not self.trains:
            checkpoint = load_checkpoint(best)
            if UNFINISHED not in checkpoint.manifest:  # a run that had ended and had no better one
                return
            weights, position = checkpoint.weights, checkpoint.manifest["training"]
        model, running = self.finish(kept.state, weights, device)
        try:
            found = scores(model)
        except RunError as error:
            raise TrainingError(f"after the methods: {error}") from None
        manifest = {key: value for key, value in kept.manifest.items() if key != UNFINISHED}
        done = [*manifest.get(DONE, []), *(to_dict(each) for each in self.methods)]
        training = {**position, "scores": found}
        manifest |= {"model": running.spec.to_dict(), DONE: done, "training": training}
        packing = packing_of(self.methods)
        save_checkpoint(best, manifest, model.state_dict(), packing=packing)
        for name, content in files_of(self.methods, model, manifest).items():
            write_file(best.parent / name, content)
        if running.reports:
            reports = json.dumps(strict(running.reports), indent=2, allow_nan=False)
            write_file(best.parent / REPORTS, reports + "\n")


def _own_random_state() -> Any:
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
