"""State of a natural-gradient optimizer as plain data, keyed by parameter name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smallfry.errors import UsageError
from smallfry.optim.hindsight import load_last_step, save_last_step
from smallfry.optim.preconditioned import PreconditionedOptimizer
from smallfry.optim.preconditioner import copied

FORMAT = 2
OWN = "natural_gradient"  # in the first group, all that is not a parameter's or a group's
FLAGS = (
    "overdue",
    "overdue_inverse",
    "checked",
    "clip",
    "divergence_ratio",
    "targets",
    "measuring",
    "measurable",
    "measured_size",
    "fallback_ratio",
    "_factor",
)  # and those of the preconditioner


def save_state(optimizer: PreconditionedOptimizer) -> dict[str, Any]:
    """Save everything that the next step depends on.

    Returns:
        Dictionaries, lists, numbers, strings and tensors, which ``torch.load`` takes with
        ``weights_only=True``. As in PyTorch, tensors are the optimizer's own, not copies.
    """
    names: dict[Any, str] = dict(optimizer.names)
    per_parameter = {names[p]: dict(state) for p, state in optimizer.state.items() if state}
    if optimizer.adamw is not None:
        inner = optimizer.adamw.state
        per_parameter |= {names[p]: dict(state) for p, state in inner.items() if state}
    groups = [
        {**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    curvature = optimizer.preconditioner.state_dict()
    flags = {name: getattr(optimizer, name) for name in FLAGS} | curvature["flags"]
    method = optimizer.approximation.name
    own = {
        **curvature,
        "format": FORMAT,
        "method": type(optimizer).__name__,
        "settings": {"approximation": method} | optimizer.approximation.settings(),
        "flags": flags,
        "last_step": save_last_step(optimizer),
    }
    # torch.distributed.checkpoint keeps nothing but states of parameters and groups
    groups[0][OWN] = own
    return {**own, "state": per_parameter, "param_groups": groups}


def load_state(optimizer: PreconditionedOptimizer, given: Mapping[str, Any]) -> None:
    """Load a state, unchanged if it does not fit.

    Raises:
        UsageError: It belongs to another method or model.
    """
    given = _as_saved(optimizer, given)
    _require_fit(optimizer, given)
    by_name = {name: p for p, name in optimizer.names.items()}
    for own, group in zip(optimizer.param_groups, given["param_groups"], strict=True):
        # states of before fallback_scale have it in lr_scale
        old = {"lr_scale"} if "fallback_scale" in own and "fallback_scale" not in group else set()
        own.update({key: v for key, v in group.items() if key not in {"params", *old}})
    inner = set() if optimizer.adamw is None else {
        p for group in optimizer.adamw.param_groups for p in group["params"]
    }  # fmt: skip
    optimizer.state.clear()
    if optimizer.adamw is not None:
        optimizer.adamw.state.clear()
    for name, state in given["state"].items():
        parameter = by_name[name]
        owner: Any = optimizer.adamw if parameter in inner else optimizer
        owner.state[parameter] = {
            # AdamW counts its steps on the CPU
            key: copied(value, torch.device("cpu") if key == "step" else parameter.device)
            for key, value in state.items()
        }
    optimizer.preconditioner.load_state_dict(given)
    for name in FLAGS:
        setattr(optimizer, name, given["flags"].get(name, getattr(optimizer, name)))
    load_last_step(optimizer, given.get("last_step", {}))
    optimizer.observer.drop()


def _as_saved(optimizer: PreconditionedOptimizer, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Restore the ``save_state`` form of a state from torch.distributed.checkpoint.

    It numbers parameters through all groups, and keeps what is in the groups.
    """
    groups = given.get("param_groups", [])
    own = next((group[OWN] for group in groups if OWN in group), None)
    if own is None:
        return given
    numbered = [optimizer.names[p] for group in optimizer.param_groups for p in group["params"]]

    def name(key: Any) -> Any:
        return numbered[key] if isinstance(key, int) and key < len(numbered) else key

    plain = [{k: v for k, v in group.items() if k != OWN} for group in groups]
    return {
        **own,
        **{key: value for key, value in given.items() if key not in ("state", "param_groups")},
        "state": {name(key): state for key, state in given.get("state", {}).items()},
        "param_groups": [{**g, "params": [name(p) for p in g["params"]]} for g in plain],
    }


def _require_fit(optimizer: PreconditionedOptimizer, given: Mapping[str, Any]) -> None:
    method = type(optimizer).__name__
    if given.get("format") != FORMAT or "curvature" not in given:
        raise UsageError(
            "this is not the state of a natural-gradient optimizer of this version; expected "
            f"the result of {method}.state_dict()"
        )
    if given["method"] != method:
        raise UsageError(f"this is the state of {given['method']}, not of {method}")
    approximation = optimizer.approximation
    settings = {"approximation": approximation.name} | approximation.settings()
    for key in sorted(settings.keys() | given["settings"].keys()):
        value = given["settings"].get(key)
        if settings.get(key) != value:
            raise UsageError(
                f"the state was made with {key}={value!r}, this optimizer has "
                f"{key}={settings.get(key)!r}: build it with the same"
            )
    mine = [[optimizer.names[p] for p in group["params"]] for group in optimizer.param_groups]
    theirs = [list(group["params"]) for group in given["param_groups"]]
    if mine != theirs:
        flat, other = {n for g in mine for n in g}, {n for g in theirs for n in g}
        odd = sorted(flat ^ other)
        what = f"'{odd[0]}' is in only one of them" if odd else "their groups differ"
        raise UsageError(f"the state belongs to another model or other groups: {what}")
    shapes = {name: p.shape for p, name in optimizer.names.items()}
    for name, state in given["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[name]:
                raise UsageError(
                    f"the state belongs to another model: {key} of '{name}' has shape "
                    f"{tuple(value.shape)}, the parameter {tuple(shapes[name])}"
                )
    last = given.get("last_step", {})
    for name, change in (last.get("covered", {}) | last.get("fallback", {})).items():
        if change.shape != shapes.get(name):
            raise UsageError(f"the state belongs to another model: its last step has '{name}'")
    if set(given["curvature"]) != set(optimizer.curvature):
        odd = sorted(set(given["curvature"]) ^ set(optimizer.curvature))
        raise UsageError(f"the state covers other layers: '{odd[0]}' is in only one of them")
    for block in optimizer.blocks:
        saved = given["curvature"][block.name]
        if saved and tuple(saved["shape"]) != block.shape:
            raise UsageError(
                f"the state belongs to another model: block '{block.name}' has shape "
                f"{tuple(saved['shape'])}, expected {block.shape}"
            )
