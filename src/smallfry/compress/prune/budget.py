"""Costs of a model by its channels: multiply-accumulates, or measured latencies."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from smallfry.costing import macs
from smallfry.errors import UsageError
from smallfry.transforms.groups import ChannelGroup, cut
from smallfry_runtime.files import read_json


class Budget(Protocol):
    """Cost of a model."""

    def without(self, removed: Sequence[int]) -> float:
        """Return the cost without such numbers of channels of each group."""


class MacsBudget:
    """Multiply-accumulates of all calls for one image.

    Args:
        model: Left as it is.
        example: A batch of inputs.
        groups: Groups of the model.
    """

    def __init__(self, model: nn.Module, example: Tensor, groups: Sequence[ChannelGroup]) -> None:
        self._model = copy.deepcopy(model).cpu().float().eval()
        self._example = example[:1].cpu().float()
        self._groups = tuple(groups)
        self._known: dict[tuple[int, ...], int] = {}

    def without(self, removed: Sequence[int]) -> float:
        """Count without such numbers of channels."""
        counts = tuple(removed)
        if counts not in self._known:
            small = copy.deepcopy(self._model)
            keep = {
                group.name: torch.arange(group.channels - count)
                for group, count in zip(self._groups, counts, strict=True)
            }
            cut(small, self._groups, keep)
            self._known[counts] = macs(small, self._example)
        return self._known[counts]


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of a model, measured with one group at a time narrower.

    The latency of several narrow groups is that of the model less what each saves alone.

    Args:
        whole: Milliseconds of the full model.
        groups: By a group's name, milliseconds by its number of channels, as text.

    Example:
        >>> from smallfry.compress.prune.budget import LatencyTable
        >>> table = LatencyTable(2.0, {"fc1": {"8": 1.5, "16": 2.0}})
        >>> table.saving("fc1", 12, full=16)
        0.25
    """

    whole: float
    groups: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        numbers = [self.whole, *(ms for each in self.groups.values() for ms in each.values())]
        if not self.groups or not all(type(n) in (int, float) and 0 < n < 1e9 for n in numbers):
            raise ValueError("latencies are positive numbers for each group")
        counts = [count for each in self.groups.values() for count in each]
        if not all(isinstance(n, str) and n.isascii() and n.isdigit() for n in counts):
            raise ValueError("latencies of a group are by its number of channels, as text")

    def saving(self, name: str, channels: float, full: int) -> float:
        """Return the milliseconds that a group saves, between the measured ones.

        More channels never save more: such measurements are noise, and are lowered.

        Args:
            name: The group.
            channels: Channels that it has.
            full: Channels that it has in the full model, which save nothing.
        """
        points = {int(count): ms for count, ms in self.groups[name].items() if int(count) < full}
        counts = sorted(points | {full: self.whole}, reverse=True)
        rising = list(accumulate((self.whole - points.get(n, self.whole) for n in counts), max))
        return float(np.interp(channels, counts[::-1], rising[::-1]))

    @classmethod
    def read(cls, file: str | Path) -> "LatencyTable":
        """Read a table from a JSON file.

        Raises:
            UsageError: Missing or damaged.
        """
        try:
            return cls(**read_json(Path(file)))
        except FileNotFoundError:
            raise UsageError(
                f"{file}: there is no such table of latencies; write one with "
                "benchmarks/latency_table.py"
            ) from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{file}: not a table of latencies ({error})") from error

    def write(self, file: Path) -> None:
        """Write the table."""
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")


class LatencyBudget:
    """Latency by a table.

    Args:
        table: Of the same model.
        groups: Groups of the model.

    Raises:
        UsageError: The table lacks a group.
    """

    def __init__(self, table: LatencyTable, groups: Sequence[ChannelGroup]) -> None:
        missing = [group.name for group in groups if group.name not in table.groups]
        if missing:
            raise UsageError(
                f"the table of latencies lacks the group '{missing[0]}': measure this model, or "
                "exclude the group"
            )
        self._table, self._groups = table, tuple(groups)

    def without(self, removed: Sequence[int]) -> float:
        """Predict the milliseconds without such numbers of channels."""
        saved = [
            self._table.saving(group.name, group.channels - count, group.channels)
            for group, count in zip(self._groups, removed, strict=True)
        ]
        return max(0.0, self._table.whole - sum(saved))


def prices(
    budget: Budget, removed: Sequence[int], blocks: Sequence[int], sizes: Sequence[int]
) -> list[float]:
    """Return what a channel of each group saves next, relative to the dearest, at least 0.001.

    Args:
        budget: The cost.
        removed: Channels of each group that are gone.
        blocks: Channels of each group that go together.
        sizes: Channels of each group in the full model; one without a block to spare costs 1.
    """
    now, saved = budget.without(removed), []
    for number, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        more: list[Any] = [*removed]
        more[number] += block
        has_room = more[number] < size
        saved.append(max(0.0, now - budget.without(more)) / block if has_room else None)
    most = max((each for each in saved if each is not None), default=0.0)
    return [1.0 if each is None or not most else max(1e-3, each / most) for each in saved]
