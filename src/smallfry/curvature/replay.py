"""Randomness and precision of a forward pass, so that it can be run again alike."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def autocast_of(device: str) -> tuple[str, torch.dtype] | None:
    """The kind of device and the precision of autocast there; None where it is off."""
    if not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """State of the generators that a module may draw from, by device."""
    states = {"cpu": torch.get_rng_state()}
    for device in {p.device for p in module.parameters() if p.is_cuda}:
        states[str(device)] = torch.cuda.get_rng_state(device)
    return states


@contextmanager
def restored(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Draw from generators in these states, and leave them as they were."""
    devices = [torch.device(name) for name in states if name != "cpu"]
    with torch.random.fork_rng(devices=devices):
        for name, state in states.items():
            if name == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, name)
        yield
