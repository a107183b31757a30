"""KFAC: a block's Fisher as one Kronecker product (Martens and Grosse 2015, arXiv 1503.05671).

F ≈ A ⊗ G with A = E[a aᵀ] and G = E[g gᵀ], as if inputs and gradients were independent. Where a
weight is used T times by a sample (Eschenhagen et al. 2023, arXiv 2311.00636),

    expand   A averages over samples and uses, G sums over uses: exact if uses don't interact
    reduce   a is averaged and g summed over uses first: exact where uses are averaged behind

Exact for deep linear networks under a Gaussian likelihood, and for a single sample.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import (
    Eigen,
    damped_inverse,
    eigendecompose,
    input_factor,
    kronecker_error,
    output_factor,
    pack,
    packed_trace,
    reduced,
    solve_tikhonov,
    split_damping,
    unpack,
)
from smallfry.errors import UsageError
from smallfry.optim.base import NaturalGradient, State, _warn

Sharing = Literal["expand", "reduce"]


class KFAC(NaturalGradient):
    """Natural gradient with Kronecker-factored blocks.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        damping_split: "factored" damps A and G apart (Cholesky, two products a step); "tikhonov"
            damps their product exactly, in its eigenbasis (four products, and costlier refreshes).
        sharing: "expand" or "reduce", for all layers or by layer name.
        settings: Those of ``NaturalGradient``.
    """

    method = "KFAC"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        damping_split: Literal["factored", "tikhonov"] = "factored",
        sharing: Sharing | dict[str, Sharing] = "expand",
        **settings: Any,
    ) -> None:
        if damping_split not in ("factored", "tikhonov"):
            raise UsageError(f"damping_split is 'factored' or 'tikhonov', not '{damping_split}'")
        self.damping_split, self.sharing = damping_split, sharing
        super().__init__(model, lr, **settings)
        check_sharing(sharing, self.blocks, self.sharing_choices)

    def _flavour(self, block: Block) -> str:
        return sharing_of(self.sharing, block)

    def _may_draw(self) -> bool:
        return self.sharing == "expand"

    def _update(self, block: Block, state: State, rows: Sequence[Rows], keep: float) -> None:
        fold_factors(state, rows, keep, self._flavour(block) == "reduce")

    def _invert(self, block: Block, state: State, damping: float) -> None:
        a, g = unpack(state["a"]), unpack(state["g"])
        if self.damping_split == "tikhonov":
            ea, eg = eigendecompose(a), eigendecompose(g)
            state |= {"qa": ea.vectors, "la": ea.values, "qg": eg.vectors, "lg": eg.values}
            return
        da, dg = split_damping(a, g, damping)
        ia, ig = damped_inverse(a, da), damped_inverse(g, dg)
        raised = max(ia.raised, ig.raised)
        if raised > 1:
            _warn(
                f"layer '{next(iter(block.layers))}': a factor is nearly singular, its damping was "
                f"raised {raised:g} times to invert it; a larger damping= avoids that"
            )
        # stored packed where the factors would otherwise outweigh the weights they belong to
        compact = packs_inverse(block.shape)
        state["ia"] = pack(ia.matrix) if compact else ia.matrix
        state["ig"] = pack(ig.matrix) if compact else ig.matrix

    def _apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        if self.damping_split == "tikhonov":
            a, g = Eigen(state["la"], state["qa"]), Eigen(state["lg"], state["qg"])
            return solve_tikhonov(a, g, matrix, damping)
        if packs_inverse(block.shape):
            return unpack(state["ig"]) @ matrix @ unpack(state["ia"])
        product: Tensor = state["ig"] @ matrix @ state["ia"]
        return product

    def _trace(self, block: Block, state: State) -> float:
        return float((packed_trace(state["a"]) * packed_trace(state["g"])).sum())

    def _cost(self, block: Block) -> tuple[str, int, int]:
        groups, outputs, inputs = block.shape
        squares = inputs**2 + outputs**2
        packed = (inputs * (inputs + 1) + outputs * (outputs + 1)) // 2
        kept = packed if packs_inverse(block.shape) else squares
        work = inputs**3 + outputs**3
        if self.damping_split == "tikhonov":
            kept, work = squares + inputs + outputs, 9 * work
        words = f"A ⊗ G, {self._flavour(block)}, {self.damping_split}"
        return words, groups * (packed + kept), groups * work

    def _diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        a, g = unpack(state["a"]), unpack(state["g"])
        found: dict[str, Any] = {"inputs": eigenvalue_range(a), "outputs": eigenvalue_range(g)}
        if rows:
            found["fisher_error"] = kronecker_error(rows[0].double(), a.double(), g.double())
        return found


def fold_factors(state: State, rows: Sequence[Rows], keep: float, reduce: bool) -> None:
    """Average a batch's A and G into ``state["a"]`` and ``state["g"]``, packed."""
    samples = sum(part.samples for part in rows)
    a: Any = 0
    g: Any = 0
    for part in rows:
        seen = reduced(part) if reduce and part.uses > 1 else part
        share = part.samples / samples
        a, g = a + input_factor(seen) * share, g + output_factor(seen) * share
    for key, fresh in {"a": pack(a), "g": pack(g)}.items():
        state[key] = fresh if key not in state else state[key].lerp_(fresh, 1 - keep)


def sharing_of(sharing: Any, block: Block) -> str:
    """How a block's uses are put together."""
    if isinstance(sharing, str):
        return sharing
    return next((sharing[name] for name in block.layers if name in sharing), "expand")


def check_sharing(sharing: Any, blocks: Sequence[Block], choices: Sequence[str]) -> None:
    """Make sure that ``sharing`` names existing layers and known ways."""
    asked = {"": sharing} if isinstance(sharing, str) else dict(sharing)
    layers = {name for block in blocks for name in block.layers}
    for name, way in asked.items():
        if way not in choices:
            raise UsageError(f"sharing is {' or '.join(choices)} for this method, not '{way}'")
        if name and name not in layers:
            raise UsageError(f"sharing names layer '{name}', which is not covered")


def packs_inverse(shape: tuple[int, int, int]) -> bool:
    """Whether full inverses beside packed factors would pass four times the weights."""
    _, outputs, inputs = shape
    return 1.5 * (outputs**2 + inputs**2) > 4 * outputs * inputs


def eigenvalue_range(matrix: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue."""
    values = eigendecompose(matrix).values
    return float(values.min()), float(values.max())
