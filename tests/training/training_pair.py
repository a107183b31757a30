"""What two processes do for ``test_processes.py``: several runs, one after the other."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from grey_pictures import draw_nothing
from test_processes import RUNS, settings

import smallfry  # noqa: F401  registers the models
from smallfry.errors import DataError, SmallfryError, Stopped
from smallfry.training import batches, conclusion, loop
from smallfry.training import train as training
from smallfry.training.loop import Trainer
from smallfry.training.train import resume, train

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    del os.environ[name]
# as two tasks of srun see it, without --ntasks-per-node
for name in ("SLURM_PROCID", "SLURM_LOCALID"):
    os.environ[name] = str(rank)
for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"):
    os.environ[name] = "2"
torch.set_num_threads(1)
conclusion.draw_run = draw_nothing


def say(name, error):
    (folder / f"{name}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def attempt(name, config):
    try:
        train(config)
    except SmallfryError as error:
        say(name, error)


def stopped_by_the_second(config, step, number=signal.SIGTERM):
    """Only the second process gets the signal."""
    fit, left = Trainer._step, [step]

    def counting(self, batch):
        fit(self, batch)
        left[0] -= 1
        if left[0] == 0 and rank == 1:
            os.kill(os.getpid(), number)

    Trainer._step = counting
    try:
        train(config)
    except Stopped as stop:
        say("stopped", stop)
    finally:
        Trainer._step = fit


def spoiled_in_the_second(config):
    """Only the second process sees an image that is not a number."""
    make = batches.TrainBatches.__getitem__

    def spoiled(self, step):
        batch = make(self, step)
        return batch._replace(inputs=batch.inputs * float("nan")) if rank and step == 3 else batch

    batches.TrainBatches.__getitem__ = spoiled
    try:
        attempt("spoiled", config)
    finally:
        batches.TrainBatches.__getitem__ = make


def failing_in(place, name, failing, error):
    """A function fails in one process only; what both say of it."""
    right = getattr(place, name)

    def wrong(*arguments):
        if rank == failing:
            raise error
        return right(*arguments)

    setattr(place, name, wrong)
    try:
        train(settings(folder / "pair" / f"{name}-fails", epochs=1))
    except (SmallfryError, OSError) as caught:
        say(name, caught)
    finally:
        setattr(place, name, right)


for name, changes in RUNS.items():
    train(settings(folder / "pair" / name, **changes))
recursive = RUNS["fsdp of a recursive model"]
stopped_by_the_second(settings(folder / "pair" / "shares", **recursive), 5)
stopped_by_the_second(settings(folder / "pair" / "stopped"), 5, signal.SIGUSR1)
resume(folder / "alone" / "parted")
spoiled_in_the_second(settings(folder / "pair" / "spoiled", checkpoint_seconds=0.0))
failing_in(loop, "score", 0, OSError("the disk is full"))
failing_in(batches.TrainBatches, "__getitem__", 1, DataError("photo.png: damaged"))
failing_in(training, "load_training_data", 1, DataError("photo.png: gone"))
attempt("small", settings(folder / "pair" / "small", batch_size=1))
attempt("taken", settings(folder / "pair" / "deep_supervision"))
attempt("batch_norm", replace(settings(folder / "pair" / "norm"), sync_batch_norm=True))
shares = {"strategy": "fsdp", "precision": "32-true"}
attempt("shared_kfac", settings(folder / "pair" / "one", **{**RUNS["kfac"], **shares}))
attempt("shared_methods", settings(folder / "pair" / "m", **shares, methods=["freeze"]))
attempt("shared_uneven", settings(folder / "pair" / "two", **shares, batch_size=33))
