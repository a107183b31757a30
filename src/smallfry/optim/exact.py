"""Exact natural gradient: the batch's own Fisher, solved in sample space by Woodbury's identity.

(F + λ I)⁻¹ m with F = (1/N) Σ vec(W_n) vec(W_n)ᵀ needs only N × N matrices and the layers' inputs
and gradients. "full" couples all covered layers, "block" treats each by itself. Exact for every
kind of sharing. A step costs O(N² (d_a + d_g) + N d_a d_g) a layer and O(N³) once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.curvature import Block, Rows
from smallfry.curvature.fisher import Woodbury, damped_solve, gram, woodbury
from smallfry.errors import UsageError
from smallfry.optim.base import NaturalGradient, State, _warn


class ExactNG(NaturalGradient):
    """Natural gradient with the exact Fisher of the last batches.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        scope: "full" for the whole network's Fisher, "block" for its block diagonal.
        window: How many of the last refreshes' batches make the Fisher. Nothing is averaged:
            ``ema_decay`` has no effect.
        statistics_every: Steps between refreshes; the solve is refreshed with them.
        damping: λ over the mean eigenvalue. Higher than elsewhere: the Fisher of one batch has no
            more directions than samples, and along all others a step is gradient / λ.
        settings: Those of ``NaturalGradient``.
    """

    method = "exact natural gradient"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        scope: Literal["full", "block"] = "full",
        window: int = 1,
        statistics_every: int = 1,
        damping: float = 10.0,
        **settings: Any,
    ) -> None:
        if scope not in ("full", "block"):
            raise UsageError(f"scope is 'full' or 'block', not '{scope}'")
        if window < 1:
            raise UsageError(f"window is at least 1, not {window}")
        if settings.get("damping_per") == "layer" and scope == "full":
            raise UsageError("scope='full' has one damping for the network: damping_per='network'")
        if settings.get("inverse_every", statistics_every) not in (None, statistics_every):
            raise UsageError("ExactNG solves with each batch it takes: leave inverse_every out")
        self.scope, self.window = scope, window
        super().__init__(model, lr, statistics_every=statistics_every, damping=damping, **settings)

    def _refresh_all(self, rows: Mapping[str, Sequence[Rows]], inverse: bool) -> None:
        super()._refresh_all(rows, False)
        known = [b for b in self.blocks if self.curvature[b.name]]
        groups = [known] if self.scope == "full" else [[b] for b in known]
        for together in groups:
            states = [self.curvature[b.name] for b in together]
            matrix = sum(state["gram"] for state in states)
            samples = _rows(states[0]).samples
            asked = self.lambdas[together[0].name]
            factored = woodbury(torch.as_tensor(matrix), samples, asked)
            if factored.damping != asked:
                _warn(
                    f"layer '{next(iter(together[0].layers))}': the Gram matrix is nearly "
                    f"singular, its damping was raised {factored.damping / asked:g} times"
                )
                self.lambdas |= {b.name: factored.damping for b in together}
            states[0]["factor"] = factored.factor
        self.counters["inverses"] += 1

    def _update(self, block: Block, state: State, rows: Sequence[Rows], keep: float) -> None:
        # a smaller last batch counts by its samples; shorter sequences are padded by nothing
        batch = _joined(rows)
        counts = [*state.get("counts", []), batch.samples]
        if state:
            batch = _joined([_rows(state), batch])
        while len(counts) > self.window:
            gone = counts.pop(0)
            batch = Rows(batch.inputs[:, gone:], batch.gradients[:, :, gone:])
        state["counts"] = counts
        state["inputs"], state["gradients"] = batch.inputs.clone(), batch.gradients.clone()
        state["gram"] = gram(batch.double())

    def _invert(self, block: Block, state: State, damping: float) -> None:
        raise NotImplementedError("blocks are factored together, in _refresh_all")

    def _precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.scope == "block":
            return super()._precondition(gradients)
        first = next(b.name for b in self.blocks if self.curvature[b.name])
        rows = {name: _rows(self.curvature[name]).double() for name in gradients}
        return self._solve(rows, gradients, self.curvature[first]["factor"], self.lambdas[first])

    def _apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        rows = {block.name: _rows(state).double()}
        return self._solve(rows, {block.name: matrix}, state["factor"], damping)[block.name]

    def _solve(
        self,
        rows: Mapping[str, Rows],
        gradients: Mapping[str, Tensor],
        factor: Tensor,
        damping: float,
    ) -> dict[str, Tensor]:
        # x − J v cancels by ‖F‖/λ, more than float32 has
        wide = {name: matrix.double() for name, matrix in gradients.items()}
        solved = damped_solve(rows, wide, Woodbury(factor, damping))
        return {name: solved[name].to(gradients[name]) for name in gradients}

    def _trace(self, block: Block, state: State) -> float:
        return float(state["gram"].diagonal().sum() / _rows(state).samples)

    def _cost(self, block: Block) -> tuple[str, int, int]:
        words = f"exact, {self.scope}; memory and cost grow with the batch"
        return words, 0, 0

    def _diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        values = torch.linalg.eigvalsh(state["gram"]).clamp_min(0) / _rows(state).samples
        spread = (float(values.min()), float(values.max()))
        return {"samples": spread} | ({"fisher_error": 0.0} if rows else {})


def _rows(state: State) -> Rows:
    return Rows(state["inputs"], state["gradients"])


def _joined(parts: Sequence[Rows]) -> Rows:
    """Batches one after the other; uses that a batch has fewer of are zero rows."""
    uses = max(part.uses for part in parts)
    inputs = [F.pad(part.inputs, (0, 0, 0, uses - part.uses)) for part in parts]
    gradients = [F.pad(part.gradients, (0, 0, 0, uses - part.uses)) for part in parts]
    return Rows(torch.cat(inputs, dim=1), torch.cat(gradients, dim=2))
