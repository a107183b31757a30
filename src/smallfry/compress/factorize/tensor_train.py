"""Factorisation into tensor trains (CompactifAI, Tomut et al. 2024, arXiv 2401.14109)."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from smallfry.compress.factorize.method import FactorSettings
from smallfry.errors import UsageError
from smallfry.io.json import Plain
from smallfry.layers.linear_map import is_whole
from smallfry.layers.tensor_train import Modes, modes_of
from smallfry.layers.tensor_train import TensorTrain as Layer
from smallfry.training.method import register_method


@register_method
@dataclass(frozen=True)
class TensorTrain(FactorSettings):
    """Tensor trains of a trained model's linear layers and convolutions of 1 × 1.

    Args:
        cores: Cores of each train, 2 to 10.

    Example:
        >>> import timm, smallfry
        >>> from smallfry.compress import TensorTrain, apply_to_model
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> small, spec = apply_to_model(model, [TensorTrain(keep=0.5, include=["*.mlp.*"])])
        >>> dict(spec.transforms[0].settings["blocks.0.mlp.fc2"])
        {'ranks': [19]}
    """

    name: ClassVar[str] = "tensor_train"
    layer: ClassVar[Any] = Layer

    cores: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.cores) is not int or not 2 <= self.cores <= 10:
            raise UsageError(f"tensor_train.cores must be 2 to 10, not {self.cores}")

    def choose(self, layer: nn.Module, keep: float) -> dict[str, Plain] | None:
        """Choose the largest common rank that fits, lower at cuts where less is exact."""
        weight = cast(Tensor, layer.weight)
        if not is_whole(layer) or not _is_pointwise(layer):
            return None
        rows, columns = weight.flatten(1).shape
        modes = modes_of(rows, columns, self.cores)
        most = keep * weight.numel()
        rank = 0
        while rank < max(modes.full_ranks) and modes.parameters(_ranks(modes, rank + 1)) <= most:
            rank += 1
        return {"ranks": _ranks(modes, rank)} if rank else None


def _ranks(modes: Modes, rank: int) -> list[int]:
    return [min(rank, full) for full in modes.full_ranks]


def _is_pointwise(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid", "same")
