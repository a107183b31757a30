"""Choice of one option for each layer under a budget: an exact multiple-choice knapsack.

Dynamic programming over layers on the Pareto front of (cost, loss): a partial choice is dropped if
another costs no more and loses no more. The front of all layers is the whole trade-off.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import UsageError

MOST_POINTS = 100_000  # of a front; then the budget is divided into as many steps


class Option(NamedTuple):
    """One choice for a layer, such as its bits."""

    choice: int
    cost: int
    loss: float


class Point(NamedTuple):
    """Choice for all layers."""

    cost: int
    loss: float
    choices: dict[str, int]


class _Front(NamedTuple):
    cost: NDArray[np.int64]  # rising
    loss: NDArray[np.float64]  # falling
    choice: NDArray[np.int64]  # index of the option of the last layer
    parent: NDArray[np.int64]  # index in the front before


def trade_off(options: Mapping[str, Sequence[Option]]) -> list[tuple[int, float]]:
    """Find cost and loss of all choices that no other beats in both, cheapest first.

    Args:
        options: The choices for each layer.

    Example:
        >>> from smallfry.compress.quantize.knapsack import Option, trade_off
        >>> trade_off({"a": [Option(2, 2, 3.0), Option(4, 4, 0.0)], "b": [Option(2, 2, 1.0)]})
        [(4, 4.0), (6, 1.0)]
    """
    front = _fronts(options, None)[-1]
    return list(zip(front.cost.tolist(), front.loss.tolist(), strict=True))


def least_loss(options: Mapping[str, Sequence[Option]], budget: int) -> Point:
    """Choose the options of least summed loss within a budget.

    Args:
        options: The choices for each layer.
        budget: Largest summed cost.

    Raises:
        UsageError: The cheapest choice costs more than the budget.

    Example:
        >>> from smallfry.compress.quantize.knapsack import Option, least_loss
        >>> layers = {"a": [Option(2, 2, 3.0), Option(4, 4, 0.0)], "b": [Option(2, 2, 1.0)]}
        >>> least_loss(layers, budget=5)
        Point(cost=4, loss=4.0, choices={'a': 2, 'b': 2})
    """
    fronts = _fronts(options, budget)
    return _point(options, fronts, len(fronts[-1].cost) - 1)


def _fronts(options: Mapping[str, Sequence[Option]], budget: int | None) -> list[_Front]:
    cheapest = [min(option.cost for option in each) for each in options.values()]
    if budget is not None and sum(cheapest) > budget:
        raise UsageError(
            f"the budget of {budget:,} can't be met, as the cheapest choice costs "
            f"{sum(cheapest):,}: raise the budget, allow cheaper choices, or exclude layers"
        )
    left = sum(cheapest)
    none = np.zeros(1, np.int64)
    fronts = [_Front(none, np.zeros(1), none, none)]
    for least, each in zip(cheapest, options.values(), strict=True):
        left -= least
        most = None if budget is None else budget - left
        fronts.append(_extended(fronts[-1], each, most))
    return fronts


def _extended(front: _Front, options: Sequence[Option], most: int | None) -> _Front:
    count = len(front.cost)
    cost = np.concatenate([front.cost + option.cost for option in options])
    loss = np.concatenate([front.loss + option.loss for option in options])
    choice = np.repeat(np.arange(len(options)), count)
    parent = np.tile(np.arange(count), len(options))
    order = np.lexsort((loss, cost))
    if most is not None:
        order = order[cost[order] <= most]
    lowest = np.minimum.accumulate(loss[order])
    better = np.append(True, lowest[1:] < lowest[:-1])
    kept = order[better]
    if len(kept) > MOST_POINTS:  # the best within every step of the cost
        step = cost[kept[-1]] / MOST_POINTS
        cells = (cost[kept] / step).astype(np.int64)
        last = np.append(cells[1:] != cells[:-1], True)
        last[0] = True  # the cheapest, without which a budget might not be met
        kept = kept[last]
    return _Front(cost[kept], loss[kept], choice[kept], parent[kept])


def _point(options: Mapping[str, Sequence[Option]], fronts: list[_Front], index: int) -> Point:
    cost, loss = int(fronts[-1].cost[index]), float(fronts[-1].loss[index])
    choices: dict[str, int] = {}
    for front, (name, each) in zip(fronts[:0:-1], reversed(list(options.items())), strict=True):
        choices[name] = each[int(front.choice[index])].choice
        index = int(front.parent[index])
    return Point(cost, loss, dict(reversed(choices.items())))
