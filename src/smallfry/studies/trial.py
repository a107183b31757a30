"""Trial of a race: one network trained by one optimizer for a fixed time.

Seconds are those of forward, backward and step; evaluation stands outside. With one thread on a
CPU they are seconds of CPU time, which other work on the machine disturbs least.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smallfry.optim import NaturalGradient, TwoLevel
from smallfry.studies.contestants import CONTESTANTS
from smallfry.studies.problems import PROBLEMS, Examples, Problem

Phase = Literal["tuning", "tuned", "defaults", "fisher"]
EVALUATIONS = 24  # of a full run
TUNING_EVALUATIONS = 3  # of a trial of which the end counts
EVALUATED = 2048  # examples of each split
BATCH = 512  # of an evaluation
MEASURED_EVERY = 50  # steps between two measurements of Fisher errors


@dataclass(frozen=True)
class Job:
    """Specification of a trial.

    Args:
        phase: Purpose of the trial.
        problem: A key of ``PROBLEMS``.
        contestant: A key of ``CONTESTANTS``.
        settings: Settings of the optimizer.
        seed: Seed of initial weights, batches and sampled targets.
        trial: Number of the settings in the search.
        seconds: Seconds of training.
    """

    phase: Phase
    problem: str
    contestant: str
    settings: dict[str, float]
    seed: int
    trial: int
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """Unique key in a study."""
        return self.phase, self.problem, self.contestant, self.seed, self.trial


@dataclass(frozen=True)
class Resources:
    """Machine settings of trials.

    Args:
        root: Folder of the data, where it is needed.
        device: Such as "cpu" or "cuda".
        threads: CPU threads of a trial.
    """

    root: Path | None = None
    device: str = "cpu"
    threads: int = 1

    @property
    def clock(self) -> Literal["cpu", "wall"]:
        """Clock of the time limit."""
        return "cpu" if self.device == "cpu" and self.threads == 1 else "wall"

    def now(self) -> float:
        """Return the clock's seconds once all pending work is done."""
        if self.clock == "cpu":
            return time.process_time()
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def run_trial(
    job: Job, resources: Resources, training: Examples, held_out: Examples
) -> dict[str, Any]:
    """Train and measure.

    Returns:
        ``points`` (step, epoch, seconds, wall_seconds, training and validation loss), ``diverged``,
        ``steps``, milliseconds of a plain step, of one with a refresh, and on average, and
        ``state_over_weights``; for two-level methods the median ``energy`` of a coarse step.
    """
    problem = PROBLEMS[job.problem]
    model, optimizer = _start(job, resources)
    batches = _batches(len(training.pixels), problem.batch_size, job.seed, training.pixels.device)
    plain: list[float] = []
    refresh: list[float] = []
    energies: list[float] = []
    points: list[dict[str, float]] = []
    steps, seconds, began, diverged = 0, 0.0, time.perf_counter(), False
    model.train()
    evaluations = TUNING_EVALUATIONS if job.phase == "tuning" else EVALUATIONS
    for due in _moments(job.seconds, evaluations):
        while seconds < due and not diverged:
            seen = _refreshes(optimizer)
            start = resources.now()
            inputs, targets = training.batch(next(batches), problem.reconstruct)
            loss = problem.loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            diverged = not math.isfinite(loss.item())
            spent = resources.now() - start
            (plain if _refreshes(optimizer) == seen else refresh).append(spent)
            seconds, steps = seconds + spent, steps + 1
            if isinstance(optimizer, TwoLevel) and optimizer.energy is not None:
                energies.append(optimizer.energy)
        losses = [_evaluate(model, problem, part) for part in (training, held_out)]
        diverged = diverged or not all(map(math.isfinite, losses))
        if diverged:
            break
        points.append(
            {
                "step": steps,
                "epoch": steps * min(1.0, problem.batch_size / len(training.pixels)),
                "seconds": seconds,
                "wall_seconds": time.perf_counter() - began,
                "train": losses[0],
                "validation": losses[1],
            }
        )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    measured = {
        "points": points,
        "diverged": diverged,
        "steps": steps,
        "plain_ms": 1e3 * statistics.median(plain) if plain else None,
        "refresh_ms": 1e3 * statistics.median(refresh) if refresh else None,
        "mean_ms": 1e3 * seconds / max(1, steps),
        "state_over_weights": _state_bytes(optimizer.state_dict()) / weights,
    }
    if energies:
        measured["energy"] = statistics.median(energies)
    return measured


def fisher_errors(
    job: Job, resources: Resources, training: Examples, contestants: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Measure errors of the contestants' Fisher approximations along one AdamW trajectory.

    Each is made of the batch that it is compared with, of whole matrices: what a method is, without
    what running averages and few eigenpairs add.

    Args:
        job: With the settings of AdamW.
        resources: Data folder, device and threads.
        training: Training examples.
        contestants: Those of ours whose approximation has an error.

    Returns:
        For each contestant its points: step, and the relative Frobenius error by layer.
    """
    problem = PROBLEMS[job.problem]
    model, adamw = _start(job, resources)
    batches = _batches(len(training.pixels), problem.batch_size, job.seed, training.pixels.device)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    steps, began = 0, resources.now()
    model.train()
    while resources.now() - began < job.seconds or steps == 0:
        watching = {}
        for name in contestants if steps % MEASURED_EVERY == 0 else ():
            settings = {**CONTESTANTS[name].defaults, "factor_rank": None, "seed": job.seed}
            watching[name] = CONTESTANTS[name].build(model, problem, **settings)
        inputs, targets = training.batch(next(batches), problem.reconstruct)
        loss = problem.loss(model(inputs), targets)
        adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for name, watcher in watching.items():
            found[name].append({"step": steps, "layers": _layer_errors(watcher)})
        adamw.step()
        steps += 1
    return found


def _layer_errors(watcher: torch.optim.Optimizer) -> dict[str, float]:
    """Compute the errors of an optimizer after one batch, without a parameter step."""
    assert isinstance(watcher, NaturalGradient)
    for group in watcher.param_groups:
        group["lr"] = 0.0
    watcher.monitor()
    watcher.step()
    watcher.close()
    blocks = watcher.diagnostics().blocks
    return {b.layer: b.fisher_error for b in blocks if b.fisher_error is not None}


def _start(job: Job, resources: Resources) -> tuple[nn.Module, torch.optim.Optimizer]:
    problem, contestant = PROBLEMS[job.problem], CONTESTANTS[job.contestant]
    torch.manual_seed(job.seed)
    model = problem.build().to(resources.device)
    seed = {"seed": job.seed} if contestant.family == "ours" else {}
    return model, contestant.build(model, problem, **job.settings, **seed)


def _batches(count: int, size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the rows of full batches, reshuffled every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for rows in torch.split(order[: count - count % size], size) if count > size else [order]:
            yield rows.to(device)


def _moments(seconds: float, count: int) -> list[float]:
    """List the evaluation times, from the start at growing intervals to the end."""
    return [seconds * (i / count) ** 1.5 for i in range(count + 1)]


def _refreshes(optimizer: torch.optim.Optimizer) -> int:
    return optimizer.counters["statistics"] if isinstance(optimizer, NaturalGradient) else 0


@torch.no_grad()
def _evaluate(model: nn.Module, problem: Problem, examples: Examples) -> float:
    model.eval()
    count = min(EVALUATED, len(examples.pixels))
    total: float = 0.0
    for rows in torch.split(torch.arange(count, device=examples.pixels.device), BATCH):
        inputs, targets = examples.batch(rows, problem.reconstruct)
        total += problem.loss(model(inputs), targets).item() * len(rows)
    model.train()
    return total / count


def _state_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_state_bytes, state.values()))
    return sum(map(_state_bytes, state)) if isinstance(state, list | tuple) else 0
