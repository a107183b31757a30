"""Channel groups as plain data, for files."""

from collections.abc import Mapping
from typing import Any

import torch

from smallfry.transforms.groups import ChannelGroup, Slice

__all__ = ["parse_group", "plain_group"]


def plain_group(group: ChannelGroup, block: int) -> dict[str, Any]:
    """Convert a group to plain data; evenly spaced entries become the first row and a step."""
    return {
        "name": group.name,
        "channels": group.channels,
        "block": block,
        "counts": dict(group.counts),
        "zeroed": [_plain_slice(each) for each in group.zeroed],
        "cut": [_plain_slice(each) for each in group.cut],
    }


def parse_group(content: Mapping[str, Any]) -> ChannelGroup:
    """Read a group of ``plain_group``."""
    channels = int(content["channels"])
    zeroed, cut_ = (
        tuple(_slice(each, channels) for each in content[key]) for key in ("zeroed", "cut")
    )
    return ChannelGroup(content["name"], channels, zeroed, cut_, counts=content["counts"])


def _plain_slice(each: Slice) -> dict[str, Any]:
    first, entries = each.entries[0], each.entries
    step = int(entries[1, 0] - entries[0, 0]) if len(entries) > 1 else 1
    head: dict[str, Any] = {"tensor": each.tensor, "dim": each.dim}
    if torch.equal(entries, first + step * torch.arange(len(entries))[:, None]):
        return head | {"first": first.tolist(), "step": step}
    return head | {"entries": entries.tolist()}


def _slice(content: Mapping[str, Any], channels: int) -> Slice:
    if "entries" in content:
        entries = torch.tensor(content["entries"], dtype=torch.int64)
    else:
        first = torch.tensor(content["first"], dtype=torch.int64)
        entries = first + int(content["step"]) * torch.arange(channels)[:, None]
    return Slice(content["tensor"], int(content["dim"]), entries)
