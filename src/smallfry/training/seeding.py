"""Seeds of the random numbers of a step."""

import torch


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the random numbers of the CPU, and those of a device that is another.

    ``torch.manual_seed`` seeds every kind of device that could exist, and formats the stack for
    each that has not started: on a CPU a few steps of a small model cost less.

    Args:
        seed: Seed of at most 64 bits.
        device: Device that draws random numbers besides the CPU.

    Example:
        >>> import torch
        >>> seed_generators(3, torch.device("cpu"))
        >>> first = torch.rand(2)
        >>> seed_generators(3, torch.device("cpu"))
        >>> bool((torch.rand(2) == first).all())
        True
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
