"""All students of a small network on digits: each layer is removed, or keeps a share of its width.

teacher   3×3 convolutions to 8, 8, 16, 16, 16 channels, with batch norm and ReLU; maxima of 2×2
          behind the first and third position, which stay when the layer goes; linear layer
student   shares of the five widths: 0 (removed), ¼, ½ or 1; 4⁵ − 1 = 1,023 of them
training  8 epochs of batches of 64 by Adam at 5e-3, the rate falling to 0 by a cosine: squared
          error between the logits of student and teacher

Students that lack the same layers are trained at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.search.n2n.layer import Layer, choices_of
from smallfry.search.space import Candidate
from smallfry.search.tables.digits import MOMENTS, Digits, epochs_of
from smallfry.search.tables.stacked import Results, evaluate, repeat_channels, results_of, stack

__all__ = ["CHOICES", "LAYERS", "TEACHER", "build", "distill", "teacher_logits", "train_teacher"]

WIDTHS = (8, 8, 16, 16, 16)
POOLED = (0, 2)  # positions with a pool behind them
LAYERS = tuple(
    Layer(f"layer{number}", (0.0, 0.25, 0.5, 1.0), 3, 1, inputs / max(WIDTHS), width / max(WIDTHS))
    for number, (inputs, width) in enumerate(zip((1, *WIDTHS), WIDTHS, strict=False), start=1)
)
CHOICES = choices_of(LAYERS)
TEACHER = {choice.name: 1.0 for choice in CHOICES}
TEACHER_EPOCHS = 30
RATE = 5e-3


def build(candidate: Candidate) -> nn.Sequential:
    """Build a student.

    Example:
        >>> sum(p.numel() for p in build(TEACHER).parameters())
        7186
    """
    layers: list[nn.Module] = []
    channels = 1
    for position, (choice, width) in enumerate(zip(CHOICES, WIDTHS, strict=True)):
        if kept := int(candidate[choice.name] * width):
            layers += [nn.Conv2d(channels, kept, 3, 1, 1, bias=False), nn.BatchNorm2d(kept)]
            layers.append(nn.ReLU())
            channels = kept
        if position in POOLED:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4, 10))


def train_teacher(digits: Digits) -> nn.Sequential:
    """Train the teacher for 30 epochs on the classes, by the students' optimizer."""
    torch.manual_seed(0)
    model = build(TEACHER).to(digits.train.images.dtype)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for batches in epochs_of(digits.train, TEACHER_EPOCHS, seed=0):
        for rows, _, share in batches:
            logits = model(digits.train.images[rows])
            _step(optimizer, share, F.cross_entropy(logits, digits.train.labels[rows]))
    return model.eval()


@torch.no_grad()
def teacher_logits(teacher: nn.Sequential, digits: Digits) -> Tensor:
    """Compute the targets of the students, (images, classes)."""
    logits: Tensor = teacher(digits.train.images)
    return logits


def distill(
    students: Sequence[Candidate], targets: Tensor, seed: int, digits: Digits
) -> tuple[nn.Sequential, Results]:
    """Train students at once.

    Args:
        students: Candidates that lack the same layers.
        targets: Logits of the teacher.
        seed: Seed of the weights and the order.
        digits: The images, whose type is that of the weights.

    Returns:
        The stacked network, and the results.
    """
    networks = []
    for each in students:
        torch.manual_seed(seed)
        networks.append(build(each).to(digits.train.images.dtype))
    model, count = stack(networks), len(networks)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    found = []
    for epoch, batches in enumerate(epochs_of(digits.train, MOMENTS[-1], seed), start=1):
        model.train()
        for rows, _, share in batches:
            logits = model(repeat_channels(digits.train.images[rows], count))
            _step(optimizer, share, count * F.mse_loss(logits, targets[rows].expand_as(logits)))
        if epoch in MOMENTS:
            found.append(evaluate(model, digits.validation, count))
    return model, results_of(found, evaluate(model, digits.test, count))


def _step(optimizer: torch.optim.Optimizer, share: float, loss: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = share * RATE
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
