"""Preconditioner: the approximated Fisher of all blocks, and its damped inverse.

It owns the blocks' states, λ, and who of several processes refreshes which block. A refresh folds
a batch into the running statistics, sets λ and makes the inverses; its result in n processes that
share a batch is that of one with the whole. λ is ``damping`` times the mean eigenvalue of F̂, so
that it means the same whatever the batch size and the reduction of the loss; a layer counts for at
most ``LARGEST`` times as much as those of the outputs.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smallfry.curvature import Block, Observation, Rows
from smallfry.curvature.kronecker import NotFiniteError
from smallfry.optim.approximation import Approximation, State
from smallfry.optim.block_rows import balanced, rows_of_batch
from smallfry.optim.checks import warn
from smallfry.optim.collective_update import CollectiveUpdate, share_states, versions_of
from smallfry.optim.collectives import Collectives
from smallfry.optim.distribution import owners_of
from smallfry.optim.numerics import statistics_dtype
from smallfry.optim.settings import CurvatureSettings

COUNTERS = (
    "steps",
    "statistics",  # refreshes
    "inverses",
    "skipped_steps",  # a gradient was not finite
    "failed_refreshes",  # statistics or inverses were not finite: the old ones stayed
    "missed_refreshes",  # no forward pass was seen when one was due
    "measurements",  # of a step's divergence
)
FLAGS = ("damping_factor", "damping", "seed", "last_called")  # beside tensors and counters
LARGEST = 1000.0  # trace of a layer over that of the output's, as it counts for λ


class Preconditioner:
    """Curvature of blocks, and products with its inverse.

    Args:
        blocks: Preconditioned blocks.
        approximation: Approximation of a block's Fisher.
        settings: Damping, averaging, and how many rows are taken.
        collectives: Messages between the processes that share a batch, and their device.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        approximation: Approximation,
        settings: CurvatureSettings,
        collectives: Collectives,
    ) -> None:
        self.approximation, self.settings, self.collectives = approximation, settings, collectives
        self.damping, self.seed, self.damping_factor = settings.damping, settings.seed, 1.0
        self.generator = torch.Generator(device=collectives.device)
        self.generator.manual_seed(settings.seed)
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.states: dict[str, State] = {}
        self.lambdas: dict[str, float] = {}
        self.last_called: list[str] = []  # blocks of the outputs, in all processes
        self.milliseconds: dict[str, float] = {}  # of each block's last refresh
        self.monitoring = False  # keep the rows of the last refresh
        self.latest: dict[str, list[Rows]] = {}
        self.cover(blocks, ())

    def cover(self, blocks: Sequence[Block], kept: Sequence[str]) -> None:
        """Change the preconditioned blocks; the states of remaining ones are kept."""
        self.approximation.check(blocks)
        self.blocks = {block.name: block for block in blocks}
        self._numbers = {name: number for number, name in enumerate(self.blocks)}
        self.states = {n: self.states[n] if n in kept else {} for n in self.blocks}
        self.lambdas = {n: value for n, value in self.lambdas.items() if self.states.get(n)}
        self.owners = owners_of(blocks, self.approximation, self.collectives.count)
        self.needs_identity = not all(map(self.approximation.sums_over_uses, blocks))

    def draw(self, *purpose: int) -> None:
        """Seed the generator for a purpose in this step.

        They don't depend on what was drawn before, so that processes can't fall out of step.
        """
        key = (self.seed, self.counters["steps"], *purpose)
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        self.generator.manual_seed(int(seed >> np.uint64(1)))

    # Refreshing

    def refresh(self, observations: Sequence[Observation], inverse: bool) -> None:
        """Update statistics, λ and inverses; called in all processes alike.

        Args:
            observations: Of the batch's micro-batches; none leaves the statistics as they are.
            inverse: Make all inverses anew, not only those of blocks that have none.
        """
        self.collectives.reset_bytes()
        before = versions_of(self.states)
        if self.monitoring and observations:
            self.latest = {}
        count = self.counters["statistics"] + 1
        share = min(1 - 1 / count, self.settings.ema_decay)
        kept = {name: share if state else 0.0 for name, state in self.states.items()}
        rows: dict[str, list[Rows]] = {}
        samples: dict[str, float] = {}
        failed: list[str] = []
        for names in self._portions() if observations else ():
            update = self._update(names, observations, rows, samples, kept)
            failed += update.failed
            for name, key in update.everywhere:  # all have these
                now = self.states[name].get(key)
                if now is not None:
                    before[name][key] = now, now._version
        self.last_called = last_called(observations) or self.last_called
        self._set_lambdas()
        uninverted = self._invert(inverse)
        failed, uninverted = share_states(
            self.states, before, self.owners, self.collectives, failed, uninverted
        )
        self._settle(rows, {n: count for n, count in samples.items() if n not in failed}, kept)
        self._set_lambdas()
        self.counters["failed_refreshes"] += len(failed) + len(uninverted)
        self.counters["statistics"] += bool(observations)
        self.counters["inverses"] += inverse

    def _portions(self) -> Iterator[list[str]]:
        """Group blocks whose rows are held at a time: one, or all to send few messages."""
        if self.collectives.count > 1:
            yield list(self.blocks)
        else:
            yield from ([name] for name in self.blocks)

    def _update(
        self,
        names: Sequence[str],
        observations: Sequence[Observation],
        rows: dict[str, list[Rows]],
        samples: dict[str, float],
        kept: Mapping[str, float],
    ) -> CollectiveUpdate:
        """Update the states of some blocks; ``rows`` and ``samples`` are filled in."""
        began = time.perf_counter()
        with self.collectives.publish_failure():
            mine = {name: self._rows(name, observations) for name in names}
        counts = [float(sum(part.samples for part in mine[name])) for name in names]
        masses = [float(sum(part.mass for part in mine[name])) for name in names]
        totals = self.collectives.sums(counts + masses)
        for name, count, mass in zip(
            names, totals[: len(names)], totals[len(names) :], strict=True
        ):
            mine[name] = balanced(mine[name], count, mass)
            if count:
                samples[name] = count
        update = CollectiveUpdate(
            self.blocks,
            self.approximation,
            self.states,
            self.owners,
            self.collectives,
            self.generator,
            self._reseed,
        )
        update.run(mine, {name: samples[name] for name in names if name in samples}, kept)
        if self.monitoring:
            self.latest |= {
                name: seen for name, seen in mine.items() if seen and name not in update.failed
            }
        if self.approximation.settles:
            rows |= mine
        for name in names:
            self.milliseconds[name] = 1e3 * (time.perf_counter() - began) / len(names)
        return update

    def _rows(self, name: str, observations: Sequence[Observation]) -> list[Rows]:
        """Collect the rows of a block.

        Each block has random numbers of its own: it does not matter which process refreshes it.
        """
        block, settings = self.blocks[name], self.settings
        self.draw(1, self._numbers[name])

        def some(seen: Observation, uses: int) -> Tensor | None:
            """Select uses, if there are more than needed."""
            count = seen.samples * self.collectives.count  # about, where shares are uneven
            enough = settings.max_rows is None or count * uses <= settings.max_rows
            if settings.max_rows is None or enough or not self.approximation.sums_over_uses(block):
                return None
            few, device = max(1, settings.max_rows // count), self.generator.device
            return torch.randperm(uses, generator=self.generator, device=device)[:few].sort().values

        rows = rows_of_batch(block, observations, self.approximation, settings.check, some)
        self._reseed(name)
        return rows

    def _reseed(self, name: str) -> None:
        """Seed the random numbers of a block's update, the same in all processes."""
        self.draw(2, self._numbers[name])

    def _invert(self, every: bool) -> list[str]:
        """Compute the inverses of this process's blocks; those that fail keep the last one."""
        failed = []
        for name, block in self.blocks.items():
            state, began = self.states[name], time.perf_counter()
            mine = self.owners[name] == self.collectives.rank
            if mine and state and (every or "inverted" not in state):
                try:
                    raised = self.approximation.invert(block, state, self.lambdas[name])
                    state["inverted"] = True
                    _warn_of_damping(block, raised)
                except NotFiniteError as error:
                    failed.append(name)
                    layer = next(iter(block.layers))
                    warn(f"layer '{layer}': {error}; the last inverse is kept")
            spent = 1e3 * (time.perf_counter() - began)
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent
        return failed

    def _settle(
        self,
        rows: dict[str, list[Rows]],
        samples: Mapping[str, float],
        kept: Mapping[str, float],
    ) -> None:
        """Update the quantities that depend on the new inverses."""
        found: dict[str, dict[str, Tensor]] = {}
        for name in samples if self.approximation.settles else ():
            block, state = self.blocks[name], self.states[name]
            moments = self.approximation.moments(block, state, rows.pop(name), samples[name])
            if moments is not None:
                found[name] = {"moments": moments}
        for name, sums in self.collectives.sums_for_all(found).items():
            self.approximation.settle(self.states[name], sums["moments"], kept[name])

    def _set_lambdas(self) -> None:
        """Set λ of each block from all traces, each held by its owner."""
        mine: dict[str, float] = {}
        for name, block in self.blocks.items():
            if self.states[name] and self.owners[name] == self.collectives.rank:
                mine[name] = self.approximation.trace(block, self.states[name])
        count, names = len(self.blocks), list(self.blocks)
        values = [mine.get(name, 0.0) for name in names] + [float(name in mine) for name in names]
        values = self.collectives.sums(values + [float(n in self.last_called) for n in names])
        traces = {n: v for n, v, there in zip(names, values, values[count:], strict=False) if there}
        self.last_called = [n for n, last in zip(names, values[2 * count :], strict=True) if last]
        relative = self.damping * self.damping_factor
        mean = self._mean_eigenvalue(traces)
        for name, trace in traces.items():
            per_layer = self.settings.damping_per == "layer"
            unit = trace / self.blocks[name].size if per_layer else mean
            # without any curvature a step is none: gradients are zero too
            self.lambdas[name] = max(relative * unit, 1e-30)

    def _mean_eigenvalue(self, traces: Mapping[str, float]) -> float:
        """Compute the mean eigenvalue of F̂, to which no layer contributes without limit.

        A normalisation of nearly constant features multiplies derivatives, and the Fisher of a
        layer before it, a million times and more. A λ relative to that would stop all others.
        """
        last = max((traces.get(name, 0.0) for name in self.last_called), default=0.0)
        bounded = self.approximation.needs_gradients and last > 0
        limit = LARGEST * last if bounded else math.inf
        size = sum(self.blocks[name].size for name in traces)
        return sum(min(trace, limit) for trace in traces.values()) / max(1, size)

    # Applying

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply (F̂ + λ I)⁻¹ by the matrices (groups, outputs, inputs) of blocks."""
        return {name: self.solve(name, matrix) for name, matrix in gradients.items()}

    def solve(self, name: str, matrix: Tensor) -> Tensor:
        """Multiply (F̂ + λ I)⁻¹ of one block by a matrix."""
        block, state = self.blocks[name], self.states[name]
        return self.approximation.apply(block, state, matrix, self.lambdas[name])

    def directions(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute preconditioned gradients, or momenta, by parameter name."""
        matrices, directions = {}, dict[str, Tensor]()
        for block in self.blocks.values():
            present = [name for name in block.parameters if name in grads]
            if present and "inverted" not in self.states[block.name]:
                # not called yet when statistics were due: F̂ = 0 until it is
                unit = max(self.lambdas.values(), default=1.0)
                directions |= {name: grads[name] / unit for name in present}
            elif present:
                zero = {n: torch.zeros_like(p) for n, p in block.parameters.items()}
                matrix = block.to_matrix({n: grads.get(n, zero[n]) for n in block.parameters})
                matrices[block.name] = matrix.to(statistics_dtype(matrix.dtype))
        for name, matrix in self.apply(matrices).items():
            for parameter, tensor in self.blocks[name].from_matrix(matrix).items():
                if parameter in grads:
                    directions[parameter] = tensor.to(grads[parameter].dtype)
        return directions

    def damping_of_parameters(self) -> dict[str, float]:
        """Return λ of each parameter's block, where known."""
        return {
            parameter: self.lambdas[block.name]
            for block in self.blocks.values()
            if block.name in self.lambdas
            for parameter in block.parameters
        }

    def divergence(
        self,
        directions: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        rates: Mapping[str, float],
    ) -> float:
        """Predict twice the divergence of a step from F̂, or more.

        Args:
            directions: Preconditioned gradients by parameter name.
            grads: What they were made of.
            rates: Learning rates.
        """
        terms = [rates[n] ** 2 * (v * grads[n]).sum() for n, v in directions.items()]
        return float(torch.stack(terms).sum().clamp_min(0)) if terms else 0.0

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain data; tensors are not copied."""
        return {
            "curvature": {name: dict(state) for name, state in self.states.items()},
            "lambdas": dict(self.lambdas),
            "counters": dict(self.counters),
            "generator": self.generator.get_state(),
            "flags": {name: getattr(self, name) for name in FLAGS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of the same blocks, copying its tensors."""
        for name, block in self.blocks.items():
            device = next(iter(block.parameters.values())).device
            self.states[name] = {k: copied(v, device) for k, v in state["curvature"][name].items()}
        self.lambdas = dict(state["lambdas"])
        self.counters |= state["counters"]
        self.generator.set_state(state["generator"].cpu())
        for name in FLAGS:
            setattr(self, name, state["flags"].get(name, getattr(self, name)))


def last_called(observations: Sequence[Observation]) -> list[str]:
    """Find the blocks called last in each forward pass, as many as it has outputs."""
    found: dict[str, None] = {}
    for seen in observations:
        order = dict.fromkeys(call.block.name for call in reversed(seen.calls))
        found |= dict.fromkeys(list(order)[: max(1, len(seen.outputs))])
    return list(found)


def copied(value: Any, device: torch.device) -> Any:
    """Copy a tensor, a list of them, or plain data."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list):
        return [copied(v, device) for v in value]
    return value


def _warn_of_damping(block: Block, raised: float) -> None:
    if raised > 1:
        warn(
            f"layer '{next(iter(block.layers))}': a matrix is nearly singular, its damping was "
            f"raised {raised:g} times to invert it; a larger damping= avoids that"
        )
