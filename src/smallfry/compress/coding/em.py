"""Expectation maximisation of hidden Chow–Liu trees.

Expected counts are gradients of the log-likelihood by the logarithms of the parameters:
∂ ln p(x) / ∂ ln θ = E[times that θ is used | x]. With a pseudo-count κ spread over each row,
θ ∝ count + κ / length; over all samples a step never lowers ln p + Σ (κ / length) ln θ. In small
batches, θ ← (1 − γ) θ + γ θ_batch with falling γ.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.compress.coding.chow_liu import levels
from smallfry.compress.coding.tree_likelihood import Logs, Tables, log_probability, logs_of
from smallfry.errors import UsageError
from smallfry_runtime.latent_trees import MOST_LATENT

FULL_BATCH = 512  # samples whose gradients are computed at a time, if a step takes all


class EMSettings(TypedDict, total=False):
    """Settings of ``EMConfig`` besides states and epochs."""

    batch: int | None
    full_epochs: int
    first_rate: float
    last_rate: float
    pseudo_count: float
    tied: bool
    spread: float
    single: bool
    seed: int


@dataclass(frozen=True)
class EMConfig:
    """Settings of expectation maximisation.

    Args:
        states: Hidden states M of a variable.
        epochs: Passes through the samples.
        batch: Samples of a step; None for all.
        full_epochs: Last epochs that take all samples in a step, if ``batch`` is given.
        first_rate: γ at the start, falling linearly.
        last_rate: γ at the end.
        pseudo_count: κ, of a row of a table.
        tied: Share transitions and emissions among all variables.
        spread: Standard deviation of the initial logarithms; small ones start on a plateau.
        single: Compute in float32, about twice as fast.
        seed: Random seed of the initial parameters and of the order of samples.

    Raises:
        UsageError: Values out of range.
    """

    states: int = 16
    epochs: int = 50
    batch: int | None = None
    full_epochs: int = 2
    first_rate: float = 0.3
    last_rate: float = 0.01
    pseudo_count: float = 1.0
    tied: bool = False
    spread: float = 1.0
    single: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.states <= MOST_LATENT:
            raise UsageError(f"states must be 1 to {MOST_LATENT}, not {self.states}")
        if self.epochs < 1 or (self.batch is not None and self.batch < 1):
            raise UsageError("epochs and batch must be at least 1")
        if not 0 < self.last_rate <= self.first_rate <= 1 or self.pseudo_count <= 0:
            raise UsageError("rates must be in (0, 1] and falling, and pseudo_count positive")


def learn(
    parents: tuple[int, ...], samples: NDArray[np.integer], categories: int, config: EMConfig
) -> Tables:
    """Learn the parameters of a tree.

    Args:
        parents: The tree.
        samples: (samples, variables).
        categories: Number of values of a variable.
        config: Settings.
    """
    tables = initial(parents, samples, categories, config)
    steps = list(_steps(len(samples), config))
    for step, rows in enumerate(steps):
        whole = len(rows) == len(samples)
        share = step / max(1, len(steps) - 1)
        rate = config.first_rate + (config.last_rate - config.first_rate) * share
        kappa = config.pseudo_count * len(rows) / len(samples)
        counts = expected_counts(parents, tables, samples[rows], config.single)
        tables = maximised(tables, counts, kappa, 1.0 if whole else rate)
    return tables


def _steps(count: int, config: EMConfig) -> Iterator[NDArray[np.int64]]:
    """Yield the samples of each step."""
    random = np.random.default_rng([config.seed, 1])
    small = config.epochs - config.full_epochs if config.batch is not None else 0
    for epoch in range(config.epochs):
        if epoch >= small or config.batch is None:
            yield np.arange(count)
            continue
        order = random.permutation(count)
        for start in range(0, count - config.batch + 1, config.batch):
            yield order[start : start + config.batch]


def initial(
    parents: tuple[int, ...], samples: NDArray[np.integer], categories: int, config: EMConfig
) -> Tables:
    """Create random parameters, with emissions around the variables' histograms."""
    random = np.random.default_rng(config.seed)
    size, states = len(parents), config.states
    count = 1 if config.tied else size
    columns = [samples.ravel()] if config.tied else list(samples.T)
    histograms = np.stack([np.bincount(c, minlength=categories) for c in columns]) + 1e-2

    def rows(*shape: int) -> NDArray[np.float64]:
        return np.exp(config.spread * random.standard_normal(shape))

    root, transitions = rows(states), rows(count, states, states)
    emissions = rows(count, states, categories) * histograms[:, None]
    return Tables(*(t / t.sum(axis=-1, keepdims=True) for t in (root, transitions, emissions)))


def expected_counts(
    parents: tuple[int, ...], tables: Tables, samples: NDArray[np.integer], single: bool = False
) -> Tables:
    """Sum the expected counts of all parameters over samples."""
    dtype = torch.float32 if single else torch.float64
    logs = Logs(*(each.requires_grad_() for each in logs_of(tables, dtype)))
    order = levels(parents)
    total: list[Tensor] = [torch.zeros_like(each, dtype=torch.float64) for each in logs]
    for part in torch.split(torch.from_numpy(samples.astype(np.int64)), FULL_BATCH):
        found = log_probability(logs, parents, order, part).sum()
        gradients = torch.autograd.grad(found, tuple(logs), allow_unused=True)
        for sum_, gradient in zip(total, gradients, strict=True):
            if gradient is not None:  # of a tree without edges
                sum_ += gradient
    root, transitions, emissions = (each.numpy() for each in total)
    return Tables(root, transitions, emissions.swapaxes(1, 2))


def maximised(before: Tables, counts: Tables, kappa: float, rate: float = 1.0) -> Tables:
    """Compute the parameters of expected counts.

    Args:
        before: The parameters before.
        counts: Expected counts.
        kappa: Pseudo-count of a row.
        rate: Weight γ of the new parameters.
    """
    after = []
    for old, table in zip(before, counts, strict=True):
        raw = table.clip(min=0.0) + kappa / table.shape[-1]
        new = raw / raw.sum(axis=-1, keepdims=True)
        after.append((1 - rate) * old + rate * new)
    return Tables(*after)
