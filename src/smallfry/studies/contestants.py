"""Contestants of a race: optimizers with default settings and tuning ranges.

All train on the same mean loss. Ours have their damping in one unit, the mean eigenvalue of the
approximated Fisher, whatever the method. "KFAC, papers' form" is KFAC as Koroko et al. ran it:
whole factors damped apart, a quarter of the batch, and a refresh every 100 steps from the first on.
With statistics that old it needs more damping than ours: its range begins and ends higher.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from smallfry import optim
from smallfry.errors import UsageError
from smallfry.studies.problems import Problem

Settings = Mapping[str, float]
Range = tuple[float, float]


@dataclass(frozen=True)
class Contestant:
    """Optimizer in a race.

    Args:
        label: Its name for people.
        family: "ours" or "peer".
        build: Makes it for a model and a problem, with settings.
        defaults: Settings that differ from the optimizer's own defaults.
        ranges: Lowest and highest value of each setting in the search, on a logarithmic scale.
    """

    label: str
    family: Literal["ours", "peer"]
    build: Callable[..., torch.optim.Optimizer]
    defaults: Settings
    ranges: Mapping[str, Range]


def propose(contestant: Contestant, trials: int) -> list[dict[str, float]]:
    """Propose settings: the defaults, then points of a Sobol sequence in the ranges.

    Args:
        contestant: Whose.
        trials: Number of settings.
    """
    names = list(contestant.ranges)
    engine = torch.quasirandom.SobolEngine(  # type: ignore[no-untyped-call]
        len(names), scramble=True, seed=0
    )
    proposed = [dict(contestant.defaults)]
    for point in engine.draw(max(1, trials), dtype=torch.float64).tolist():
        pairs = zip(names, point, strict=True)
        proposed.append({name: _between(contestant.ranges[name], at) for name, at in pairs})
    return proposed[:trials]


def _between(limits: Range, at: float) -> float:
    """Interpolate on a logarithmic scale, with three significant digits."""
    low, high = limits
    return float(f"{low * (high / low) ** at:.3g}")


# Peers


def _sgd(model: nn.Module, problem: Problem, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)


def _adamw(model: nn.Module, problem: Problem, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)


def _muon(model: nn.Module, problem: Problem, lr: float) -> torch.optim.Optimizer:
    """Create timm's Muon with Nesterov momentum; non-matrices use AdamW at the same rate."""
    from timm.optim import create_optimizer_v2

    muon: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt="nmuon",
        lr=lr,
        weight_decay=0.0,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    return muon


def _soap(model: nn.Module, problem: Problem, lr: float) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise UsageError(
            "the contestant 'soap' needs pytorch_optimizer: pip install 'smallfry[peers]', or "
            "list the other contestants"
        ) from error
    soap: torch.optim.Optimizer = SOAP(model.parameters(), lr, weight_decay=0.0)
    return soap


# Ours

NATURAL: Settings = {"lr": 0.1, "damping": 0.1, "kl_clip": 0.01}
NATURAL_RANGES: Mapping[str, Range] = {
    "lr": (0.03, 1.0),
    "damping": (3e-3, 1.0),
    "kl_clip": (3e-3, 0.3),
}


def _natural(
    kind: Callable[..., optim.NaturalGradient], options: Mapping[str, Any] | None = None
) -> Callable[..., torch.optim.Optimizer]:
    def build(model: nn.Module, problem: Problem, **settings: float) -> torch.optim.Optimizer:
        told = {"likelihood": problem.likelihood, "loss_scale": problem.loss_scale}
        return kind(model, **told, **(options or {}), **settings)

    return build


def _papers_kfac(model: nn.Module, problem: Problem, **settings: float) -> torch.optim.Optimizer:
    form = {"factor_rank": None, "statistics_every": 100, "burn_in": 0}
    rows = {"max_rows": problem.batch_size // 4}
    return _natural(optim.KFAC, form | rows)(model, problem, **settings)


def _ours(
    label: str,
    kind: Callable[..., optim.NaturalGradient],
    defaults: Settings = NATURAL,
    ranges: Mapping[str, Range] = NATURAL_RANGES,
    **options: Any,
) -> Contestant:
    return Contestant(label, "ours", _natural(kind, options), defaults, ranges)


def _row(method: optim.Method) -> Contestant:
    """Build the contestant of a method."""
    damping = max(float(NATURAL["damping"]), method.least_damping)
    ranges = {**NATURAL_RANGES, "damping": (0.1, 100.0)} if method.least_damping else NATURAL_RANGES
    return _ours(method.label, method.optimizer, {**NATURAL, "damping": damping}, ranges)


def _two_level(label: str, coarse: str | tuple[str, ...], krylov: bool = False) -> Contestant:
    return _ours(f"two-level, {label}", optim.TwoLevel, coarse=coarse, krylov=krylov)


CONTESTANTS = {
    "sgd": Contestant("SGD-momentum", "peer", _sgd, {"lr": 0.1}, {"lr": (1e-2, 10.0)}),
    "adamw": Contestant("AdamW", "peer", _adamw, {"lr": 1e-3}, {"lr": (1e-4, 1e-2)}),
    "muon": Contestant("Muon", "peer", _muon, {"lr": 1e-3}, {"lr": (1e-3, 1e-1)}),
    "soap": Contestant("SOAP", "peer", _soap, {"lr": 3e-3}, {"lr": (1e-3, 1e-1)}),
    "kfac_papers": Contestant(
        "KFAC, papers' form",
        "ours",
        _papers_kfac,
        {"lr": 0.3, "damping": 10.0, "kl_clip": 0.01},
        {"lr": (0.03, 10.0), "damping": (0.1, 100.0), "kl_clip": (1e-3, 0.3)},
    ),
    "ekfac_kpsvd": _ours("EKFAC, KPSVD's basis", partial(optim.EKFAC, basis="kpsvd")),
    **{name: _row(method) for name, method in optim.METHODS.items()},
    "nicolaides": _two_level("Nicolaides", "nicolaides"),
    "krylov_nicolaides": _two_level("Krylov-Nicolaides", "nicolaides", krylov=True),
    "spectral": _two_level("spectral", "spectral"),
    "residual": _two_level("residual", "residual"),
    "krylov_residual": _two_level("Krylov-residual", "residual", krylov=True),
    "tko": _two_level("TKO", "tko"),
}
