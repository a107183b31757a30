"""Embeddings in every method: one-hot inputs make input factors diagonal.

    KFAC       diag(p) ⊗ G, with p the frequencies of rows
    EKFAC      a value for each row and each eigenvector of G: all of A's eigenvectors are one-hot
    KPSVD      diag(a) ⊗ S nearest to the blocks F_ii of single rows; so do sums of products
    SNGD       diag(p)

as in ``curvature/one_hot.py``. Methods without such a form get one-hot inputs as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smallfry.curvature import Block, Rows
from smallfry.curvature.diagonal import overlaps
from smallfry.curvature.kronecker import (
    damped_inverse,
    eigendecompose,
    kronecker_error,
    output_factor,
    pack,
    packed_mean,
    split_damping,
    unpack,
)
from smallfry.curvature.one_hot import (
    DiagonalProduct,
    RowSums,
    frequencies,
    joined_sums,
    nearest_product,
    row_sums,
    second_moments,
    spelled_out,
)
from smallfry.optim.approximation import (
    Approximation,
    State,
    Sum,
    Summed,
    Updating,
    eigenvalue_range,
    running,
    samples_of,
)

LARGEST = 1024  # one-hot inputs, of which the error of a block's Fisher is still told


class OneHotProduct(Approximation):
    """diag(p) ⊗ G.

    Args:
        sharing: "exact" or "expand"; p and G are the same.
        damping_split: As in ``KFAC``. "factored" takes every row for as frequent as at least √λ π,
            so that rows that were not seen yet have steps of a length that makes sense.
    """

    sharing_choices = ("exact", "expand")
    divides = True
    words = "frequencies ⊗ G"

    def __init__(self, sharing: str = "expand", damping_split: str = "factored") -> None:
        super().__init__(sharing)
        self.damping_split = damping_split

    def updating(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        samples: float,
        keep: float,
        generator: torch.Generator,
    ) -> Updating:
        """Update from sums over all processes."""
        p, g = _zero(block, block.shape[2]), _zero(block, block.shape[1], block.shape[1])
        for part in rows:
            share = part.samples / samples
            p = p + frequencies(part, block.shape[2]) * share
            g = g + output_factor(part) * share
        totals = yield Sum({"p": p, "g": pack(g)}, everywhere=True)
        for key in ("p", "g"):
            state[key] = running(state, key, totals[key], keep)

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Invert or decompose G."""
        g = unpack(state["g"])
        if self.damping_split == "tikhonov":
            eigen = eigendecompose(g)
            state |= {"qg": eigen.vectors, "lg": eigen.values}
            return 1.0
        dp, dg = split_damping(state["p"].mean(1), packed_mean(state["g"]), damping)
        inverse = damped_inverse(g, dg)
        state |= {"dp": dp, "ig": inverse.matrix}
        return inverse.raised

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Multiply by one inverse and divide each row's gradient, or multiply twice."""
        p: Tensor = state["p"][:, None]
        if self.damping_split == "tikhonov":
            vectors: Tensor = state["qg"]
            turned = vectors.transpose(1, 2) @ matrix
            values: Tensor = state["lg"][:, :, None] * p + damping
            return vectors @ (turned / values)
        inverse: Tensor = state["ig"]
        damped: Tensor = p + state["dp"][:, None, None]
        return inverse @ matrix / damped

    def trace(self, block: Block, state: State) -> float:
        """Compute Σ p · tr G."""
        mean = packed_mean(state["g"]).double()
        return float(state["p"].double().sum() * mean) * block.shape[1]

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the approximation: words, numbers kept, multiply-adds of an inversion."""
        _, outputs, inputs = block.shape
        kept = inputs + outputs * (outputs + 1) // 2 + outputs**2
        return f"{self.words}, {self.damping_split}", kept, outputs**3

    def summed(self, block: Block) -> Summed | None:
        """Describe p and G."""
        _, outputs, inputs = block.shape
        return Summed(0, 0, inputs + outputs * (outputs + 1) // 2, outputs**2)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute eigenvalue ranges, and the Fisher error unless there are many rows."""
        p = state["p"]
        found: dict[str, Any] = {
            "inputs": (float(p.min()), float(p.max())),
            "outputs": eigenvalue_range(unpack(state["g"])),
        }
        if rows and block.shape[2] <= LARGEST:
            a, g = self.factors(state)
            whole = spelled_out(rows[0], block.shape[2]).double()
            found["fisher_error"] = kronecker_error(whole, a.double(), g.double())
        return found

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """Return diag(p) and G."""
        return torch.diag_embed(state["p"]), unpack(state["g"])


class OneHotNearest(OneHotProduct):
    """diag(a) ⊗ S; the arguments are those of ``OneHotProduct``."""

    divides = False
    words = "nearest diagonal ⊗ S"

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Find the nearest product to the old one and the batch together."""
        old = DiagonalProduct(state["p"], unpack(state["g"])) if "p" in state else None
        sums, samples = _sums(block, rows, self.sharing == "exact"), samples_of(rows)
        found = nearest_product(sums, block.shape[2], samples, old, keep if old else 0.0)
        state |= {"p": found.inputs, "g": pack(found.outputs)}

    def summed(self, block: Block) -> Summed | None:
        """Return None: the nearest product is not a function of sums."""
        return None


class OneHotDiagonal(OneHotProduct):
    """Diagonal with one value per row and eigenvector of G.

    Args:
        product: Of whose G they are.
        sharing: "exact" adds up what one sample brings to a row, "expand" does not.
    """

    settles = True

    def __init__(self, product: OneHotProduct, sharing: str = "exact") -> None:
        super().__init__(sharing)
        self.product, self.divides = product, product.divides

    def updating(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        samples: float,
        keep: float,
        generator: torch.Generator,
    ) -> Updating:
        """Update the product."""
        return self.product.updating(block, state, rows, samples, keep, generator)

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Decompose G, and project the values onto its new vectors."""
        vectors = eigendecompose(unpack(state["g"])).vectors
        if "s" in state:
            state["s"] = overlaps(vectors, state["qg"]) @ state["s"]
        state["qg"] = vectors
        return 1.0

    def moments(
        self, block: Block, state: State, rows: Sequence[Rows], samples: float
    ) -> Tensor | None:
        """Compute the batch's second moments."""
        if "qg" not in state:
            return None
        if not rows:
            return _zero(block, *block.shape[1:])
        sums = _sums(block, rows, self.sharing == "exact")
        return second_moments(sums, state["qg"], block.shape[2], samples)

    def settle(self, state: State, moments: Tensor, keep: float) -> None:
        """Average in the second moments."""
        state["s"] = running(state, "s", moments, keep)

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Project onto the basis, divide, and project back."""
        vectors: Tensor = state["qg"]
        values: Tensor = state["s"] + damping
        return vectors @ (vectors.transpose(1, 2) @ matrix / values)

    def trace(self, block: Block, state: State) -> float:
        """Compute Σ s."""
        return float(state["s"].double().sum()) if "s" in state else super().trace(block, state)

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the approximation: words, numbers kept, multiply-adds of an inversion."""
        _, outputs, inputs = block.shape
        kept = inputs + outputs * (outputs + 1) // 2 + outputs**2 + outputs * inputs
        words = f"diagonal in one-hot inputs and the basis of G, {self.sharing}"
        return words, kept, 9 * outputs**3

    def summed(self, block: Block) -> Summed | None:
        """Describe the product's sums, and the values."""
        found = self.product.summed(block)
        size = block.shape[1] * block.shape[2]
        return found and found._replace(everywhere=found.everywhere + size)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute eigenvalue ranges."""
        return super().diagnose(block, state, [])


class OneHotInputs(OneHotProduct):
    """Diagonal diag(p), independent of the outputs."""

    words = "frequencies"

    def updating(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        samples: float,
        keep: float,
        generator: torch.Generator,
    ) -> Updating:
        """Update the frequencies."""
        p = _zero(block, block.shape[2])
        for part in rows:
            p = p + frequencies(part, block.shape[2]) * part.samples / samples
        totals = yield Sum({"p": p}, everywhere=True)
        state["p"] = running(state, "p", totals["p"], keep)

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Do nothing."""
        return 1.0

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Divide each row's gradient."""
        p: Tensor = state["p"][:, None]
        return matrix / (p + damping)

    def trace(self, block: Block, state: State) -> float:
        """Compute the trace over all outputs."""
        return float(state["p"].double().sum()) * block.shape[1]

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Describe the approximation: words, numbers kept, no inversion."""
        return self.words, block.shape[2], 0

    def summed(self, block: Block) -> Summed | None:
        """Describe p."""
        return Summed(0, 0, block.shape[2], 1)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Compute the range of frequencies."""
        return {"inputs": (float(state["p"].min()), float(state["p"].max()))}


class WithEmbeddings(Approximation):
    """Method for a model with embeddings, which picks the form for each block's inputs.

    Args:
        method: Of all other blocks; it has a form for ``one_hot`` inputs.
    """

    def __init__(self, method: Approximation) -> None:
        super().__init__(method.sharing)
        found = method.for_one_hot()
        assert found is not None
        self.method, self.one_hot = method, found
        self.sharing_choices, self.settles = method.sharing_choices, method.settles
        self.needs_gradients, self.divides = method.needs_gradients, method.divides
        self.counts_absence = method.counts_absence

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.method.name

    def of(self, block: Block) -> Approximation:
        """Return the approximation of a block."""
        return self.one_hot if block.one_hot else self.method

    def takes_numbers(self, block: Block) -> bool:
        """Return the choice of the block's approximation."""
        return block.one_hot

    def check(self, blocks: Sequence[Block]) -> None:
        """Validate the settings against the blocks."""
        self.method.check(blocks)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the method."""
        return self.method.settings()

    def sharing_of(self, block: Block) -> str:
        """Return the sharing mode of a block's uses."""
        return self.of(block).sharing_of(block)

    def sums_over_uses(self, block: Block) -> bool:
        """Return whether rows need not belong to samples."""
        return self.of(block).sums_over_uses(block)

    def update(self, block: Block, *arguments: Any) -> None:
        """Delegate to the block's approximation, as the other methods do."""
        self.of(block).update(block, *arguments)

    def updating(self, block: Block, *arguments: Any) -> Updating:
        """Delegate to the block's approximation."""
        return self.of(block).updating(block, *arguments)

    def invert(self, block: Block, state: State, damping: float) -> float:
        """Delegate to the block's approximation."""
        return self.of(block).invert(block, state, damping)

    def moments(self, block: Block, *arguments: Any) -> Tensor | None:
        """Delegate to the block's approximation."""
        return self.of(block).moments(block, *arguments)

    def settle(self, state: State, moments: Tensor, keep: float) -> None:
        """Delegate to the method, the same for all blocks."""
        self.method.settle(state, moments, keep)

    def apply(self, block: Block, state: State, matrix: Tensor, damping: float) -> Tensor:
        """Delegate to the block's approximation."""
        return self.of(block).apply(block, state, matrix, damping)

    def trace(self, block: Block, state: State) -> float:
        """Delegate to the block's approximation."""
        return self.of(block).trace(block, state)

    def cost(self, block: Block, state: State) -> tuple[str, int, int]:
        """Delegate to the block's approximation."""
        return self.of(block).cost(block, state)

    def summed(self, block: Block) -> Summed | None:
        """Delegate to the block's approximation."""
        return self.of(block).summed(block)

    def burden(self, block: Block) -> int:
        """Delegate to the block's approximation."""
        return self.of(block).burden(block)

    def diagnose(self, block: Block, state: State, rows: Sequence[Rows]) -> dict[str, Any]:
        """Delegate to the block's approximation."""
        return self.of(block).diagnose(block, state, rows)

    def factors(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the leading A and G."""
        return (self.one_hot if "p" in state else self.method).factors(state)


def sharing_of_rows(sharing: str | Mapping[str, str]) -> str:
    """Map the layers' sharing mode to rows, for which a mean is meaningless."""
    ways = {sharing} if isinstance(sharing, str) else set(sharing.values())
    return "exact" if "exact" in ways or not isinstance(sharing, str) else "expand"


def with_embeddings(method: Approximation, blocks: Sequence[Block]) -> Approximation:
    """Wrap a method so that it accepts all blocks of a model."""
    there = any(block.one_hot for block in blocks)
    if not there or isinstance(method, WithEmbeddings) or method.for_one_hot() is None:
        return method
    return WithEmbeddings(method)


def _sums(block: Block, rows: Sequence[Rows], whole: bool) -> RowSums:
    return joined_sums([row_sums(part, block.shape[2], whole) for part in rows])


def _zero(block: Block, *shape: int) -> Tensor:
    like = next(iter(block.parameters.values()))
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return like.new_zeros(1, *shape, dtype=dtype)
