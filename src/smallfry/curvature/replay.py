"""Random state and precision of a forward pass, for an exact rerun."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def autocast_of(device: str) -> tuple[str, torch.dtype] | None:
    """Return the device type and precision of autocast on it; None if it is off."""
    if not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of the generators that a module may draw from, by device."""
    states = {"cpu": torch.get_rng_state()}
    for device in {p.device for p in module.parameters() if p.is_cuda}:
        states[str(device)] = torch.cuda.get_rng_state(device)
    return states


@contextmanager
def restored(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Draw from generators in these states, and restore them afterwards."""
    devices = [torch.device(name) for name in states if name != "cpu"]
    with torch.random.fork_rng(devices=devices):
        for name, state in states.items():
            if name == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, name)
        yield
