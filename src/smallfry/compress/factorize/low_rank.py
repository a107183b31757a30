"""Low-rank factorisation of linear layers and convolutions by singular value decomposition.

With r = keep · m n / (m + n), a matrix of m × n has ``keep`` of its numbers in two factors. It is
the nearest of that rank in the Frobenius norm, without data, or in the metric of the curvature.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from smallfry.compress.factorize.method import FactorSettings
from smallfry.compress.quantize.sensitivity import LayerCurvature
from smallfry.errors import UsageError
from smallfry.io.json import Plain
from smallfry.layers.linear_map import is_whole
from smallfry.layers.low_rank import LowRank as Layer
from smallfry.training.method import register_method

Metric = Literal["weights", "curvature"]
METRICS: tuple[Metric, ...] = ("weights", "curvature")
DAMPING = 1e-3  # as a share of a factor's mean eigenvalue


@register_method
@dataclass(frozen=True)
class LowRank(FactorSettings):
    """Low-rank factorisation of a trained model.

    Args:
        metric: ``weights`` minimises ‖Ŵ − W‖, and ``curvature`` the change of the loss to second
            order, tr(Δᵀ G Δ A) with KFAC's factors on calibration images.

    Example:
        >>> import timm, smallfry
        >>> from smallfry.compress import LowRank, apply_to_model
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> small, spec = apply_to_model(model, [LowRank(keep=0.5, include=["*.mlp.*"])])
        >>> sum(p.numel() for p in small.parameters()) < 109_131
        True
    """

    name: ClassVar[str] = "low_rank"
    layer: ClassVar[Any] = Layer

    metric: Metric = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in METRICS:
            raise UsageError(f"low_rank.metric is one of {', '.join(METRICS)}, not '{self.metric}'")

    @property
    def needs_curvature(self) -> bool:
        """True if layers are fitted in the metric of their curvature."""
        return self.metric == "curvature"

    def choose(self, layer: nn.Module, keep: float) -> dict[str, Plain] | None:
        """Choose the rank of a layer's factors."""
        if not is_whole(layer):
            return None
        rows, columns = cast(Tensor, layer.weight).flatten(1).shape
        rank = int(keep * rows * columns / (rows + columns))
        return {"rank": rank} if rank >= 1 else None

    def fit(
        self, layer: nn.Module, chosen: Mapping[str, Plain], known: LayerCurvature | None
    ) -> nn.Module:
        """Factorise a layer, in the metric of its curvature where that is given."""
        if known is not None:
            nearest, weight = deepcopy(layer), cast(Tensor, layer.weight).detach()
            rank = cast(int, chosen["rank"])
            found = nearest_of_rank(weight.flatten(1), known.inputs[0], known.outputs[0], rank)
            cast(Tensor, nearest.weight).data.copy_(found.view_as(weight))
            layer = nearest
        return super().fit(layer, chosen, known)


def nearest_of_rank(
    weight: Tensor, inputs: Tensor, outputs: Tensor, rank: int, damping: float = DAMPING
) -> Tensor:
    """Find the matrix of a rank that minimises tr(Δᵀ G Δ A), Δ = Ŵ − W.

    With G = g gᵀ and A = a aᵀ it is ‖gᵀ Δ a‖², so that the truncated singular value decomposition
    of gᵀ W a is the minimum (Eckart and Young), and Ŵ = g⁻ᵀ (gᵀ W a)_r a⁻¹.

    Args:
        weight: W, (outputs, inputs).
        inputs: A, the second moment of the inputs.
        outputs: G, that of the gradients at the outputs.
        rank: Of the result.
        damping: Added to both factors, as a share of their mean eigenvalue.

    Returns:
        Ŵ in float64.
    """
    left, right = (_damped_root(each.double(), damping) for each in (outputs, inputs))
    u, s, v = torch.linalg.svd(left @ weight.double() @ right, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ v[:rank]
    found: Tensor = torch.linalg.solve(left, torch.linalg.solve(right, kept, left=False))
    return found


def _damped_root(matrix: Tensor, damping: float) -> Tensor:
    """Compute the symmetric square root of a damped factor; the identity of one that is zero."""
    mean = matrix.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(matrix), dtype=matrix.dtype)
    values, vectors = torch.linalg.eigh(matrix / mean)
    root: Tensor = (vectors * (values.clamp(min=0) + damping).sqrt()) @ vectors.T
    return root
