"""Interleaved latency measurement, so that a slower phase of the machine affects all alike."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from smallfry.errors import UsageError

__all__ = ["Latency", "take_turns"]

WARM_UP = 5  # calls before the first round
SETTLING = 1  # calls at the beginning of a turn, after which caches hold what a contestant needs


class Latency(NamedTuple):
    """Latency of a call in milliseconds, over the counted calls."""

    calls: int
    mean: float
    low: float  # a quarter of the calls took less
    p50: float
    high: float  # a quarter of the calls took more
    p95: float


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    rounds: int = 10,
    warm_up: int = WARM_UP,
    settling: int = SETTLING,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time calls in rounds, with each contestant once per round.

    Args:
        contestants: Functions to call, by name.
        seconds: Minimum seconds of counted calls for each contestant in all rounds. A turn has one
            counted call however long it takes, so slow contestants get more seconds.
        rounds: Number of turns of each contestant.
        warm_up: Calls of each before the first round that are not counted.
        settling: Calls at the beginning of each turn that are not counted, as others have had the
            caches meanwhile. A call that fills a turn by itself needs none.
        clock: Seconds; ``time.process_time`` counts what this process computes on all threads.

    Raises:
        UsageError: No round, or a negative time.
    """
    if rounds < 1 or seconds < 0:
        raise UsageError(
            f"latency needs at least one round and a non-negative time, got {rounds} rounds and "
            f"{seconds} seconds"
        )
    turn = seconds / rounds
    for call in contestants.values():
        for _ in range(warm_up):
            call()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            values = taken[name]
            if not values or values[-1] < turn:
                for _ in range(settling):
                    call()
            spent = None
            while spent is None or spent < turn:
                began = clock()
                call()
                values.append(clock() - began)
                spent = (spent or 0.0) + values[-1]
    return {name: _summarized(values) for name, values in taken.items()}


def _summarized(seconds: list[float]) -> Latency:
    values = 1000 * np.array(seconds)
    low, p50, high, p95 = np.percentile(values, [25, 50, 75, 95]).tolist()
    return Latency(len(values), float(values.mean()), low, p50, high, p95)
