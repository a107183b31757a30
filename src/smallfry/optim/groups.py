"""Parameter groups: natural gradient for covered parameters, AdamW for the others."""

from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import Any

import torch
from torch import nn

from smallfry.errors import UsageError
from smallfry.optim.settings import CurvatureSettings
from smallfry.settings import fitted

OF_GROUPS = {"lr", "momentum", "weight_decay", "fallback_lr"}

Group = dict[str, Any]


def natural_groups(
    model: nn.Module,
    params: Iterable[Any] | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    fallback_lr: float,
) -> list[Group]:
    """Complete the groups of the parameters to train.

    Args:
        model: Whose parameters they are.
        params: Parameters, (name, parameter) pairs or groups; default all with a gradient.
        lr: Default of a group, as are the following.
        momentum: μ.
        weight_decay: Decoupled weight decay.
        fallback_lr: Learning rate of what AdamW trains; in a group with an ``lr`` of its own as
            many times larger or smaller.

    Raises:
        UsageError: A parameter is not the model's, or is given twice.
    """
    given: list[Any] = list(model.parameters()) if params is None else list(params)
    if not given or not isinstance(given[0], dict):
        given = [{"params": given}]
    defaults = {
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "fallback_lr": fallback_lr,
    }
    own, seen, groups = set(model.parameters()), set[nn.Parameter](), []
    for group in given:
        _require_settings(group)
        listed = group["params"]
        listed = [listed] if isinstance(listed, torch.Tensor) else list(listed)
        listed = [p[1] if isinstance(p, tuple) else p for p in listed]
        for p in listed:
            if p not in own:
                raise UsageError("params= holds a parameter of another model")
            if p in seen:
                raise UsageError("params= holds a parameter twice")
            seen.add(p)
        trained = [p for p in listed if p.requires_grad]
        relative = {"fallback_lr": fallback_lr * (group.get("lr", lr) / lr)} if lr else {}
        groups.append({**defaults, **relative, **group, "params": trained})
    if not seen:
        raise UsageError("there are no parameters to train")
    return [group for group in groups if group["params"]]


def _require_settings(group: Any) -> None:
    """Require a group with parameters, whose settings a group can have."""
    if not isinstance(group, Mapping) or "params" not in group:
        raise UsageError("each group of params= is a dictionary with 'params'")
    for name in sorted(OF_GROUPS & set(group)):
        value = group[name]
        value = float(value) if isinstance(value, torch.Tensor) else fitted(value, float, name)
        limit = 1.0 if name == "momentum" else inf
        if not 0 <= value < limit:
            raise UsageError(f"{name} of a group is 0 to below {limit:g}, got {value:g}")
    common = set(group) & (set(CurvatureSettings.__dataclass_fields__) - OF_GROUPS)
    if common:
        raise UsageError(f"{min(common)} is the same for all groups: give it to the optimizer")


def split_groups(
    groups: Iterable[Group], covered: Collection[nn.Parameter]
) -> tuple[list[Group], list[Group]]:
    """Split groups into covered parameters and those for AdamW."""
    natural, rest = [], []
    for group in groups:
        mine = [p for p in group["params"] if p in covered]
        others = [p for p in group["params"] if p not in covered]
        options = {k: v for k, v in group.items() if k not in ("params", "fallback_lr")}
        if mine:
            natural.append({**options, "params": mine})
        if others:
            adam = {k: v for k, v in options.items() if k != "momentum"}
            scale = group["fallback_lr"] / group["lr"] if group["lr"] else 1.0
            # for a loop that sets one rate for every group; timm's schedulers scale each group's
            # own rate by lr_scale, which is not set here therefore
            adam |= {"lr": group["fallback_lr"], "fallback_scale": scale}
            rest.append({**adam, "params": others})
    return natural, rest


def build_adamw(groups: list[Group]) -> torch.optim.AdamW | None:
    """Build the inner AdamW; None if everything is covered."""
    return torch.optim.AdamW(groups) if groups else None
