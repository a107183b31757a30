"""SNIP: weights removed before training, by their effect on the loss of the first batch.

The saliency of a weight is |w ∂L/∂w|, and the largest of all layers stay (Lee et al., arXiv
1810.02340).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from smallfry.compress.sparse.masks import MaskedMethod, largest, require_share
from smallfry.errors import UsageError
from smallfry.training.method import Method, register_method


@register_method
@dataclass(frozen=True)
class SNIP:
    """Unstructured pruning before training (SNIP).

    The first batch should have ten images of each class or more.

    Args:
        sparsity: Share of the chosen layers' weights that are zero, in [0, 1).
        one_a_row: Keep a weight of every row, since a row of zeros is a dead unit.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep dense.
        ends: Prune the first layer and the classifier too.

    Example:
        >>> from smallfry import compress
        >>> compress.SNIP(sparsity=0.95).one_a_row
        True
    """

    name: ClassVar[str] = "snip"
    trains: ClassVar[bool] = True

    sparsity: float = 0.9
    one_a_row: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ends: bool = False

    def __post_init__(self) -> None:
        require_share(self.name, sparsity=self.sparsity)

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Snip(self)


class _Snip(MaskedMethod):
    def __init__(self, settings: SNIP) -> None:
        super().__init__(settings)
        self._settings = settings

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if not self.masks:
            self._choose()
        super().before_step(optimizer, step)

    def _choose(self) -> None:
        scores = {  # a layer outside the loss, such as an unused head, stays dense
            name: (weight.detach() * weight.grad).abs()
            for name, weight in self.weights.items()
            if weight.grad is not None
        }
        if not scores:
            raise UsageError("snip: no chosen layer has a gradient; call backward before the step")
        keep = round((1 - self._settings.sparsity) * sum(each.numel() for each in scores.values()))
        masks = largest([*scores.values()], keep, self._settings.one_a_row)
        self.masks = dict(zip(scores, masks, strict=True))
        self.project()
