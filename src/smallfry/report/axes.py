"""Logarithmic axes with readable ticks."""

import math
from typing import Any

from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

FINE = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))


def log_axis(axes: Any, which: str, low: float, high: float) -> None:
    """Make one axis, ``x`` or ``y``, logarithmic between limits, with readable ticks."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}lim")(low, high)
    getattr(axes, f"set_{which}scale")("log")
    ticks = log_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: f"{value:.6g}")
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Choose about four to nine round numbers between positive limits."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    decades = range(first, last + 1)
    thin = max(1, -(-len(decades) // 8))
    for parts in FINE:
        wanted = decades[::thin] if len(parts) == 1 else decades
        ticks = [float(f"{part}e{decade}") for decade in wanted for part in parts]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks
    even = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in even if low <= tick <= high]
