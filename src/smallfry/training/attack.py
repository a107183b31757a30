"""Accuracy under attack: projected gradient descent on the pixels, within a largest change.

    x ← clip(x + α sign ∂L/∂x) to |x − x₀| ≤ ε and to [0, 1], from a random start

with images in [0, 1], before normalisation (Madry et al., arXiv 1706.06083).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.tasks import Task
from smallfry.tasks.task import count_judged
from smallfry.training.augment import Normalize
from smallfry.training.evaluation import targets_of, task_of
from smallfry.transforms.modes import evaluating

Loss = Callable[[Tensor], Tensor]  # of inputs, a scalar


@dataclass(frozen=True)
class PGD:
    """Attack by projected gradient descent in the largest norm.

    Args:
        eps: Largest change of a pixel, of images in [0, 1].
        step: Change in a step (α); default a quarter of ``eps``.
        steps: Number of steps.

    Example:
        >>> from smallfry.training.attack import PGD
        >>> PGD(eps=8 / 255).steps
        20
    """

    eps: float = 8 / 255
    step: float | None = None
    steps: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1 or self.steps < 0 or (self.step is not None and self.step <= 0):
            raise UsageError("an attack's eps is 0 to 1, its step above 0, and steps at least 0")

    def __call__(
        self,
        inputs: Tensor,
        loss: Loss,
        normalize: Normalize,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return changed inputs with a larger loss.

        Args:
            inputs: Normalised images, (batch, channels, height, width).
            loss: To be raised.
            normalize: Normalisation of the images, which gives the bounds of a pixel.
            generator: Source of the random start, on the CPU; default PyTorch's.
        """
        scale = 255 * normalize.scale.to(inputs)
        low = normalize.shift.to(inputs)
        least = torch.maximum(inputs - self.eps * scale, low)
        most = torch.minimum(inputs + self.eps * scale, low + scale)
        start = torch.rand(inputs.shape, generator=generator).to(inputs)
        attacked = (inputs + self.eps * scale * (2 * start - 1)).clamp(least, most)
        step = (self.eps / 4 if self.step is None else self.step) * scale
        for _ in range(self.steps):
            attacked.requires_grad_(True)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(attacked), attacked)
            attacked = (attacked.detach() + step * gradient.sign()).clamp(least, most)
        return attacked.detach()


def parse_eps(text: str) -> float:
    """Read a largest change such as 8/255 or 0.03.

    Raises:
        UsageError: No number from 0 to 1.
    """
    try:
        value = float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 <= value <= 1:
        raise UsageError(f"eps is a number from 0 to 1 such as 8/255, not {text!r}")
    return value


def accuracy_under_attack(
    model: nn.Module,
    split: Split,
    normalize: Normalize,
    attack: PGD,
    batch_size: int = 256,
    task: Task | None = None,
) -> float:
    """Measure the share of images that stay right under an attack on each.

    Args:
        model: With the task's outputs, on the CPU; its parameters' gradients stay as they are.
        split: Labelled images.
        normalize: Normalisation of the images.
        attack: The attack, with access to the model and the labels.
        batch_size: Images at a time.
        task: Its loss is raised, and it marks what is right; default classification.
    """
    task = task or task_of({})
    generator = torch.Generator().manual_seed(0)
    right, judged = 0, 0
    with evaluating(model):
        for positions in torch.split(torch.arange(len(split)), batch_size):
            part = split.take(positions)
            images, labels = normalize(part.images), part.labels

            def loss(inputs: Tensor, labels: Tensor = labels) -> Tensor:
                outputs = model(inputs)
                return task.loss(outputs, targets_of(task, outputs, labels))

            attacked = attack(images, loss, normalize, generator)
            with torch.no_grad():
                outputs = model(attacked)
                targets = targets_of(task, outputs, labels)
                found = task.right(outputs, targets)
                right += int(found.sum())
                judged += int(count_judged(task, targets, found))
    return right / max(1, judged)
