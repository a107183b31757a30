"""Making of a plan: candidates by cost under the budget, and the speed of their training."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from smallfry.data import ImageData
from smallfry.deploy.pretrained import load_trained
from smallfry.deploy.targets import find_target
from smallfry.errors import SmallfryError, UsageError, first_line
from smallfry.fitting.config import Budget, FitConfig
from smallfry.fitting.costs import (
    Costs,
    build,
    measure_costs,
    rough_costs,
    without_details,
)
from smallfry.fitting.plan import (
    TUNED,
    Plan,
    Planned,
    Spent,
    affordable,
    first_count,
    rung_counts,
    training_seconds,
)
from smallfry.fitting.recipe import fitting_batch, recipe
from smallfry.fitting.zoo import Entry, zoo
from smallfry.studies.speed import cores_of, measure_epoch
from smallfry.training.run import TrainedModel

STRETCH = 1.6  # times the budget that pruning and four bits can save
LEAST_BESIDE = 4.0  # kB of an export beside its weights
MACS_PER_MS = 1e8  # that no core exceeds
LARGEST_BATCH = 512  # of the recipes
MACS_PER_SECOND = 1e10  # of images in training, on one core, about
FEWEST_STEPS = 1000  # of the best candidate's training, below which others come first
LAST_SHARE = 0.5  # of the training that the best candidate gets, about
SPEED_SECONDS = 2.0  # to measure a speed for, at most
SPEED_SHARE = 0.01  # of the minutes, at most
FASTER = 0.9  # of the time in float32, below which a lower precision is taken
PRETRAINED = Path("results/models")
FAULTS = (SmallfryError, RuntimeError, MemoryError)  # of one candidate, which the others don't have

Tell = Callable[[str], None]


class NothingFits(SmallfryError):
    """Lack of candidates within the budget, even compressed.

    Attributes:
        nearest: The one that comes nearest, with its costs.
    """

    def __init__(self, message: str, nearest: tuple[Entry, Costs]) -> None:
        super().__init__(message)
        self.nearest = nearest


def make_plan(config: FitConfig, data: ImageData, tell: Tell) -> Plan:
    """Measure costs and speeds, and plan the rungs.

    Args:
        config: The settings.
        data: The images.
        tell: Receiver of a line for each step.

    Raises:
        NothingFits: No candidate is near the budget.
        UsageError: Too few minutes for an epoch, or unknown names.
        SmallfryError: A training can't be started.
    """
    began = time.process_time()
    threads = config.threads or torch.get_num_threads()
    starts, left_out = find_pretrained(config, data)
    chosen, reasons = choose_candidates(config, data, starts, tell)
    left_out |= reasons
    precision: str | None = None
    candidates: list[Planned] = []
    failed: dict[str, str] = {}
    for entry, costs in chosen:
        try:
            if not candidates:  # the first that can be trained decides for all
                precision = _precision(entry, config, data, threads, tell)
            epoch = _epoch_seconds(entry, config, data, threads, precision, starts.get(entry.start))
        except FAULTS as error:
            failed[entry.name] = first_line(error)
            tell(f"{entry.name} is left out: {failed[entry.name]}")
            continue
        tell(f"{entry.name}: {epoch:.3g} CPU seconds per epoch")
        candidates.append(Planned(entry, costs, epoch, precision))
    if not candidates:
        name, reason = next(iter(failed.items()))
        raise UsageError(f"no candidate can be trained: {name}: {reason}")
    left_out |= failed
    total = 60 * config.minutes * cores_of(config.device, threads)
    spent = Spent(total, time.process_time() - began)
    counts = rung_counts(len(candidates))
    seconds = training_seconds(spent, sum(counts))
    candidates, reasons = affordable(candidates, counts, seconds, config.minutes)
    left_out |= reasons
    needs = any(not each.fits(config.budget) for each in candidates)
    tuning = TUNED * seconds if needs else 0.0
    plan = tuple(candidates), rung_counts(len(candidates)), seconds - tuning, tuning
    return Plan(*plan, threads, data.fingerprint, left_out)


def choose_candidates(
    config: FitConfig, data: ImageData, starts: dict[str | None, Path], tell: Tell
) -> tuple[list[tuple[Entry, Costs]], dict[str, str]]:
    """Choose candidates near the budget, in turns from each family, the largest first.

    Those that the minutes are too short for come last.

    Returns:
        Candidates with their costs, and reasons by name of those that are left out.

    Raises:
        NothingFits: There are none.
    """
    target, budget = find_target(config.target), config.budget
    wanted = first_count(config.minutes)
    rough, left_out = _rough(zoo(config.candidates), data)
    chosen: list[tuple[Entry, Costs]] = []
    nearest: tuple[Entry, Costs] | None = None
    beyond = 0  # chosen ones that need more than int8
    quick = [entry for entry, _, count in rough if _is_quick(count, config, data)]
    slow = [entry for entry, _, _ in rough if entry not in quick]
    in_turns = [*_in_turns(quick), *_in_turns(slow)]
    costs_of = {entry.name: (parameters, macs) for entry, parameters, macs in rough}
    possible = [e for e in in_turns if _rough_excess(*costs_of[e.name], budget) <= STRETCH]
    smallest = sorted(in_turns, key=lambda e: _rough_excess(*costs_of[e.name], budget))[:1]
    for entry in possible or smallest:
        if len(chosen) == wanted:
            left_out[entry.name] = "enough others are nearer to the budget"
            continue
        tell(f"measuring {entry.name}")
        try:
            with without_details():
                costs = measure_costs(entry, data, target)
        except FAULTS as error:
            left_out[entry.name] = first_line(error)
            tell(f"{entry.name} is left out: {left_out[entry.name]}")
            continue
        if nearest is None or excess(costs, budget) < excess(nearest[1], budget):
            nearest = entry, costs
        over = excess(costs, budget)
        if over > STRETCH or (over > 1 and beyond >= wanted // 3):
            left_out[entry.name] = f"{over:.2g} times the budget in int8"
            continue
        beyond += over > 1
        chosen.append((entry, costs))
    left_out |= {
        e.name: f"{_rough_excess(*costs_of[e.name], budget):.2g} times the budget, by its weights"
        for e in in_turns
        if e not in possible
    }
    if not chosen:
        _raise_nothing_fits(nearest, budget, left_out)
    started = [
        (replace(entry, start=name), costs)
        for name, path in starts.items()
        for entry, costs in chosen
        if name is not None and _is_start_of(entry, path)
    ]
    return [*started, *chosen], left_out


def excess(costs: Costs, budget: Budget) -> float:
    """Return the smallest excess over the budget of all precisions."""
    return min(budget.excess(costs.kb[p], costs.ms[p]) for p in costs.kb)


def find_pretrained(
    config: FitConfig, data: ImageData
) -> tuple[dict[str | None, Path], dict[str, str]]:
    """Find trained models to start from, whose images are of the data's size and channels.

    Models that were trained on the same data are left out, as validation images may be among what
    they were trained on; so are those in ``PRETRAINED`` that can't be read.

    Raises:
        UsageError: Two have the same name.
        SmallfryError: A named model can't be read.
    """
    folders = config.pretrained
    if folders is None:
        folders = tuple(sorted(PRETRAINED.iterdir())) if PRETRAINED.is_dir() else ()
    found: dict[str | None, Path] = {}
    left_out = {}
    for folder in folders:
        try:
            reason = _unlike(load_trained(str(folder)), data)
        except SmallfryError as error:
            if config.pretrained is not None:
                raise
            reason = first_line(error)
        if reason is None and folder.name in found:
            raise UsageError(
                f"two models to start from are named {folder.name}, {found[folder.name]} and "
                f"{folder.resolve()}: rename a folder, or leave one out"
            )
        if reason is None:
            found[folder.name] = folder.resolve()
        else:
            left_out[f"from {folder.name}"] = reason
    return found, left_out


def _unlike(trained: TrainedModel, data: ImageData) -> str | None:
    """Return the reason not to start from a model, if any."""
    if (trained.image_size, trained.channels) != (data.image_size, data.channels):
        return f"takes images of {trained.channels}×{trained.image_size}×{trained.image_size}"
    known = trained.manifest.get("data", {})
    if known.get("name") == Path(data.name).name or data.matches(str(known.get("fingerprint"))):
        return "was trained on this data: validation images would overrate it"
    return None


def _is_start_of(entry: Entry, path: Path) -> bool:
    spec = load_trained(str(path)).spec
    return entry.width == 1 and spec.architecture == entry.model and not spec.transforms


def _raise_nothing_fits(
    nearest: tuple[Entry, Costs] | None, budget: Budget, left_out: dict[str, str]
) -> None:
    if nearest is None:
        name, reason = next(iter(left_out.items()))
        raise UsageError(f"no candidate can be built for these images: {name}: {reason}")
    entry, costs = nearest
    best = min(costs.kb, key=lambda p: budget.excess(costs.kb[p], costs.ms[p]))
    kb, ms = costs.kb[best], costs.ms[best]
    raise NothingFits(
        f"no candidate is near {budget}: the nearest, {entry.name}, has {kb:.3g} kB and "
        f"{ms:.3g} ms in {best}, before it is trained; allow {needed(kb, ms, budget)}",
        nearest,
    )


def needed(kb: float, ms: float, budget: Budget) -> str:
    """Describe the limits that a model would fit into."""
    parts = []
    if budget.kb is not None and kb > budget.kb:
        parts.append(f"--max_kb {_rounded_up(kb)}")
    if budget.ms is not None and ms > budget.ms:
        parts.append(f"--max_ms {_rounded_up(ms)}")
    return " and ".join(parts) or "nothing more"


def _rounded_up(value: float) -> str:
    """Format a limit above a value, with three digits."""
    text = f"{value:.3g}"
    return text if float(text) >= value else f"{value * 1.005:.3g}"


def _rough(
    entries: Sequence[Entry], data: ImageData
) -> tuple[list[tuple[Entry, int, int]], dict[str, str]]:
    """Count parameters and multiply-accumulates, of the largest model of each family first."""
    found, left_out = [], {}
    for entry in entries:
        try:
            found.append((entry, *rough_costs(build(entry, data).model, data)))
        except FAULTS as error:
            left_out[entry.name] = first_line(error)
    order = {entry.family: position for position, entry in reversed([*enumerate(entries)])}
    return sorted(found, key=lambda each: (order[each[0].family], -each[2])), left_out


def _is_quick(macs: int, config: FitConfig, data: ImageData) -> bool:
    """Return whether a model can take enough steps in the minutes, by a rough speed."""
    cores = cores_of(config.device, config.threads or torch.get_num_threads())
    seconds = LAST_SHARE * 60 * config.minutes * cores
    images = seconds * MACS_PER_SECOND / macs
    return images / fitting_batch(LARGEST_BATCH, len(data.train)) >= FEWEST_STEPS


def _rough_excess(parameters: int, macs: int, budget: Budget) -> float:
    return budget.excess(parameters / 1000 + LEAST_BESIDE, macs / MACS_PER_MS)


def _in_turns(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Take one entry of each family in turn, in their order."""
    queues: dict[str, deque[Entry]] = {}
    for entry in entries:
        queues.setdefault(entry.family, deque()).append(entry)
    while queues:
        for family in list(queues):
            yield queues[family].popleft()
            if not queues[family]:
                del queues[family]


def _precision(
    entry: Entry, config: FitConfig, data: ImageData, threads: int, tell: Tell
) -> str | None:
    """Choose the precision of the training on a CPU, by its speed; None for the recipe's."""
    if cores_of(config.device, 2) == 1:
        return None
    fast = _epoch_seconds(entry, config, data, threads, None, None)
    plain = _epoch_seconds(entry, config, data, threads, "32-true", None)
    tell(f"an epoch of {entry.name} takes {plain:.3g} CPU seconds in float32, {fast:.3g} in lower")
    return None if fast < FASTER * plain else "32-true"


def _epoch_seconds(
    entry: Entry,
    config: FitConfig,
    data: ImageData,
    threads: int,
    precision: str | None,
    start: Path | None,
) -> float:
    seconds = min(SPEED_SECONDS, SPEED_SHARE * 60 * config.minutes)
    made = recipe(entry, config, data, threads=threads, precision=precision, start=start)
    return measure_epoch(made, seconds)["epoch_seconds"]
