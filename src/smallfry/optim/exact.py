"""Exact natural gradient: the batch's own Fisher, solved in sample space (Woodbury).

(F + λ I)⁻¹ m with F = (1/N) Σ vec(W_n) vec(W_n)ᵀ needs only N × N matrices and the layers' inputs
and gradients. "full" couples all covered layers, "block" treats each by itself. Exact for every
kind of sharing. A step costs O(N² (d_a + d_g) + N d_a d_g) a layer and O(N³) once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.curvature import Block, Observation, Rows
from smallfry.curvature.fisher import Woodbury, damped_solve, gram, woodbury
from smallfry.errors import UsageError
from smallfry.optim.approximation import Approximation, State
from smallfry.optim.base import NaturalGradient
from smallfry.optim.checks import warn
from smallfry.optim.collectives import Collectives
from smallfry.optim.preconditioner import Preconditioner
from smallfry.optim.settings import Settings, require_count


class ExactNG(NaturalGradient):
    """Natural gradient with the exact Fisher of the last batches.

    Warning:
        A batch has no more directions than samples, and along all others a step is gradient over λ:
        with batches of a few samples, or of few beside the classes, this can be slower than AdamW.
        Its steps don't diverge more than promised all the same. Take 64 samples or more, or
        a larger ``window``. Momentum goes on along directions of earlier batches, of which this
        batch's Fisher holds nothing: at 0.9 the loss of an auto-encoder rose above its start.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        scope: "full" for the whole network's Fisher, "block" for its block diagonal.
        window: Number of last refreshes whose batches form the Fisher. Nothing is averaged:
            ``ema_decay`` has no effect.
        settings: Those of ``NaturalGradient``. Statistics are taken on every step, and the solve
            with them. The default damping, 10, is higher than elsewhere: the Fisher of one batch
            has no more directions than samples, and along all others a step is gradient / λ. The
            default momentum is 0.5.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import ExactNG
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = ExactNG(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    shares_batches = False  # its samples would have to be in every process

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        scope: Literal["full", "block"] = "full",
        window: int = 1,
        **settings: Unpack[Settings],
    ) -> None:
        chosen = Settings(statistics_every=1, damping=10.0, momentum=0.5) | settings
        if chosen.get("damping_per") == "layer" and scope == "full":
            raise UsageError("scope='full' has one damping for the network: damping_per='network'")
        if chosen.get("inverse_every") not in (None, chosen["statistics_every"]):
            raise UsageError("ExactNG solves with each batch it takes: leave inverse_every out")
        super().__init__(model, lr, LastSamples(scope, window), **chosen)
        self.scope = scope

    def _build_preconditioner(
        self, blocks: Sequence[Block], approximation: Approximation, collectives: Collectives
    ) -> Preconditioner:
        return SamplePreconditioner(blocks, approximation, self.settings, collectives)


class SamplePreconditioner(Preconditioner):
    """Preconditioner that factors the Gram matrix of the samples, of one block or of all."""

    def refresh(self, observations: Sequence[Observation], inverse: bool) -> None:
        """Take the batch's samples, and factor N λ I + JᵀJ."""
        super().refresh(observations, inverse)
        known = [name for name in self.blocks if self.states[name]]
        for names in [known] if self._coupled else [[name] for name in known]:
            matrix = sum(self.states[name]["gram"] for name in names)
            asked, first = self.lambdas[names[0]], self.states[names[0]]
            factored = woodbury(torch.as_tensor(matrix), rows_in(first).samples, asked)
            if factored.damping != asked:
                layer = next(iter(self.blocks[names[0]].layers))
                warn(
                    f"layer '{layer}': the Gram matrix is nearly singular, its damping was raised "
                    f"{factored.damping / asked:g} times"
                )
                self.lambdas |= dict.fromkeys(names, factored.damping)
            first["factor"] = factored.factor

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply (F̂ + λ I)⁻¹ by the matrices of blocks."""
        if not self._coupled or not gradients:
            return super().apply(gradients)
        first = next(name for name in self.blocks if self.states[name])
        rows = {name: rows_in(self.states[name]).double() for name in gradients}
        return _solve(rows, gradients, self.states[first]["factor"], self.lambdas[first])

    @property
    def _coupled(self) -> bool:
        return isinstance(self.approximation, LastSamples) and self.approximation.scope == "full"


class LastSamples(Approximation):
    """Samples of the last batches; the arguments are those of ``ExactNG``."""

    sharing_choices = ("exact",)
    counts_absence = True  # blocks are coupled sample by sample

    def __init__(self, scope: str, window: int) -> None:
        super().__init__("exact")
        if scope not in ("full", "block"):
            raise UsageError(f"scope is 'full' or 'block', not '{scope}'")
        require_count("window", window)
        self.scope, self.window = scope, window

    def settings(self) -> dict[str, Any]:
        """Return the settings of a saved state, as plain data."""
        return {"scope": self.scope, "window": self.window}

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Append the batch, and drop those beyond the window."""
        # a smaller last batch counts by its samples; shorter sequences are padded by nothing
        batch = _joined(rows)
        counts = [*state.get("counts", []), batch.samples]
        if state:
            batch = _joined([rows_in(state), batch])
        while len(counts) > self.window:
            gone = counts.pop(0)
            batch = Rows(batch.inputs[:, gone:], batch.gradients[:, :, gone:])
        state["counts"] = counts
        state["inputs"], state["gradients"] = batch.inputs.clone(), batch.gradients.clone()
        state["gram"] = gram(batch.double())

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Do nothing: blocks are factored together."""
        return 1.0

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Apply Woodbury's identity to the block alone."""
        rows = {block.name: rows_in(state).double()}
        return _solve(rows, {block.name: matrix}, state["factor"], damping)[block.name]

    def trace(self, block: Block, state: State) -> float:
        """Compute the mean squared norm of the samples' gradients."""
        return float(state["gram"].diagonal().sum() / rows_in(state).samples)

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the cost, as measured on the last batches."""
        words = f"exact, {self.scope}; memory and cost grow with the batch"
        return words, 0, len(state["gram"]) ** 3 // 3 if "gram" in state else 0

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute the eigenvalue range of the Gram matrix over samples."""
        values = torch.linalg.eigvalsh(state["gram"]).clamp_min(0) / rows_in(state).samples
        spread = (float(values.min()), float(values.max()))
        return {"samples": spread} | ({"fisher_error": 0.0} if rows else {})


def rows_in(state: State) -> Rows:
    """Return the stored samples."""
    return Rows(state["inputs"], state["gradients"])


def _solve(
    rows: Mapping[str, Rows], gradients: Mapping[str, Tensor], factor: Tensor, damping: float
) -> dict[str, Tensor]:
    # x − J v cancels by ‖F‖/λ, more than float32 has
    precise = {name: matrix.double() for name, matrix in gradients.items()}
    solved = damped_solve(rows, precise, Woodbury(factor, damping))
    return {name: solved[name].to(gradients[name]) for name in gradients}


def _joined(parts: Sequence[Rows]) -> Rows:
    """Concatenate batches, padding missing uses with zero rows."""
    uses = max(part.uses for part in parts)
    inputs = [F.pad(part.inputs, (0, 0, 0, uses - part.uses)) for part in parts]
    gradients = [F.pad(part.gradients, (0, 0, 0, uses - part.uses)) for part in parts]
    return Rows(torch.cat(inputs, dim=1), torch.cat(gradients, dim=2))
