"""Predictor of accuracy from an architecture and its recipe (NARS; Dai et al., CVPR 2021).

    e     = ReLU(W₂ ReLU(W₁ a))            embedding of the architecture a
    costs = W₃ e                           logarithms of costs, standardised
    score = W₆ ReLU(W₅ ReLU(W₄ [e; r]))    with the recipe r, standardised

Embedding and costs are trained first, on as many architectures as wanted, as costs need no training
of the architectures; the score then on the few measured pairs. The sizes of the layers and the
numbers of steps are our own choice, as the paper has none.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.search.sampling import is_ordered
from smallfry.search.space import Candidate, Choice

__all__ = ["Prediction", "Predictor", "features", "kendall_tau"]

Array = NDArray[np.float64]
HIDDEN, EMBEDDING, SCORE_HIDDEN = 64, 24, 48
RATE, DECAY = 1e-3, 1e-4
COST_STEPS, SCORE_STEPS = 300, 200
SLOW = 0.1  # of the rate, for the embedding in the first half of the steps


class Prediction(NamedTuple):
    """Mean and standard deviation of the members' predictions, (candidates,)."""

    mean: Array
    spread: Array


class _Linear(nn.Module):
    """Linear layer of each member: (members, batch, inputs) → (members, batch, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(max(1, inputs))
        sizes = ((members, inputs, outputs), (members, 1, outputs))
        self.weight, self.bias = (
            nn.Parameter(bound * (2 * torch.rand(size, generator=generator) - 1)) for size in sizes
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)


class Predictor:
    """Ensemble of predictors with different initial weights.

    Args:
        architecture: Numbers that encode an architecture.
        recipe: Numbers that encode a recipe; 0 without one.
        costs: Number of costs.
        members: Members of the ensemble.
        seed: Seed of the weights.

    Example:
        >>> a, r = np.random.default_rng(0).random((2, 40, 3))
        >>> predictor = Predictor(architecture=3, recipe=3)
        >>> predictor.fit_costs(a, np.exp(a[:, :2]))
        >>> predictor.fit_scores(a, r, a[:, 0] + r[:, 0])
        >>> kendall_tau(predictor(a, r).mean, a[:, 0] + r[:, 0]) > 0.7
        True
    """

    def __init__(
        self, architecture: int, recipe: int, costs: int = 2, members: int = 5, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def linear(inputs: int, outputs: int) -> _Linear:
            return _Linear(members, inputs, outputs, generator)

        self._members = members
        self._embedding = nn.Sequential(
            linear(architecture, HIDDEN), nn.ReLU(), linear(HIDDEN, EMBEDDING), nn.ReLU()
        )
        self._costs = linear(EMBEDDING, costs)
        self._score = nn.Sequential(
            linear(EMBEDDING + recipe, SCORE_HIDDEN),
            nn.ReLU(),
            linear(SCORE_HIDDEN, SCORE_HIDDEN),
            nn.ReLU(),
            linear(SCORE_HIDDEN, 1),
        )
        self._mean, self._deviation = 0.0, 1.0

    def fit_costs(self, architectures: Array, costs: Array) -> None:
        """Train the embedding on costs.

        Args:
            architectures: (architectures, numbers).
            costs: Positive, (architectures, costs).
        """
        logarithms = np.log(costs)
        deviations = np.maximum(logarithms.std(0), 1e-9)
        targets = self._each((logarithms - logarithms.mean(0)) / deviations)
        inputs = self._each(architectures)
        trained = nn.ModuleList([self._embedding, self._costs])
        optimizer = torch.optim.Adam(trained.parameters(), RATE, fused=True)
        for _ in range(COST_STEPS):
            loss = (self._costs(self._embedding(inputs)) - targets).square().mean((1, 2)).sum()
            _step(optimizer, loss)

    def fit_scores(self, architectures: Array, recipes: Array, scores: Array) -> None:
        """Train everything on measured pairs.

        Args:
            architectures: (pairs, numbers).
            recipes: (pairs, numbers).
            scores: The greater the better, (pairs,).
        """
        self._mean, self._deviation = float(scores.mean()), float(scores.std()) or 1.0
        targets = self._each(((scores - self._mean) / self._deviation)[:, None])
        inputs, settings = self._each(architectures), self._each(recipes)
        groups: list[dict[str, Any]] = [
            {"params": list(self._embedding.parameters()), "lr": SLOW * RATE},
            {"params": list(self._score.parameters())},
        ]
        optimizer = torch.optim.Adam(groups, RATE, weight_decay=DECAY, fused=True)
        for step in range(SCORE_STEPS):
            if step == SCORE_STEPS // 2:
                optimizer.param_groups[0]["lr"] = RATE
            found = self._score(torch.cat([self._embedding(inputs), settings], 2))
            loss = F.huber_loss(found, targets, reduction="none").mean((1, 2)).sum()
            _step(optimizer, loss)

    @torch.no_grad()
    def __call__(self, architectures: Array, recipes: Array) -> Prediction:
        """Predict the scores of pairs."""
        embedded = self._embedding(self._each(architectures))
        found = self._score(torch.cat([embedded, self._each(recipes)], 2))[..., 0]
        values = found.double().numpy() * self._deviation + self._mean
        return Prediction(values.mean(0), values.std(0))

    def _each(self, values: Array) -> Tensor:
        """Give all members the same rows."""
        return torch.from_numpy(np.asarray(values, np.float32)).expand(self._members, -1, -1)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def features(choices: Sequence[Choice], candidates: Sequence[Candidate]) -> Array:
    """Encode candidates: ordered values and ranges from 0 to 1, others as zeros and a one.

    Ordered values are evenly spaced, so that 4, 8 and 16 are 0, ½ and 1; a choice that a candidate
    lacks is zeros.

    Returns:
        (candidates, numbers).

    Example:
        >>> features([Choice("width", (4, 8, 16)), Choice("kind", ("a", "b"))],
        ...          [{"width": 8, "kind": "b"}]).tolist()
        [[0.5, 0.0, 1.0]]
    """
    rows = [
        [number for choice in choices for number in _features(choice, each)] for each in candidates
    ]
    width = sum(1 if choice.values and is_ordered(choice) else choice.width for choice in choices)
    return np.array(rows, np.float64).reshape(len(candidates), width)


def _features(choice: Choice, candidate: Candidate) -> list[float]:
    is_known = choice.name in candidate
    if choice.values and is_ordered(choice):
        steps = max(1, len(choice.values) - 1)
        return [choice.values.index(candidate[choice.name]) / steps if is_known else 0.0]
    return choice.encode(candidate[choice.name]) if is_known else [0.0] * choice.width


def kendall_tau(one: Sequence[float] | Array, other: Sequence[float] | Array) -> float:
    """Compute Kendall's rank correlation, corrected for ties (τ-b); 0 if one side is constant.

    Example:
        >>> kendall_tau([1, 2, 3], [1, 3, 2])
        0.3333333333333333
    """
    upper = np.triu_indices(len(one), 1)
    values = (np.asarray(each, np.float64) for each in (one, other))
    signs = [np.sign(np.subtract.outer(each, each))[upper] for each in values]
    scale = math.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum())
    return float(signs[0] @ signs[1]) / scale if scale else 0.0
