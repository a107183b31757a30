"""Optimizer that owns a preconditioner, with views of it."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from smallfry.curvature import Block, Likelihood, Observation
from smallfry.curvature.observer import Observer
from smallfry.errors import UsageError
from smallfry.optim import quadratic
from smallfry.optim.approximation import Approximation, State
from smallfry.optim.collectives import Collectives
from smallfry.optim.distribution import Cost, cost_of
from smallfry.optim.inspect import Distribution, distribution
from smallfry.optim.preconditioner import Preconditioner
from smallfry.optim.weighing import weigh_rows


class PreconditionedOptimizer(torch.optim.Optimizer):
    """Optimizer with a preconditioner, bound to one model and not copyable.

    Steps are bounded in ``optim/bound.py``, saved in ``optim/state.py``, and layers unfrozen in
    ``optim/unfreezing.py``.
    """

    preconditioner: Preconditioner
    observer: Observer
    likelihood: Likelihood
    loss_scale: float | str
    grad_scaler: Any

    model: Callable[[], nn.Module | None]
    names: dict[nn.Parameter, str]  # of all trained parameters
    frozen: dict[str, nn.Parameter]
    exclude: tuple[str, ...]
    uncovered: dict[str, str]  # reasons, by parameter
    tied: bool  # all uses of a weight are one block
    adamw: torch.optim.AdamW | None  # of what is not covered
    fallback_lr: float

    # what the next step depends on, beside the preconditioner and the moments
    overdue: bool  # statistics were due, and failed
    overdue_inverse: bool
    checked: bool  # the first batch was
    clip: float  # of the last step
    kl_clip: float | None
    targets: float  # of a sample
    divergence_ratio: float  # measured over modelled, averaged
    measuring: bool  # the next step is measured
    measurable: bool  # the model can run again on the same batch
    measured: bool  # this step was
    measured_size: float  # ⟨v, m⟩ of the last measured step
    last_step: Any  # that the next batch measures, or None: ``optim/hindsight.py``
    fallback_ratio: float  # 2 KL over lr² of the AdamW inside, averaged
    _factor: float  # training loss over mean negative log-likelihood

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UsageError(
            "a natural-gradient optimizer is bound to its model and can't be copied or "
            "pickled: build a new one for the new model, and load_state_dict()"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__({})

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Covered blocks."""
        return tuple(self.preconditioner.blocks.values())

    @property
    def approximation(self) -> Approximation:
        """Approximation of a block's Fisher."""
        return self.preconditioner.approximation

    @property
    def curvature(self) -> dict[str, State]:
        """State of each block."""
        return self.preconditioner.states

    @property
    def lambdas(self) -> dict[str, float]:
        """λ of each block."""
        return self.preconditioner.lambdas

    @property
    def counters(self) -> dict[str, int]:
        """Counts of steps, refreshes, measurements and failures."""
        return self.preconditioner.counters

    @property
    def collectives(self) -> Collectives:
        """Communication between the processes that share a batch."""
        return self.preconditioner.collectives

    @property
    def owners(self) -> dict[str, int]:
        """Process that refreshes each block."""
        return self.preconditioner.owners

    @property
    def generator(self) -> torch.Generator:
        """Generator of sampled targets, uses and directions."""
        return self.preconditioner.generator

    @property
    def damping_factor(self) -> float:
        """Factor of adaptive damping on ``damping``."""
        return self.preconditioner.damping_factor

    @damping_factor.setter
    def damping_factor(self, factor: float) -> None:
        self.preconditioner.damping_factor = factor

    @property
    def damping(self) -> float:
        """λ over the mean eigenvalue of F̂."""
        return self.preconditioner.damping

    @damping.setter
    def damping(self, damping: float) -> None:
        self.preconditioner.damping = damping

    def distribution(self) -> Distribution:
        """Describe the owner of each layer, and the messages of the last refresh."""
        return distribution(self.preconditioner)

    def costs(self, rows: int) -> dict[str, Cost]:
        """Compute the cost of a refresh of each block, for ``rows`` uses by the whole batch."""
        return {b.name: cost_of(b, self.approximation, rows) for b in self.blocks}

    def monitor(self, on: bool = True) -> None:
        """Keep the rows of the last refresh, so that diagnostics can compute the Fisher error."""
        self.preconditioner.monitoring, self.preconditioner.latest = on, {}

    # The loss

    def _loss_factor(self, observations: Sequence[Observation]) -> float:
        if not isinstance(self.loss_scale, str):
            return float(self.loss_scale)
        if self.loss_scale == "sum":
            samples = self.batch_size(observations)
            self._factor = samples / self.collectives.count if samples else self._factor
        elif observations:
            self._factor = self.likelihood.mean_factor(observations[0].outputs)
        return self._factor

    def batch_size(self, observations: Sequence[Observation]) -> float:
        """Count the samples in the batch of all processes."""
        return self.collectives.sums([sum(seen.size for seen in observations)])[0]

    def weighed(self, observations: Sequence[Observation]) -> quadratic.Batch:
        """Return the current batch in a re-runnable form; called in all processes alike."""
        factor, rescaled = self._loss_factor(observations), self.observer.rescaled
        weigh_rows(observations, factor, self.loss_scale, rescaled, self.collectives)
        parameters = {name: p for p, name in self.names.items()}
        size = self.batch_size(observations)
        return quadratic.Batch(
            observations, self.observer, parameters, size, factor, self.collectives
        )

    def count_targets(self, batch: quadratic.Batch) -> None:
        """Set ``targets`` to those of a batch; a batch of padding, moved by momentum, has none."""
        hidden = self.observer.rescaled and self.grad_scaler is None
        self.targets = quadratic.targets_of(batch, hidden) or self.targets
