"""Latency of a trained model on one image, with PyTorch."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from smallfry.deploy.latency import take_turns
from smallfry.training.run import TrainedModel


def measure_latency(
    trained: Mapping[str, TrainedModel], device: torch.device, rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Measure milliseconds of a forward pass of one image, in float32, without compilation.

    The models answer in turns, so that a drifting machine treats all alike.

    Args:
        trained: Models by name.
        device: Device of the models.
        rounds: Answers of each that are counted.
        threads: CPU threads meanwhile.

    Returns:
        For each its ``median_ms``, and the ``low_ms`` and ``high_ms`` that half of the rounds lie
        between.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls: dict[str, Callable[[], None]] = {}
        for name, model in trained.items():
            image = torch.zeros(1, *model.input_shape, device=device)
            calls[name] = partial(_answer, model.model.to(device).eval(), image)
        with torch.inference_mode():
            taken = take_turns(calls, seconds=0, rounds=rounds, settling=0)
    finally:
        torch.set_num_threads(before)
    return {
        name: {"median_ms": found.p50, "low_ms": found.low, "high_ms": found.high}
        for name, found in taken.items()
    }


def choose_device(name: str) -> torch.device:
    """Resolve a device name; auto is the machine's accelerator, as in training."""
    if name != "auto":
        return torch.device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _answer(module: nn.Module, image: torch.Tensor) -> None:
    module(image)
    if image.device.type != "cpu":
        torch.accelerator.synchronize(image.device)
