"""Interruptible training loop with exact resumption."""

import copy
import math
import signal
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, nn

from smallfry.data import ImageData, Split
from smallfry.errors import RunError, Stopped, TrainingError
from smallfry.io.signals import noting
from smallfry.io.terminal import command
from smallfry.tasks import AddsTerms, Batch
from smallfry.tasks.task import count_judged
from smallfry.training.augment import Augmentation
from smallfry.training.batches import Result, TrainBatches, derive_seed, resident
from smallfry.training.callbacks import Callbacks, EpochDone, Started, StepDone
from smallfry.training.checkpoint import Checkpoint, has_checkpoint, save_checkpoint
from smallfry.training.compiling import Compiled, compiling
from smallfry.training.compression import InTraining, MethodPlan
from smallfry.training.config import TrainConfig
from smallfry.training.continuation import changes_since, dotted, require_whole_epochs
from smallfry.training.evaluation import joined, predict, require_finite, score
from smallfry.training.events import EventWriter
from smallfry.training.freezing import freeze
from smallfry.training.launch_env import launcher_has_ended
from smallfry.training.loader import TrainLoader
from smallfry.training.method import find_methods
from smallfry.training.objective import Objective, Stateful, part_of
from smallfry.training.optimization import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    peak_learning_rate,
    unchecked,
    with_fisher,
)
from smallfry.training.position import Progress, divergence
from smallfry.training.processes import Processes, losing_none, start, synchronized
from smallfry.training.progress import QuietReporter, Reporter
from smallfry.training.run import RunFolder
from smallfry.training.seeding import seed_generators
from smallfry.training.selection import rank
from smallfry.training.sharding import (
    ShardedAverage,
    load_optimizer,
    load_weights,
    require_shareable,
    whole,
)
from smallfry.transforms.build import not_finite
from smallfry.transforms.spec import ModelSpec


class Trainer:
    """Training of a model.

    Args:
        model: The model, on any device.
        data: Training data.
        objective: Training objective.
        augment: Augmentation of training images.
        config: Everything else.
        folder: Run folder for checkpoints and metrics.
        manifest: Description of the model in its checkpoints.
        reporter: Receiver of training progress.
        processes: Those that train together; default this one and those it was started with.
        callbacks: Observers of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        objective: Objective,
        augment: Augmentation,
        config: TrainConfig,
        folder: RunFolder,
        manifest: Mapping[str, Any],
        reporter: Reporter,
        processes: Processes | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.data, self.objective, self.config = data, objective, config
        self.folder = folder
        self.normalize = augment.normalize
        processes = processes or start(config.device, config.precision, config.strategy)
        self.processes, self.fabric = processes, processes.fabric
        processes.last = folder.last
        self.reporter = reporter if processes.is_first else QuietReporter()
        self.callbacks = (callbacks if processes.is_first else None) or Callbacks()
        images = resident(data.train, self.fabric.device, config.resident)
        self.batches = TrainBatches(
            *(images, augment, config.images_per_step, config.seed),
            *(processes.rank, processes.count, config.epochs, config.balance.sampler),
        )
        self.total_steps = config.epochs * self.batches.steps_per_epoch
        self.progress = Progress()
        self.plan = MethodPlan(
            find_methods(config.methods),
            ModelSpec.from_dict(manifest["model"]).portable(),
            data,
            self.normalize,
            self.total_steps * objective.supervision_steps,
            config.seed,
        )
        self.manifest = {**manifest, **self.plan.unfinished()}

        if self.is_sharded:
            require_shareable(config, self.batches.batch_size, processes.count)
        if config.sync_batch_norm:
            model = synchronized(model, processes)
        convert = self.fabric.strategy.precision.convert_module
        self.raw_model = convert(self.fabric.to_device(model))
        if config.channels_last:
            self.raw_model.to(memory_format=torch.channels_last)
        self.running = self.plan.begin(self.raw_model)
        self.raw_model = convert(self.fabric.to_device(self.raw_model))  # with new layers
        steps = self.batches.steps_per_epoch
        self.freezing = freeze(self.raw_model, config.model, steps, processes)
        prepared = objective.prepare(self.raw_model)
        if config.compile:
            prepared = Compiled(prepared)
        self.plain = copy.deepcopy(self.raw_model).cpu() if self.is_sharded else None
        self.average: WeightAverage | ShardedAverage | None = None
        if config.ema.decay and not self.is_sharded:
            self.average = WeightAverage(self.raw_model, config.ema)
        self.model = self.fabric.setup_module(prepared)
        if config.ema.decay and self.is_sharded:
            self.average = ShardedAverage(self.raw_model, config.ema)
        changed = self.running.changes_gradients or getattr(objective, "changes_gradients", False)
        changed = changed or isinstance(objective.task, AddsTerms)
        optimizer = with_fisher(config.optimizer, objective.task)
        self.raw_optimizer = build_optimizer(
            unchecked(optimizer) if changed else optimizer,
            self.raw_model,
            prepared,
            objective.likelihood,
            # with which Fabric can't clip gradients, and shares can't be moved
            fused=config.precision != "16-mixed" and not self.is_sharded,
        )
        self.running.attach(self.raw_optimizer)
        self.peak_rate = peak_learning_rate(config.optimizer, self.raw_model)
        self.optimizer: Any = self.fabric.setup_optimizers(self.raw_optimizer)
        self.on_cpu = self.fabric.device.type == "cpu"
        self._pending: list[tuple[int, int, Result]] = []
        self._rate = self.peak_rate  # of the last step
        self._stamp = 0.0  # when the last step, or what had to be done after it, ended

    @property
    def is_sharded(self) -> bool:
        """True if each process holds a shard of the model."""
        return self.processes.count > 1 and self.config.strategy == "fsdp"

    def evaluated(self) -> nn.Module:
        """Return the model to evaluate, the average if present; complete in all processes."""
        if self.plain is not None:
            self.plain.load_state_dict(self._weights())
            return self.plain.to(self.fabric.device)
        if isinstance(self.average, WeightAverage):
            module: nn.Module = self.average.module
            return module
        return self.raw_model

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights to evaluate, unsharded."""
        if isinstance(self.average, ShardedAverage):
            return cast(dict[str, Tensor], whole(self.average.weights))
        model = self.raw_model if self.average is None else self.average.module
        return cast(dict[str, Tensor], whole(model.state_dict()))

    def fit(self) -> None:
        """Train until the last epoch, or until patience runs out.

        Raises:
            Stopped: A signal asked for an end; the state is saved.
            TrainingError: The loss is not a number any more, or another process has ended.
        """
        with losing_none(self.processes):
            self._fit()
            if self.plan.methods:
                self._finish()

    def _fit(self) -> None:
        started = time.monotonic() - self.progress.seconds
        cpu_started = time.process_time() - self.progress.cpu_seconds
        saved = time.monotonic()
        remaining = range(self.progress.step, self.total_steps)
        if self._ends_early():
            remaining = range(0)
        loader = TrainLoader(
            self.batches, remaining, self.config.workers, pin_memory=not self.on_cpu
        )
        writer: EventWriter | None = None

        def measure() -> None:
            self.progress.seconds = time.monotonic() - started
            self.progress.cpu_seconds = time.process_time() - cpu_started

        def begin() -> None:
            nonlocal writer
            rows = self.progress.history
            writer = EventWriter(self.folder.tensorboard, len(rows) + 1)
            self.folder.write_metrics(rows)

        self.processes.once(begin)
        self.reporter.start(self.total_steps, self.progress.step)
        about = self.config.to_dict(), self.config.epochs, self.progress.history
        self.callbacks.call("on_start", Started(self.folder.path, *about, self.raw_model))
        self._stamp = time.monotonic()
        try:
            with noting() as stop, closing(iter(loader)) as batches:
                alone = self.processes.count == 1  # or the others would wait for this one's step
                for batch in stop.cutting_short(batches) if alone else batches:
                    if batch is not None:
                        with compiling():
                            self._step(batch)
                    measure()
                    done = self.progress.step % self.batches.steps_per_epoch == 0
                    if done and batch is not None:
                        self._end_epoch(writer)
                    finished = self.progress.step == self.total_steps or self._ends_early()
                    late = time.monotonic() - saved >= self.config.checkpoint_seconds
                    # what has a best epoch can go on
                    late = late or (done and not has_checkpoint(self.folder.last))
                    told = stop.signal_number or (signal.SIGTERM if launcher_has_ended() else 0)
                    asked, due = self.processes.largest([told, late])
                    if (finished or due or asked) and self.progress.step:
                        self.save()
                        saved = time.monotonic()
                    measure()
                    self._stamp = time.monotonic()  # what came since the step was not its time
                    if asked:
                        saved_too = " and saved" if self.progress.step else ""
                        again = command("smallfry", "train", "--resume", self.folder.path)
                        raise Stopped(
                            asked,
                            f"stopped after step {self.progress.step} of {self.total_steps}"
                            f"{saved_too}; go on with: {again}",
                        )
                    if finished:
                        break
        finally:
            self.reporter.close()

    def save(self) -> None:
        """Write the state into ``last/``."""
        self._settle()
        self._require_finite_weights()
        trainer = {
            "weights": whole(self.raw_model.state_dict()),
            "optimizer": whole(self.raw_optimizer.state_dict()),
            "precision": self.fabric.strategy.precision.state_dict(),
            "methods": self.running.state_dict(),
            "progress": vars(self.progress),
            "settings": dotted(self.config.to_dict()),
        }
        if isinstance(self.objective, Stateful):  # of each process
            trainer["objective"] = self.processes.collect(self.objective.state_dict())
        manifest = {**self.manifest, "training": self._position()}
        weights = self._weights()
        self.processes.once(lambda: save_checkpoint(self.folder.last, manifest, weights, trainer))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint of ``save``."""
        trainer = checkpoint.trainer
        if trainer is None:
            raise TrainingError(f"{self.folder.last}: holds weights only, nothing to resume from")
        saved = trainer.get("settings")  # not in checkpoints of earlier versions
        changed = [] if saved is None else changes_since(saved, self.config)
        position = trainer["progress"]
        require_whole_epochs(
            position["step"],
            len(position["history"]),
            self.batches.steps_per_epoch,
            str(self.folder.last),
        )
        load_weights(self.raw_model, trainer["weights"])
        load_optimizer(self.raw_optimizer, trainer["optimizer"])
        self.fabric.strategy.precision.load_state_dict(trainer["precision"])
        if self.plan.methods:
            self.running.load_state_dict(trainer["methods"])
        if isinstance(self.average, ShardedAverage):
            self.average.load(checkpoint.weights)
        elif self.average is not None:
            self.average.module.load_state_dict(checkpoint.weights)
        if isinstance(self.objective, Stateful):
            own = part_of(trainer["objective"], self.processes.rank, self.processes.count)
            self.objective.load_state_dict(own, self.batches[0].to(self.fabric.device))
        earlier = {"cpu_seconds": math.nan}  # missing in checkpoints of earlier versions
        self.progress = Progress(**(earlier | trainer["progress"]))
        if any(change.name in ("epochs", "callbacks") for change in changed):
            self.progress.stopping = ""
        if any(change.name in ("select_by", "select_on") for change in changed):
            self.progress.best_score = (-math.inf,)  # of another score; the next epoch's is kept
        if changed:
            self.reporter.say(f"changed settings: {', '.join(map(str, changed))}")

    # One batch

    def _step(self, batch: Batch) -> None:
        config, progress = self.config, self.progress
        where = progress.step, self.batches.steps_per_epoch, config.epochs
        rate = self._rate = learning_rate(config.schedule, self.peak_rate, *where)
        result = self.train_on(batch, rate)
        progress.step += 1
        images = self.batches.batch_size
        self._pending.append((progress.step, images, result))
        if self.on_cpu or len(self._pending) >= 20:  # reading a result makes a GPU wait
            self._settle()
        loss = progress.sums.get("loss", 0.0) / max(1.0, progress.sums.get("images", 0.0))
        now = time.monotonic()
        took, self._stamp = now - self._stamp, now
        progress.sums["seconds"] = progress.sums.get("seconds", 0.0) + took
        speed = images / max(1e-9, took)
        self.reporter.step(loss, speed)
        where = progress.step, self.total_steps, len(progress.history) + 1
        done = StepDone(*where, loss, rate, speed, self.raw_model)
        asked = self.callbacks.call("on_step", done)
        progress.stopping = progress.stopping or asked

    def train_on(self, batch: Batch, rate: float) -> Result:
        """Take the optimizer's steps on a batch at a learning rate, without counting a step."""
        step, rank = self.progress.step, self.processes.rank
        for group in self.raw_optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0) * group.get("fallback_scale", 1.0)
        others = (rank,) if rank else ()
        dropout = derive_seed(self.config.seed, 2, step, *others)
        seed_generators(dropout, self.fabric.device)
        self.model.train()
        self.freezing.at(step)
        return self._fit_batch(batch.to(self.fabric.device))

    def _fit_batch(self, batch: Batch) -> Result:
        parts = batch.split(self.config.accumulate)
        rounds = [self.objective(self.model, part) for part in parts]
        whole, processes = self.batches.batch_size, self.processes
        losses: list[Tensor] = []
        while True:
            self.optimizer.zero_grad()
            sums = torch.zeros(4, dtype=torch.float64, device=self.fabric.device)
            last = False
            for number, (part, steps) in enumerate(zip(parts, rounds, strict=True), start=1):
                share = len(part.inputs) / whole
                with self.fabric.no_backward_sync(self.model, number < len(parts)):
                    step = next(steps)
                    # gradients are averaged over processes, and this is a share of a sum
                    self.fabric.backward(step.loss * (share * processes.count))
                sums[0] += step.loss.detach() * share
                targets = part.targets if step.targets is None else step.targets
                task = self.objective.task
                right = task.right(step.outputs, targets)
                sums[1] += right.sum()
                sums[2] += math.nan if step.halting is None else step.halting.mean() * share
                sums[3] += count_judged(task, targets, right)
                last = last or step.last
            scaler = getattr(self.fabric.strategy.precision, "scaler", None)
            penalty = self.running.add_penalty(None if scaler is None else scaler.scale)
            if penalty is not None:  # of the weights alone, so that all processes have the same
                sums[0] += penalty / processes.count
            if (clip := self.config.optimizer.clip) is not None:
                self.fabric.clip_gradients(
                    self.model, self.optimizer, max_norm=clip, error_if_nonfinite=False
                )
            self.running.observe(lambda: processes.total(sums[:1].clone())[0])  # noqa: B023
            self.running.step = self.progress.step * self.objective.supervision_steps + len(losses)
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.raw_model, self.progress.updates)
            self.progress.updates += 1
            loss, correct, halting, judged = processes.total(sums)
            losses.append(loss)
            if last or halting.item() > self.objective.halt_threshold:
                return Result(torch.stack(losses).mean(), correct, halting, len(losses), judged)

    def _settle(self) -> None:
        """Add pending results to the sums of the epoch."""
        for number, count, result in self._pending:
            loss = result.loss.item()
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}, not", number)
            added = {
                "images": float(count),
                "loss": loss * count,
                "correct": result.correct.item(),
                "unjudged": count - result.judged.item(),
                "halting": result.halting.item() * count,
                "batches": 1.0,
                "steps": float(result.steps),
            }
            sums = self.progress.sums
            for key, value in added.items():
                sums[key] = sums.get(key, 0.0) + value
        self._pending.clear()

    def _require_finite_weights(self) -> None:
        if self.processes.largest([not_finite(self.raw_model) is not None])[0]:
            raise self._diverged("a weight is not", self.progress.step)

    def _diverged(self, what: str, step: int) -> TrainingError:
        epoch = (step - 1) // self.batches.steps_per_epoch + 1
        return divergence(what, step, epoch, self.folder.last.exists())

    # One epoch

    def _end_epoch(self, writer: EventWriter | None) -> None:
        self._settle()
        self._require_finite_weights()
        progress, sums = self.progress, self.progress.sums
        epoch = progress.step // self.batches.steps_per_epoch
        row = {
            "epoch": epoch,
            "step": progress.step,
            "learning_rate": self._rate,
            "train_loss": sums["loss"] / sums["images"],
            "train_accuracy": sums["correct"] / max(1.0, sums["images"] - sums["unjudged"]),
        }
        if not math.isnan(sums["halting"]):
            row["train_halting"] = sums["halting"] / sums["images"]
            row["supervision_steps"] = sums["steps"] / sums["batches"]
        split = self.config.select_on
        scores = self._evaluate()
        row |= {f"{split}_{name}": value for name, value in scores.items()}
        row["images_per_second"] = sums["images"] / max(1e-9, sums["seconds"])
        row["seconds"] = progress.seconds
        progress.history.append(row)
        progress.sums = {}

        def write() -> None:
            for name, value in row.items():
                if name not in ("epoch", "step") and writer is not None:
                    writer.add_scalar(name.replace("_", "/", 1), value, epoch)
            self.folder.write_metrics(progress.history)

        self.processes.once(write)
        left = progress.seconds / progress.step * (self.total_steps - progress.step)
        self.reporter.epoch(row, self.config.epochs, left)
        reached = rank(self.objective.task, scores, self.config.select_by)
        is_best = reached > tuple(progress.best_score)
        if is_best:
            progress.best_epoch, progress.best_score = epoch, reached
            manifest = {**self.manifest, "training": {**self._position(), "scores": scores}}
            weights = self._weights()
            self.processes.once(lambda: save_checkpoint(self.folder.best, manifest, weights))
        model = self.evaluated() if self.plain is None else self.plain
        done = EpochDone(epoch, self.config.epochs, {**row}, is_best, model, self.folder.path)
        asked = self.callbacks.call("on_epoch", done)
        progress.stopping = self.processes.once(lambda: progress.stopping or asked)

    def _finish(self) -> None:
        """Save the final model of the methods as the best; ``last/`` keeps the training state."""
        state = self.running.state_dict()
        kept = InTraining(self.manifest, self._weights(), self._position(), state)
        device = self.fabric.device

        def scores(model: nn.Module) -> dict[str, float]:
            found = predict(model, self._selecting(), self.normalize, device)
            return score(require_finite(found), self.objective.task)

        self.processes.once(lambda: self.plan.conclude(self.folder.best, kept, scores, device))

    def _selecting(self) -> Split:
        """Return the selecting split."""
        return self.data.test if self.config.select_on == "test" else self.data.validation

    def _evaluate(self) -> dict[str, float]:
        """Score the selecting split, each process evaluating a part of it."""
        processes = self.processes
        split = self._selecting()
        model = self.evaluated()
        processes.copy_first(list(model.buffers()))  # of batch norms: each has its own
        part = processes.share_of(len(split))
        mine = None
        if part.start < part.stop:
            with self.fabric.autocast():
                some = split.take(torch.arange(part.start, part.stop))
                mine = predict(model, some, self.normalize, self.fabric.device)
        found = processes.collect(mine)

        def scored() -> dict[str, float]:
            predictions = joined([each for each in found if each is not None])
            try:
                return score(require_finite(predictions), self.objective.task)
            except RunError:
                what = f"an answer to the {self.config.select_on} images is not"
                raise self._diverged(what, self.progress.step) from None

        return processes.once(scored)

    def _ends_early(self) -> bool:
        """Return whether patience has run out, or a callback has asked for an end."""
        if self.progress.stopping and self.progress.step % self.batches.steps_per_epoch == 0:
            return True
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
