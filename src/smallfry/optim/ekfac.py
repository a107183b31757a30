"""EKFAC: the exact diagonal of the Fisher in KFAC's eigenbasis (George et al. 2018, 1806.03884).

F ≈ (Q_A ⊗ Q_G) diag(s) (Q_A ⊗ Q_G)ᵀ with Q_A, Q_G from A and G and s the second moments of the
samples' gradients there: never farther from F than A ⊗ G, whatever its scale. With sharing
"exact" s is that of a sample's whole gradient, summed over uses, so that a recursive layer's
curvature has its true size. The basis is made anew with the inverse, s with the statistics.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import (
    basis_second_moments,
    diagonal_error,
    eigendecompose,
    packed_trace,
    reduced,
    rotate_second_moments,
    solve_diagonal,
    unpack,
)
from smallfry.optim.base import NaturalGradient, State
from smallfry.optim.kfac import (
    check_sharing,
    eigenvalue_range,
    fold_factors,
    sharing_of,
)

Sharing = Literal["exact", "expand", "reduce"]


class EKFAC(NaturalGradient):
    """Natural gradient with a diagonal in KFAC's eigenbasis.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        sharing: Of a weight's uses in s: "exact" sums each sample's gradient first, "expand"
            treats uses as samples, "reduce" averages inputs; for all layers or by layer name.
            The basis is that of "reduce" there, and of "expand" otherwise.
        settings: Those of ``NaturalGradient``.
    """

    method = "EKFAC"
    sharing_choices = ("exact", "expand", "reduce")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        sharing: Sharing | dict[str, Sharing] = "exact",
        **settings: Any,
    ) -> None:
        self.sharing = sharing
        super().__init__(model, lr, **settings)
        check_sharing(sharing, self.blocks, self.sharing_choices)

    def _flavour(self, block: Block) -> str:
        return sharing_of(self.sharing, block)

    def _may_draw(self) -> bool:
        return self.sharing == "expand"

    def _update(self, block: Block, state: State, rows: Sequence[Rows], keep: float) -> None:
        fold_factors(state, rows, keep, self._flavour(block) == "reduce")

    def _invert(self, block: Block, state: State, damping: float) -> None:
        qa = eigendecompose(unpack(state["a"])).vectors
        qg = eigendecompose(unpack(state["g"])).vectors
        if "s" in state:
            ua, ug = qa.transpose(1, 2) @ state["qa"], qg.transpose(1, 2) @ state["qg"]
            state["s"] = rotate_second_moments(state["s"], ua, ug)
        state["qa"], state["qg"] = qa, qg

    def _settle(self, block: Block, state: State, rows: Sequence[Rows], keep: float) -> None:
        if "qa" not in state:
            return
        samples = sum(part.samples for part in rows)
        fresh: Any = 0
        for part in rows:
            seen = _as_samples(part, self._flavour(block))
            moments = basis_second_moments(seen, state["qa"], state["qg"])
            fresh = fresh + moments * (seen.samples / part.samples) * (part.samples / samples)
        state["s"] = fresh if "s" not in state else state["s"].lerp_(fresh, 1 - keep)

    def _apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        return solve_diagonal(state["qa"], state["qg"], state["s"], matrix, damping)

    def _trace(self, block: Block, state: State) -> float:
        if "s" in state:
            return float(state["s"].double().sum())
        return float((packed_trace(state["a"]) * packed_trace(state["g"])).sum())

    def _cost(self, block: Block) -> tuple[str, int, int]:
        groups, outputs, inputs = block.shape
        squares = inputs**2 + outputs**2
        packed = (inputs * (inputs + 1) + outputs * (outputs + 1)) // 2
        work = 9 * (inputs**3 + outputs**3)
        words = f"diagonal in the basis of A ⊗ G, {self._flavour(block)}"
        return words, groups * (packed + squares + outputs * inputs), groups * work

    def _diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        a, g = unpack(state["a"]), unpack(state["g"])
        found: dict[str, Any] = {"inputs": eigenvalue_range(a), "outputs": eigenvalue_range(g)}
        if rows:
            basis = [state[key].double() for key in ("qa", "qg", "s")]
            found["fisher_error"] = diagonal_error(rows[0].double(), *basis)
        return found


def _as_samples(rows: Rows, flavour: str) -> Rows:
    """Rows whose samples are what ``flavour`` takes for one gradient."""
    if rows.uses == 1 or flavour == "exact":
        return rows
    if flavour == "reduce":
        return reduced(rows)
    g = rows.gradients.flatten(2, 3).unsqueeze(3)
    return Rows(rows.inputs.flatten(1, 2).unsqueeze(2), g)
