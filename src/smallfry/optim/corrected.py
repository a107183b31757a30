"""KFAC-corrected: KFAC plus the nearest Kronecker product to its error (Koroko, 2201.10285).

    min ‖F − A ⊗ G − P ⊗ Q‖ with KFAC's A and G

P ⊗ Q is the leading canonical pair of the covariance between a aᵀ and g gᵀ: it vanishes exactly
where KFAC's independence holds. The sum is never farther from F than A ⊗ G, and never nearer than
the best sum of two (``Deflation``).
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Unpack

import torch
from torch import nn

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import input_factor, output_factor
from smallfry.curvature.kronecker_svd import kfac_correction
from smallfry.curvature.terms import Terms
from smallfry.optim.approximation import State
from smallfry.optim.base import NaturalGradient
from smallfry.optim.kpsvd import FEW_ROWS, Inverse, NearestSum, Sharing, as_used
from smallfry.optim.settings import Settings


class KFACCorrected(NaturalGradient):
    """Natural gradient with KFAC's product and a correction.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        sharing: See ``KPSVD``; "exact" corrects KFAC-expand to a sample's whole gradient.
        inverse: See ``KPSVD``.
        factor_rank: See ``KPSVD``.
        settings: Those of ``NaturalGradient``, with ``max_rows`` as in ``KPSVD``.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import KFACCorrected
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = KFACCorrected(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        sharing: Sharing | dict[str, Sharing] = "exact",
        inverse: Inverse = "clamped",
        factor_rank: int | None = 64,
        **settings: Unpack[Settings],
    ) -> None:
        product = CorrectedProduct(sharing, inverse, factor_rank)
        super().__init__(model, lr, product, **(FEW_ROWS | settings))


class CorrectedProduct(NearestSum):
    """A ⊗ G + P ⊗ Q; the arguments are those of ``KFACCorrected``."""

    def __init__(
        self,
        sharing: str | Mapping[str, str] = "exact",
        inverse: Literal["clamped", "pcg"] = "clamped",
        factor_rank: int | None = 64,
    ) -> None:
        super().__init__(2, sharing, "deflation", inverse, factor_rank)

    def update(
        self,
        block: Block,
        state: State,
        rows: Sequence[Rows],
        keep: float,
        generator: torch.Generator,
    ) -> None:
        """Fit the correction to the error of the averaged factors, then average them."""
        seen = as_used(rows, self.sharing_of(block))._replace(weights=None)
        a, g = input_factor(seen), output_factor(seen)
        if keep:
            both = self.terms(state)
            old_a, old_g = both.inputs[0], both.outputs[0]
            stored = both._replace(
                inputs=both.inputs[1:], outputs=both.outputs[1:], values=both.values[:, 1:]
            )
            found = kfac_correction(seen, a=old_a, g=old_g, stored=stored, keep=keep)
            a, g = old_a.lerp(a, 1 - keep), old_g.lerp(g, 1 - keep)
        else:
            found = kfac_correction(seen)
        first = (a.square().sum((1, 2)) * g.square().sum((1, 2))).sqrt().double()
        both = Terms(
            torch.stack([a, found.inputs[0]]),
            torch.stack([g, found.outputs[0]]),
            torch.cat([first[:, None], found.values], 1),
            found.squared_norm,
        )
        self.store(block, state, both, generator)

    @property
    def words(self) -> str:
        """Description of the sum."""
        return "A ⊗ G and a correction"
