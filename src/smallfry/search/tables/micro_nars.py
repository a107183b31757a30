"""Small convolutional networks with their recipes on digits: 72 architectures × 24 recipes.

network   3×3 convolution, stride 2, to ``width``; ``early`` blocks; ``late`` blocks of
          width · ``ratio``, the first with stride 2; mean over the image; linear layer
block     3×3 convolution, dense, or depthwise with a 1×1 one behind it; batch norm; ReLU
recipe    SGD with momentum 0.9 or AdamW; a rate; weight decay or none; shifts by up to a pixel.
          8 epochs of batches of 64, the rate falling to 0 by a cosine

All recipes of an architecture are trained at once, from the same weights and in the same order of
images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.search.space import Candidate, Choice
from smallfry.search.tables.digits import MOMENTS, Digits, epochs_of, shifted
from smallfry.search.tables.stacked import Results, evaluate, results_of, stack

__all__ = ["ARCHITECTURE", "CHOICES", "RECIPE", "build", "train"]

ARCHITECTURE = (
    Choice("width", (4, 8, 16)),
    Choice("early", (0, 1, 2)),
    Choice("late", (1, 2)),
    Choice("ratio", (1, 2)),
    Choice("kind", ("dense", "depthwise")),
)
RECIPE = (
    Choice("optimizer", ("sgd", "adamw")),
    Choice("rate", (1, 5, 25)),  # times the lowest one of the optimizer
    Choice("decay", (False, True)),
    Choice("shift", (False, True)),
)
CHOICES = ARCHITECTURE + RECIPE
LOWEST_RATE = {"sgd": 0.02, "adamw": 0.001}
DECAY = {"sgd": 5e-3, "adamw": 0.5}  # coupled and decoupled, as in PyTorch
MOMENTUM, BETAS, EPSILON = 0.9, (0.9, 0.999), 1e-8


def build(candidate: Candidate) -> nn.Sequential:
    """Build a network.

    Example:
        >>> net = build({"width": 4, "early": 0, "late": 1, "ratio": 1, "kind": "dense"})
        >>> sum(p.numel() for p in net.parameters())
        246
    """
    width, wide = candidate["width"], candidate["width"] * candidate["ratio"]
    layers = [nn.Conv2d(1, width, 3, 2, 1, bias=False), *_norm(width)]
    for _ in range(candidate["early"]):
        layers += _block(width, width, 1, candidate["kind"])
    for position in range(candidate["late"]):
        layers += _block(wide if position else width, wide, 1 if position else 2, candidate["kind"])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10))


def _block(inputs: int, outputs: int, stride: int, kind: str) -> list[nn.Module]:
    if kind == "dense":
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), *_norm(outputs)]
    return [
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        *_norm(outputs),
    ]


def _norm(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]


def train(
    architecture: Candidate, recipes: Sequence[Candidate], seed: int, digits: Digits
) -> tuple[nn.Sequential, Results]:
    """Train an architecture with several recipes at once.

    Args:
        architecture: Values of ``ARCHITECTURE``.
        recipes: Values of ``RECIPE``, those with SGD first.
        seed: Seed of the weights, the order and the shifts.
        digits: The images, whose type is that of the weights.

    Returns:
        The stacked network, and its results.
    """
    dtype = digits.train.images.dtype
    torch.manual_seed(seed)
    model = stack([build(architecture).to(dtype)] * len(recipes))
    optimizer = StackedOptimizer(list(model.parameters()), recipes)
    found = []
    for epoch, batches in enumerate(epochs_of(digits.train, MOMENTS[-1], seed), start=1):
        model.train()
        for rows, shifts, share in batches:
            logits = model(_inputs(digits, rows, shifts, recipes))
            labels = digits.train.labels[rows].repeat(len(recipes))
            loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / len(rows)
            optimizer.step(torch.autograd.grad(loss, optimizer.parameters), share)
        if epoch in MOMENTS:
            found.append(evaluate(model, digits.validation, len(recipes)))
    return model, results_of(found, evaluate(model, digits.test, len(recipes)))


def _inputs(digits: Digits, rows: Tensor, shifts: Tensor, recipes: Sequence[Candidate]) -> Tensor:
    """Return a batch with the images of each recipe as a channel."""
    windows = shifted(digits.train.images, digits.black)
    plain, moved = windows[rows, 1, 1], windows[rows, shifts[:, 0], shifts[:, 1]]
    return torch.cat([moved if each["shift"] else plain for each in recipes], 1)


class StackedOptimizer:
    """SGD with momentum for the first networks and AdamW for the others, as PyTorch has them.

    Args:
        parameters: Of a stacked network.
        recipes: One for each network.
    """

    def __init__(self, parameters: list[nn.Parameter], recipes: Sequence[Candidate]) -> None:
        names = [each["optimizer"] for each in recipes]
        if names != sorted(names, reverse=True):
            raise ValueError("recipes with sgd come before those with adamw")
        self.parameters, self._steps, self._sgd = parameters, 0, names.count("sgd")
        rates = [LOWEST_RATE[each["optimizer"]] * each["rate"] for each in recipes]
        decays = [DECAY[each["optimizer"]] * each["decay"] for each in recipes]
        self._rates, self._decays = (
            torch.tensor(values, dtype=parameters[0].dtype).unsqueeze(1)
            for values in (rates, decays)
        )
        rows = [each.detach().view(len(recipes), -1) for each in parameters]
        self._momenta = [torch.zeros_like(each) for each in rows]  # of AdamW the first moments
        self._squares = [torch.zeros_like(each[self._sgd :]) for each in rows]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], share: float) -> None:
        """Change the parameters by a share of each network's rate."""
        self._steps += 1
        sgd, rates = self._sgd, share * self._rates
        states = zip(self.parameters, gradients, self._momenta, self._squares, strict=True)
        for parameter, gradient, momenta, squares in states:
            rows, slopes = parameter.view(len(rates), -1), gradient.reshape(len(rates), -1)
            momenta[:sgd].mul_(MOMENTUM).add_(slopes[:sgd] + self._decays[:sgd] * rows[:sgd])
            rows[:sgd] -= rates[:sgd] * momenta[:sgd]
            rows[sgd:] *= 1 - rates[sgd:] * self._decays[sgd:]
            momenta[sgd:].lerp_(slopes[sgd:], 1 - BETAS[0])
            squares.lerp_(slopes[sgd:].square(), 1 - BETAS[1])
            first, second = (1 - beta**self._steps for beta in BETAS)
            scales = (squares / second).sqrt_().add_(EPSILON)
            rows[sgd:] -= rates[sgd:] / first * momenta[sgd:] / scales
