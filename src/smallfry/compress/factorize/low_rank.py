"""Low-rank factorisation of linear layers and convolutions by singular value decomposition.

With r = keep · m n / (m + n), a matrix of m × n has ``keep`` of its numbers in two factors. It is
the nearest of that rank in the Frobenius norm, without data.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from smallfry.compress.select import dense_layers
from smallfry.errors import UsageError
from smallfry.layers.low_rank import LowRank as Layer
from smallfry.training.method import Method, register_method
from smallfry.transforms.replace import Replace, replace_layers, tied_layers
from smallfry.transforms.spec import Transform


@register_method
@dataclass(frozen=True)
class LowRank:
    """Low-rank factorisation of a trained model.

    Args:
        keep: Parameters of the factors as a share of the layer's, below 1.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep dense.
        smallest: Layers with fewer parameters stay dense.

    Example:
        >>> import timm, smallfry
        >>> from smallfry.compress import LowRank, apply_to_model
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> small, spec = apply_to_model(model, [LowRank(keep=0.5, include=["*.mlp.*"])])
        >>> sum(p.numel() for p in small.parameters()) < 109_131
        True
    """

    name: ClassVar[str] = "low_rank"
    trains: ClassVar[bool] = False
    tunable: ClassVar[bool] = True

    keep: float = 0.5
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    smallest: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UsageError(f"low_rank.keep must be between 0 and 1, not {self.keep}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Factorise(self)


class _Factorise(Method):
    def __init__(self, settings: LowRank) -> None:
        self._settings = settings

    def finish(self, model: nn.Module) -> Transform | None:
        modules, ties = dict(model.named_modules()), tied_layers(model)
        chosen = dense_layers(model, self._settings.include, self._settings.exclude)
        ranks = {
            name: {"rank": rank}
            for name in dict.fromkeys(tied for one in chosen for tied in ties[one])
            if (rank := self._rank(modules.get(name))) is not None
        }
        if not ranks:
            return None
        replace_layers(model, ranks, lambda layer, name: Layer.from_dense(layer, **ranks[name]))
        return Replace(Layer.name, ranks)

    def _rank(self, layer: nn.Module | None) -> int | None:
        """Choose the rank of a layer's factors; None if it stays dense."""
        if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            return None
        rows, columns = layer.weight.flatten(1).shape
        rank = int(self._settings.keep * rows * columns / (rows + columns))
        return rank if rank >= 1 and rows * columns >= self._settings.smallest else None
