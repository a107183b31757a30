"""Optimizer, learning rate schedule and moving average of weights."""

import math
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.utils import ModelEmaV3
from torch import nn

from smallfry.errors import UsageError, nearest
from smallfry.optim import METHODS, AdamATan2, NaturalGradient
from smallfry.tasks import HasFisher, Task
from smallfry.training.config import EMAConfig, OptimizerConfig, ScheduleConfig
from smallfry.transforms.classifier import classifier_names

NATURAL: dict[str, Callable[..., NaturalGradient]] = {
    name: method.optimizer for name, method in METHODS.items()
}
OWN: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam_atan2": AdamATan2}
RATE_TIMES_WIDTH = 0.192  # found on digits at width 64; wider layers take smaller steps


def peak_learning_rate(config: OptimizerConfig, model: nn.Module) -> float:
    """Return the peak learning rate: the configured one, or a default for the model."""
    if config.lr is not None:
        return config.lr
    if config.name in METHODS:
        return METHODS[config.name].lr
    width: Any = getattr(model, "num_features", 64)
    return RATE_TIMES_WIDTH / float(width)


def build_optimizer(
    config: OptimizerConfig,
    model: nn.Module,
    forward: nn.Module | None = None,
    likelihood: Any = "categorical",
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Build a natural-gradient optimizer, one of timm's registry, or another of ours.

    Undecayed are biases, norms and ``no_weight_decay()``.

    Args:
        config: Its name and settings.
        model: Whose parameters it moves.
        forward: The module whose call is a training forward pass; default the model.
        likelihood: The density that the objective's loss is the negative logarithm of.
        fused: Take the fused form of optimizers that have one, such as adamw.

    Raises:
        UsageError: An unknown name, or settings that the optimizer does not take.
    """
    known = [n for n in list_optimizers() if not get_optimizer_info(n).second_order]
    known += [*NATURAL, *OWN]
    if config.name not in known:
        raise UsageError(f"unknown optimizer '{config.name}'{nearest(config.name, known)}")
    for name in {"lr", "weight_decay"} & {*config.options}:
        raise UsageError(f"optimizer.options has {name}: give it as optimizer.{name}")
    if config.name in NATURAL:
        return _build_natural(config, model, forward, likelihood)
    if config.name in OWN:
        return _build_own(config, model)
    if config.betas is not None and not get_optimizer_info(config.name).has_betas:
        raise UsageError(f"optimizer {config.name} has no betas; its settings are in options")
    arguments: dict[str, Any] = {} if config.betas is None else {"betas": tuple(config.betas)}
    kind = get_optimizer_class(config.name, bind_defaults=False)
    _require_taken(config, kind)
    # fused SGD fails when a parameter has its first gradient after others, as in unfreezing
    one_by_one = isinstance(kind, type) and issubclass(kind, torch.optim.SGD)
    if fused and "fused" in signature(kind).parameters and not one_by_one:
        arguments["fused"] = True
    decay_all = config.decay == "all"
    moved: Any = list(model.parameters()) if decay_all else model
    if (config.bias_rate, config.head_rate, config.layer_decay) != (1.0, 1.0, 1.0):
        moved = _with_rates(config, model)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            moved,
            opt=config.name,
            lr=peak_learning_rate(config, model),
            weight_decay=config.weight_decay,
            filter_bias_and_bn=not decay_all,
            **(arguments | config.options),
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"optimizer {config.name} can't be built: {error}") from error
    return optimizer


def _require_taken(config: OptimizerConfig, kind: Callable[..., Any]) -> None:
    """Require that an optimizer of timm's registry takes its options; timm drops some of others."""
    taken = [n for n in signature(kind).parameters if n not in ("params", "lr", "weight_decay")]
    if "fallback_lr_scale" in taken:  # of two optimizers, between which timm divides parameters
        taken += ["fallback_list", "fallback_no_weight_decay"]
    for name in config.options:
        if name not in taken:
            raise UsageError(
                f"optimizer {config.name} has no setting '{name}': remove it from "
                f"optimizer.options ({config.name} takes {', '.join(taken)})"
            )


def unchecked(config: OptimizerConfig) -> OptimizerConfig:
    """Disable the loss check, for gradients with terms besides the loss.

    Natural gradient compares the first gradients with those of the loss, and refuses others.
    """
    if config.name not in NATURAL:
        return config
    return replace(config, options={"check": "off", **config.options})


def with_fisher(config: OptimizerConfig, task: Task) -> OptimizerConfig:
    """Give natural gradient the Fisher matrix of a task that has one of its own."""
    if config.name not in NATURAL or not isinstance(task, HasFisher):
        return config
    return replace(config, options={"fisher": task.fisher, **config.options})


def _with_rates(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Build parameter groups with the rates of biases, of the classifier and of groups of layers.

    The loop multiplies a group's rate by its ``lr_scale``.
    """
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    heads = {id(p) for n in classifier_names(model) for p in model.get_submodule(n).parameters()}
    if config.head_rate != 1.0 and not heads:
        raise UsageError(
            f"{type(model).__name__} names no classifier: leave out optimizer.head_rate"
        )
    parts = []
    for group in _decay_groups(config, model):
        chosen: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            scale = config.bias_rate if id(parameter) in biases else 1.0
            scale *= config.head_rate if id(parameter) in heads else 1.0
            if parameter.requires_grad:
                chosen.setdefault(scale, []).append(parameter)
        for scale, some in sorted(chosen.items(), key=lambda entry: entry[0] != 1.0):
            parts.append({**group, "params": some, "lr_scale": scale * group.get("lr_scale", 1.0)})
    return parts


def _decay_groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Build parameter groups by weight decay, and by timm's groups of layers if they differ."""
    no_decay: Any = getattr(model, "no_weight_decay", set)
    chosen, groups = config.decay == "weights", [{"params": list(model.parameters())}]
    if config.layer_decay != 1.0:
        groups = param_groups_layer_decay(
            model,
            config.weight_decay,
            no_weight_decay_list=no_decay() if chosen else (),
            weight_decay_exclude_1d=chosen,
            layer_decay=config.layer_decay,
        )
    elif chosen:
        groups = param_groups_weight_decay(
            model, config.weight_decay, no_weight_decay_list=no_decay()
        )
    return groups


def _build_own(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    given: dict[str, Any] = {
        "lr": peak_learning_rate(config, model),
        "weight_decay": config.weight_decay,
    }
    if config.betas is not None:
        given["betas"] = tuple(config.betas)
    try:
        return OWN[config.name](_with_rates(config, model), **(given | config.options))
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {config.name} can't be built: {error}") from error


def _build_natural(
    config: OptimizerConfig, model: nn.Module, forward: nn.Module | None, likelihood: Any
) -> NaturalGradient:
    if config.betas is not None:
        raise UsageError(f"optimizer {config.name} has no betas; its settings are in options")
    if config.bias_rate != 1.0:
        raise UsageError(
            f"optimizer {config.name} moves the weights and the bias of a layer together: leave "
            "out optimizer.bias_rate"
        )
    params: Any = None
    if (config.head_rate, config.layer_decay) != (1.0, 1.0):
        params = _with_rates(config, model)
    elif config.decay == "weights":
        params = _decay_groups(config, model)
    try:
        return NATURAL[config.name](
            model,
            peak_learning_rate(config, model),
            **{
                "params": params,
                "weight_decay": config.weight_decay,
                "likelihood": likelihood,
                "forward": forward,
                **config.options,
            },
        )
    except TypeError as error:
        raise UsageError(f"optimizer {config.name} can't be built: {error}") from error


def learning_rate(
    config: ScheduleConfig, peak: float, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Compute the learning rate of a step: linear warm-up to the peak, then decay to ``min_lr``.

    Per epoch, as in the paper, the first epoch runs at rate 0; per step, no step does.
    """
    warmup = config.warmup_epochs or 0.0
    if config.per == "epoch":
        now: float = step // steps_per_epoch
        total = float(epochs)
    else:
        now = step + 1
        warmup, total = warmup * steps_per_epoch, float(epochs * steps_per_epoch)
    if now < warmup:
        return peak * now / warmup
    floor = min(config.min_lr, peak)
    if config.shape == "steps":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return max(floor, peak * 10.0**-passed)
    done = min(1.0, (now - warmup) / max(1.0, total - warmup))
    if config.shape == "linear":
        return peak + (floor - peak) * done
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


class WeightAverage(ModelEmaV3):  # type: ignore[misc]  # timm has no types
    """timm's moving average of the weights, with the decay of ``EMAConfig``.

    Weights of half precision are averaged in float32: in their own, timm rounds by chance, from
    a state that no checkpoint holds.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
        apart = {"dtype": torch.float32} if half else {}  # timm has had it since 1.0.31
        super().__init__(model, decay=config.decay, use_warmup=config.warmup, **apart)

    def get_decay(self, step: int | None = None) -> float:
        """Return the share of the average kept at the t-th optimizer step, counted from 0."""
        config = EMAConfig(float(self.decay), warmup=self.use_warmup and step is not None)
        return average_decay(config, step or 0)


def average_decay(config: EMAConfig, step: int) -> float:
    """Return the share of the average kept at the t-th optimizer step, counted from 0."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay
