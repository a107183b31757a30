"""Common settings of all natural-gradient optimizers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, TypedDict

from torch import nn

from smallfry.curvature import Likelihood
from smallfry.errors import UsageError
from smallfry.settings import check_values, fitted

Likely = str | Likelihood | Mapping[str | int, Any] | Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class CurvatureSettings:
    """Validated settings of the step and of the curvature.

    Args:
        lr: Learning rate of the covered parameters.
        likelihood: The density that the loss is the negative logarithm of: "categorical",
            "bernoulli", "bernoulli_probabilities", "gaussian", "stablemax", one of these with
            "_mean" for a mean over positions (of classes in the second dimension), a Likelihood, a
            mapping from parts of the output to likelihoods, or a function from the output to a
            ``torch.distributions`` object.
        loss_scale: The loss over the mean over samples of the negative log-likelihood, summed
            over outputs. "mean" is PyTorch's reduction over all entries, "sum" a sum over samples.
        damping: λ over the mean eigenvalue of the approximated Fisher, in which a layer counts for
            at most 1,000 times the trace of the layer called last.
        damping_per: That mean is over the whole "network", or each "layer" has its own λ.
        adaptive_damping: Adapt λ by Levenberg and Marquardt's rule on refreshing steps, from how
            the loss of the batch changes; costs two more forward passes there.
        momentum: μ.
        weight_decay: Decoupled weight decay.
        kl_clip: κ, twice the divergence of a step for each target of a sample (a class, a pixel, a
            token), as measured on batches that the curvature has not seen, and with batch norm
            the step neither; the AdamW inside may take half of it. None does not clip.
        step_length: "lr", or "quadratic" for the minimum of the exact quadratic model over the
            natural gradient and (with momentum) the last step, times ``lr``; costs two forward-mode
            passes a step.
        ema_decay: Largest share of the old statistics kept at a refresh.
        statistics_every: Steps between refreshes of the statistics.
        inverse_every: Steps between refreshes of the inverses; default ``statistics_every``.
        burn_in: First steps on which both are refreshed every time. One batch shows few of the
            directions that the next ones go; steps along the others would be far too long.
        fisher: "mc" (sampled targets), "exact" (all columns), "empirical" (the actual targets).
        draws: Sampled targets per sample.
        max_rows: Samples times uses that a layer's statistics are taken from, where they are sums
            over uses (sharing="expand"); more uses are drawn at random. None takes all.
        exclude: Modules to leave to AdamW, by name or pattern.
        fallback_lr: Learning rate of the AdamW inside, for what is not covered; in a parameter
            group with an ``lr`` of its own as many times larger or smaller; less where its steps
            diverge more than ``kl_clip`` leaves to them.
        check: What to do if the first gradients are not those of the stated loss and layers:
            "error", "warn", or "off" for a loss with further terms, such as a weight penalty.
        seed: Seed of the sampled targets.

    Raises:
        UsageError: A setting makes no sense.

    Example:
        >>> from smallfry.optim import CurvatureSettings
        >>> CurvatureSettings(lr=0.1, likelihood="gaussian").statistics_every
        10
    """

    lr: float
    likelihood: Likely = "categorical"
    loss_scale: float | Literal["mean", "sum"] = 1.0
    damping: float = 0.1
    damping_per: Literal["network", "layer"] = "network"
    adaptive_damping: bool = False
    momentum: float = 0.9
    weight_decay: float = 0.0
    kl_clip: float | None = 1e-2
    step_length: Literal["lr", "quadratic"] = "lr"
    ema_decay: float = 0.95
    statistics_every: int = 10
    inverse_every: int | None = None
    burn_in: int = 10
    fisher: Literal["mc", "exact", "empirical"] = "mc"
    draws: int = 1
    max_rows: int | None = 2048
    exclude: Iterable[str] = ()
    fallback_lr: float = 1e-3
    check: Literal["error", "warn", "off"] = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the settings."""
        scale = self.loss_scale
        wanted = f"loss_scale is a positive number, 'mean' or 'sum', not {scale!r}"
        _require(not isinstance(scale, str) or scale in ("mean", "sum"), wanted)
        check_values(self, "")
        named: Any = self.exclude
        named = list(named) if isinstance(named, Iterable) and not isinstance(named, str) else named
        object.__setattr__(self, "exclude", fitted(named, tuple[str, ...], "exclude"))
        _require(
            0 <= self.lr < inf and 0 <= self.fallback_lr < inf,
            f"lr and fallback_lr can't be negative or infinite, got {self.lr}, {self.fallback_lr}",
        )
        _require(0 < self.damping < inf, f"damping must be positive, got {self.damping}")
        _require(0 <= self.momentum < 1, f"momentum is 0 to below 1, got {self.momentum}")
        _require(
            0 <= self.weight_decay < inf, f"weight_decay can't be negative, got {self.weight_decay}"
        )
        _require(
            self.kl_clip is None or self.kl_clip > 0,
            f"kl_clip must be positive or None, got {self.kl_clip}",
        )
        _require(0 <= self.ema_decay < 1, f"ema_decay is 0 to below 1, got {self.ema_decay}")
        _require(
            min(self.statistics_every, self.refresh_every) >= 1,
            f"periods are at least 1 step, got {self.statistics_every} and {self.refresh_every}",
        )
        _require(self.burn_in >= 0, f"burn_in is 0 or more steps, got {self.burn_in}")
        _require(isinstance(scale, str) or 0 < scale < inf, wanted)
        _require(
            self.max_rows is None or self.max_rows >= 1,
            f"max_rows is positive or None, got {self.max_rows}",
        )
        _require(self.draws >= 1, f"draws must be at least 1, not {self.draws}")
        _require(self.seed >= 0, f"seed can't be negative, got {self.seed}")

    @property
    def refresh_every(self) -> int:
        """Steps between refreshes of the inverses."""
        return self.statistics_every if self.inverse_every is None else self.inverse_every


class Settings(TypedDict, total=False):
    """Keywords of every natural-gradient optimizer.

    Those of ``CurvatureSettings``, and what belongs to the model at hand: ``params``, ``forward``,
    ``grad_scaler`` and ``process_group``.
    """

    params: Iterable[Any] | None
    likelihood: Likely
    loss_scale: float | Literal["mean", "sum"]
    damping: float
    damping_per: Literal["network", "layer"]
    adaptive_damping: bool
    momentum: float
    weight_decay: float
    kl_clip: float | None
    step_length: Literal["lr", "quadratic"]
    ema_decay: float
    statistics_every: int
    inverse_every: int | None
    burn_in: int
    fisher: Literal["mc", "exact", "empirical"]
    draws: int
    max_rows: int | None
    exclude: Iterable[str]
    forward: nn.Module | None
    fallback_lr: float
    grad_scaler: Any
    check: Literal["error", "warn", "off"]
    seed: int
    process_group: Any


MODEL_KEYWORDS = ("params", "forward", "grad_scaler", "process_group")


def require_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Require a whole number of at least 1, or None where that is optional."""
    number = fitted(value, int | None if optional else int, name)
    _require(number is None or number >= 1, f"{name} is at least 1, not {value}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
