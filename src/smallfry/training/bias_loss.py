"""Bias loss: samples weighed by the variety of their features (arXiv 2107.11170).

    v_i ← unbiased variance of the features of sample i, detached
    w_i = exp(α (v_i − min v) / (max v − min v)) − β,      loss = mean w_i · cross-entropy_i

With α = β = 0.3, weights are 0.7 to 1.05. Abrahamyan et al., ICCV 2021.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.tasks import Batch
from smallfry.tasks.classification import Classification
from smallfry.training.objective_steps import Step

__all__ = ["BiasLoss", "RunningBiasLoss", "feature_variances", "sample_weights"]


def feature_variances(features: Tensor) -> Tensor:
    """Compute the unbiased variance of each sample's features (batch, ...), at least in float32."""
    rows = features.detach().flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).var(dim=1)


def sample_weights(
    variances: Tensor, alpha: float = 0.3, beta: float = 0.3, lowest: Tensor | None = None
) -> Tensor:
    """Compute the weights of samples from the variances (batch,) of their features.

    Equal variances give 1 − β.

    Args:
        variances: Of one batch.
        alpha: Factor of the normalised variance.
        beta: What is taken off all weights.
        lowest: Variance that is normalised to 0; default the batch's lowest.
    """
    low, high = variances.aminmax()
    span = high - low
    above = variances - (low if lowest is None else lowest)
    normalized = torch.where(span > 0, above / span, torch.zeros_like(above))
    return (alpha * normalized).exp() - beta


class BiasLoss:
    """Objective: cross-entropy weighed by the variety of features, one step per batch.

    The features are those of ``forward_features``: a map of a convolutional network, tokens of a
    transformer. Each micro-batch and each process normalises its own part of a batch.

    Args:
        task: Classification.
        alpha: See ``sample_weights``.
        beta: See ``sample_weights``.

    Raises:
        UsageError: Another task.
    """

    supervision_steps = 1
    halt_threshold = 1.0

    def __init__(self, task: Any, alpha: float = 0.3, beta: float = 0.3) -> None:
        if not isinstance(task, Classification):
            raise UsageError(f"objective.name bias needs the task classification, not {task.name}")
        self.task: Classification = task
        self.alpha, self.beta = alpha, beta

    @property
    def likelihood(self) -> str:
        """Likelihood of the task; natural gradient reads the weights from the gradient."""
        return self.task.likelihood

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return a module that computes features and logits.

        Raises:
            UsageError: A model without features, or one that recurs.
        """
        parts = all(callable(getattr(model, f"forward_{p}", None)) for p in ("features", "head"))
        if not parts or isinstance(model, Recursive):
            raise UsageError(
                "objective.name bias needs a model with forward_features and forward_head that "
                f"does not recur, got {type(model).__name__}; take objective.name auto"
            )
        return _WithFeatures(model)

    def __call__(self, prepared: nn.Module, batch: Batch) -> Iterator[Step]:
        """Yield the single step of a batch."""
        features, logits = prepared(batch.inputs)
        weights = self.weights(features).to(logits)
        losses = self.task.losses(logits, batch.targets)
        yield Step((weights * losses).mean(), logits.detach())

    def weights(self, features: Tensor) -> Tensor:
        """Compute the weights of samples (batch,) from their features."""
        return sample_weights(feature_variances(features), self.alpha, self.beta)


class RunningBiasLoss(BiasLoss):
    """Bias loss normalised by the lowest variance since training began, in all processes.

    The range stays that of each batch, so weights can exceed exp(α) − β.
    """

    def __init__(self, task: Any, alpha: float = 0.3, beta: float = 0.3) -> None:
        super().__init__(task, alpha, beta)
        self.lowest = torch.tensor(torch.inf)

    def weights(self, features: Tensor) -> Tensor:
        """Compute the weights of samples (batch,) from their features, and update the minimum."""
        variances = feature_variances(features)
        self.lowest = torch.minimum(self.lowest.to(variances), variances.min())
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.lowest, dist.ReduceOp.MIN)
        return sample_weights(variances, self.alpha, self.beta, self.lowest)

    def state_dict(self) -> dict[str, Any]:
        """Return the running minimum."""
        return {"lowest": self.lowest.cpu()}

    def load_state_dict(self, state: dict[str, Any], batch: Batch) -> None:
        """Restore it, on the device of a batch."""
        self.lowest = state["lowest"].to(batch.inputs.device)


class _WithFeatures(nn.Module):
    """Module whose forward gives features and logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        features = model.forward_features(images)
        return features, model.forward_head(features)
