"""The training loop: fit, stop anywhere, go on exactly."""

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard.writer import SummaryWriter

from smallfry.data import ImageData, Split
from smallfry.errors import Stopped, TrainingError, UsageError
from smallfry.training.augment import Augment
from smallfry.training.batches import TrainBatches, derive_seed, resident, train_loader
from smallfry.training.checkpoint import Checkpoint, save_checkpoint
from smallfry.training.config import TrainConfig
from smallfry.training.evaluation import predict, score
from smallfry.training.objective import Batch, Objective
from smallfry.training.optimization import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    peak_learning_rate,
)
from smallfry.training.progress import Reporter
from smallfry.training.rebuild import not_finite
from smallfry.training.run import RunFolder


class Result(NamedTuple):
    """How one batch went."""

    loss: Tensor  # scalar, mean over its optimizer steps
    correct: Tensor  # scalar, images whose last logits are right
    halting: Tensor  # scalar, mean halting probability of the last step; nan where there is none
    steps: int  # optimizer steps taken


@dataclass
class Progress:
    """Where a run stands: all that the loop needs to go on, besides weights and optimizer."""

    step: int = 0  # batches done
    updates: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent training
    history: list[dict[str, float]] = field(default_factory=list)  # rows of metrics.csv
    best_epoch: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)  # accuracy, then -loss
    sums: dict[str, float] = field(default_factory=dict)  # over the epoch in progress


class Trainer:
    """Fits a model.

    Args:
        model: The model, on any device.
        data: What it is fitted to.
        objective: What is minimised.
        augment: What training images go through.
        config: Everything else.
        folder: Where checkpoints and metrics go.
        manifest: What describes the model in its checkpoints.
        reporter: Who is told how it goes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        objective: Objective,
        augment: Augment,
        config: TrainConfig,
        folder: RunFolder,
        manifest: Mapping[str, Any],
        reporter: Reporter,
    ) -> None:
        self.data, self.objective, self.config = data, objective, config
        self.folder, self.manifest, self.reporter = folder, dict(manifest), reporter
        self.normalize = augment.normalize
        self.fabric = _fabric(config)
        images = resident(data.train, self.fabric.device, config.resident)
        self.batches = TrainBatches(images, augment, config.batch_size, config.seed)
        self.total_steps = config.epochs * self.batches.steps_per_epoch
        self.progress = Progress()

        self.raw_model = self.fabric.to_device(model)
        prepared = objective.prepare(self.raw_model)
        if config.compile:
            prepared = _Compiled(prepared)
        self.raw_optimizer = build_optimizer(
            config.optimizer,
            self.raw_model,
            prepared,
            objective.likelihood,
            fused=config.precision != "16-mixed",  # with which Fabric can't clip gradients
        )
        self.peak_rate = peak_learning_rate(config.optimizer, self.raw_model)
        self.model, self.optimizer = self.fabric.setup(prepared, self.raw_optimizer)
        self.average = WeightAverage(self.raw_model, config.ema) if config.ema.decay else None
        self.on_cpu = self.fabric.device.type == "cpu"
        self._pending: list[tuple[int, int, Result]] = []
        self._stamp = 0.0  # when the last step, or what had to be done after it, ended

    @property
    def evaluated(self) -> nn.Module:
        """The model that counts: the average, if there is one."""
        return self.raw_model if self.average is None else self.average.module

    def fit(self) -> None:
        """Train to the end, or to the end of patience.

        Raises:
            Stopped: SIGINT or SIGTERM came; the state is saved.
            TrainingError: The loss is not a number any more.
        """
        started = time.monotonic() - self.progress.seconds
        saved = time.monotonic()
        remaining = range(self.progress.step, self.total_steps)
        if self._out_of_patience():
            remaining = range(0)
        loader = train_loader(
            self.batches, remaining, self.config.workers, pin_memory=not self.on_cpu
        )
        writer = SummaryWriter(
            str(self.folder.tensorboard), purge_step=len(self.progress.history) + 1
        )
        self.folder.write_metrics(self.progress.history)
        self.reporter.start(self.total_steps, self.progress.step)
        self._stamp = time.monotonic()
        try:
            with _signals() as stop:
                for batch in loader:
                    with _compiling():
                        self._step(batch)
                    self.progress.seconds = time.monotonic() - started
                    done = self.progress.step % self.batches.steps_per_epoch == 0
                    if done:
                        self._end_epoch(writer)
                    finished = self.progress.step == self.total_steps or self._out_of_patience()
                    due = time.monotonic() - saved >= self.config.checkpoint_seconds
                    if finished or due or stop.signal_number is not None:
                        self.save()
                        saved = time.monotonic()
                    self.progress.seconds = time.monotonic() - started
                    self._stamp = time.monotonic()  # what came since the step was not its time
                    if stop.signal_number is not None:
                        raise Stopped(
                            stop.signal_number,
                            f"stopped after step {self.progress.step} of {self.total_steps} and "
                            f"saved; go on with: smallfry train --resume {self.folder.path}",
                        )
                    if finished:
                        break
        finally:
            self.reporter.close()
            writer.close()

    def save(self) -> None:
        """Write the state into ``last/``."""
        self._settle()
        self._require_finite_weights()
        trainer = {
            "weights": self.raw_model.state_dict(),
            "optimizer": self.raw_optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "progress": vars(self.progress),
        }
        manifest = {**self.manifest, "training": self._position()}
        save_checkpoint(self.folder.last, manifest, self.evaluated.state_dict(), trainer)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint that ``save`` wrote."""
        trainer = checkpoint.trainer
        if trainer is None:
            raise TrainingError(f"{self.folder.last}: holds weights only, nothing to resume from")
        self.raw_model.load_state_dict(trainer["weights"])
        self.raw_optimizer.load_state_dict(trainer["optimizer"])
        self.fabric.strategy.precision.load_state_dict(trainer["precision"])
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.weights)
        self.progress = Progress(**trainer["progress"])

    # One batch

    def _step(self, batch: Batch) -> None:
        config, progress = self.config, self.progress
        rate = learning_rate(
            config.schedule,
            self.peak_rate,
            progress.step,
            self.batches.steps_per_epoch,
            config.epochs,
        )
        for group in self.raw_optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        torch.manual_seed(derive_seed(config.seed, 2, progress.step))  # dropout
        self.model.train()
        result = self._fit_batch(batch.to(self.fabric.device))
        progress.step += 1
        self._pending.append((progress.step, len(batch.labels), result))
        if self.on_cpu or len(self._pending) >= 20:  # reading a result makes a GPU wait
            self._settle()
        loss = progress.sums.get("loss", 0.0) / max(1.0, progress.sums.get("images", 0.0))
        now = time.monotonic()
        took, self._stamp = now - self._stamp, now
        progress.sums["seconds"] = progress.sums.get("seconds", 0.0) + took
        self.reporter.step(loss, len(batch.labels) / max(1e-9, took))

    def _fit_batch(self, batch: Batch) -> Result:
        parts = batch.split(self.config.accumulate)
        rounds = [self.objective(self.model, part) for part in parts]
        losses = []
        while True:
            self.optimizer.zero_grad()
            loss = torch.zeros((), device=self.fabric.device)
            correct, halting = loss.clone(), loss.clone()
            last = False
            for part, steps in zip(parts, rounds, strict=True):
                step = next(steps)
                share = len(part.labels) / len(batch.labels)
                self.fabric.backward(step.loss * share)
                loss += step.loss.detach() * share
                correct += (step.logits.argmax(dim=1) == part.labels).sum()
                halting += math.nan if step.halting is None else step.halting.mean() * share
                last = last or step.last
            if self.config.optimizer.clip is not None:
                self.fabric.clip_gradients(
                    self.model,
                    self.optimizer,
                    max_norm=self.config.optimizer.clip,
                    error_if_nonfinite=False,
                )
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.raw_model, self.progress.updates)
            self.progress.updates += 1
            losses.append(loss)
            if last or halting.item() > self.objective.halt_threshold:
                return Result(torch.stack(losses).mean(), correct, halting, len(losses))

    def _settle(self) -> None:
        """Add the results that are pending to the sums of the epoch."""
        for number, count, result in self._pending:
            loss = result.loss.item()
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}, not", number)
            added = {
                "images": float(count),
                "loss": loss * count,
                "correct": result.correct.item(),
                "halting": result.halting.item() * count,
                "batches": 1.0,
                "steps": float(result.steps),
            }
            sums = self.progress.sums
            for key, value in added.items():
                sums[key] = sums.get(key, 0.0) + value
        self._pending.clear()

    def _require_finite_weights(self) -> None:
        if not_finite(self.raw_model) is not None:
            raise self._diverged("a weight is not", self.progress.step)

    def _diverged(self, what: str, step: int) -> TrainingError:
        epoch = (step - 1) // self.batches.steps_per_epoch + 1
        kept = "the last good checkpoint is kept" if self.folder.last.exists() else "none was saved"
        return TrainingError(
            f"step {step} (epoch {epoch}): {what} a finite number; training stopped, {kept}. "
            "Try a lower optimizer.lr, optimizer.clip 1, a longer schedule.warmup_epochs, or "
            "precision 32-true"
        )

    # One epoch

    def _end_epoch(self, writer: SummaryWriter) -> None:
        self._settle()
        self._require_finite_weights()
        progress, sums = self.progress, self.progress.sums
        epoch = progress.step // self.batches.steps_per_epoch
        row = {
            "epoch": epoch,
            "step": progress.step,
            "learning_rate": self.raw_optimizer.param_groups[0]["lr"],
            "train_loss": sums["loss"] / sums["images"],
            "train_accuracy": sums["correct"] / sums["images"],
        }
        if not math.isnan(sums["halting"]):
            row["train_halting"] = sums["halting"] / sums["images"]
            row["supervision_steps"] = sums["steps"] / sums["batches"]
        split = self.config.select_on
        with self.fabric.autocast():
            scores = score(
                predict(self.evaluated, self._selection(), self.normalize, self.fabric.device)
            )
        row |= {f"{split}_{name}": value for name, value in scores.items()}
        row["images_per_second"] = sums["images"] / max(1e-9, sums["seconds"])
        row["seconds"] = progress.seconds
        progress.history.append(row)
        progress.sums = {}
        for name, value in row.items():
            if name not in ("epoch", "step"):
                writer.add_scalar(name.replace("_", "/", 1), value, epoch)
        self.folder.write_metrics(progress.history)
        left = progress.seconds / progress.step * (self.total_steps - progress.step)
        self.reporter.epoch(row, self.config.epochs, left)
        reached = (scores["accuracy"], -scores["loss"])
        if reached > tuple(progress.best_score):
            progress.best_epoch, progress.best_score = epoch, reached
            manifest = {**self.manifest, "training": {**self._position(), "scores": scores}}
            save_checkpoint(self.folder.best, manifest, self.evaluated.state_dict())

    def _selection(self) -> Split:
        return self.data.test if self.config.select_on == "test" else self.data.validation

    def _out_of_patience(self) -> bool:
        since_best = len(self.progress.history) - self.progress.best_epoch
        return self.config.patience is not None and since_best >= self.config.patience

    def _position(self) -> dict[str, Any]:
        epoch = self.progress.step / self.batches.steps_per_epoch
        return {
            "epoch": round(epoch, 4),
            "step": self.progress.step,
            "select_on": self.config.select_on,
            "ema": self.average is not None,
        }


class _Compiled(nn.Module):
    """A module with a compiled one in it, so that hooks on it are not compiled too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.compiled = torch.compile(module, dynamic=True)  # one graph for all batch sizes

    def forward(self, *arguments: Any) -> Any:
        return self.compiled(*arguments)


@contextmanager
def _compiling() -> Iterator[None]:
    """Say of an error of torch.compile what it is."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"torch.compile can't compile the training step ({reason}); train with compile false"
        ) from error


class _Stop:
    """The signal that came, if any."""

    signal_number: int | None = None


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Note the first SIGINT or SIGTERM; a second one acts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal_number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fabric(config: TrainConfig) -> Fabric:
    precision: Any = config.precision  # Fabric says which there are if this is none of them
    try:
        return Fabric(accelerator=config.device, devices=1, precision=precision)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"device {config.device}, precision {precision}: {error}") from error
