"""Settings for classes with different numbers of training images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from smallfry.settings import check, check_values

SAMPLERS: Mapping[str, float] = {"balanced": 0.0, "square_root": 0.5}  # exponents of class sizes


@dataclass(frozen=True)
class BalanceConfig:
    """Treatment of classes with different numbers of training images.

    Args:
        loss: Weights of the classes in the loss: balanced is the inverse of the number of training
            images; effective that of the effective number (1 - beta**n) / (1 - beta). Their mean
            over the training images is 1.
        beta: Of effective; the nearer to 1, the nearer to balanced.
        weights: Weights of classes by name instead, such as {rare: 5.0}; others have 1.
        sampler: balanced draws images of all classes equally often; square_root in proportion to
            the square root of the number of images. An epoch has as many images as before.
    """

    loss: Literal["none", "balanced", "effective"] = "none"
    beta: float = 0.999
    weights: dict[str, Any] = field(default_factory=dict)
    sampler: Literal["none", "balanced", "square_root"] = "none"

    def __post_init__(self) -> None:
        check_values(self, "balance.")
        check(0 <= self.beta < 1, f"balance.beta is 0 to below 1, not {self.beta}")
        check(
            self.loss == "none" or not self.weights,
            f"balance.weights are weights of the loss, as balance.loss {self.loss} gives: "
            "leave one of them out",
        )
        for name, weight in self.weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            right = number and math.isfinite(weight) and weight > 0
            check(right, f"balance.weights.{name} must be a positive number, not {weight!r}")
        object.__setattr__(self, "weights", {str(k): float(w) for k, w in self.weights.items()})
