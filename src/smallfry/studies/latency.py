"""How long a trained model takes for one image."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

from smallfry.training.run import TrainedModel

WARM_UP = 5  # answers that are not counted


def measure_latency(
    trained: Mapping[str, TrainedModel], device: torch.device, rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of one image, in float32, without compilation.

    The models answer in turns, so that a drifting machine treats all alike.

    Args:
        trained: Models by name.
        device: Where they run.
        rounds: Answers of each that are counted.
        threads: CPU threads meanwhile.

    Returns:
        For each its ``median_ms``, and the ``low_ms`` and ``high_ms`` that half of the rounds lie
        between.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ready: dict[str, tuple[nn.Module, torch.Tensor]] = {}
        for name, model in trained.items():
            side = model.image_size
            image = torch.zeros(1, model.channels, side, side, device=device)
            ready[name] = (model.model.to(device).eval(), image)
        taken: dict[str, list[float]] = {name: [] for name in ready}
        with torch.inference_mode():
            for number in range(-WARM_UP, rounds):
                for name, (module, image) in ready.items():
                    seconds = _timed(module, image, device)
                    if number >= 0:
                        taken[name].append(1000 * seconds)
    finally:
        torch.set_num_threads(before)
    return {name: _spread(values) for name, values in taken.items()}


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is the machine's accelerator, where training runs too."""
    if name != "auto":
        return torch.device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _timed(module: nn.Module, image: torch.Tensor, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    module(image)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _spread(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median_ms": median(ordered),
        "low_ms": ordered[quarter],
        "high_ms": ordered[-1 - quarter],
    }
