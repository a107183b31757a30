"""Sharded models with PyTorch's FSDP2, and their support in the loop.

Parameters, gradients and the optimizer's state are divided; a block's weights are together only
while it runs. What leaves the loop, a checkpoint or the model to evaluate, is whole, so that it can
be used and gone on with anywhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.training.config import EMAConfig, TrainConfig
from smallfry.training.optimization import NATURAL, average_decay


def require_shareable(config: TrainConfig, batch_size: int, processes: int) -> None:
    """Require that a run can be trained with strategy fsdp.

    Raises:
        UsageError: It needs whole layers, a batch that can't be shared evenly, or compile.
    """
    if config.optimizer.name in NATURAL:
        raise UsageError(
            f"{config.optimizer.name} needs whole layers, and fsdp shards them: take "
            "strategy ddp, or another optimizer"
        )
    if config.methods:
        raise UsageError(
            "methods need whole layers, and fsdp shards them: take strategy ddp, or leave methods "
            "out"
        )
    if batch_size % processes:
        raise UsageError(
            f"strategy fsdp needs a batch_size divisible by {processes} processes, not {batch_size}"
        )
    if config.compile:
        raise UsageError("strategy fsdp trains without compile")


def shard(prepared: nn.Module, mesh: Any) -> nn.Module:
    """Shard a module over the processes of a mesh, block by block.

    A recursive model calls parts of its blocks as well as blocks, and is one unit.
    """
    over = mesh["data_parallel"]
    recursive = any(isinstance(module, Recursive) for module in prepared.modules())
    for module in () if recursive else list(_blocks(prepared)):
        fully_shard(module, mesh=over)
    fully_shard(prepared, mesh=over)
    return prepared


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """List the members of module lists, such as a transformer's blocks."""
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (m for m in child if next(m.parameters(), None) is not None)
        else:
            yield from _blocks(child)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: Any) -> Any:
    """Gather a state on the CPU, unsharded; called in all processes alike."""
    if isinstance(state, DTensor):
        parts: Any = state.detach()
        return parts.full_tensor().cpu()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value) for value in state)
    return state


def divided(value: Any, like: Tensor) -> Any:
    """Shard a tensor like another; tensors of another shape are returned unchanged."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        there = value.to(like.device, like.dtype)
        return distribute_tensor(there, like.device_mesh, like.placements)
    return value


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load unsharded weights into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: divided(value, own[name]) for name, value in weights.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an unsharded state into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(isinstance(p, DTensor) for p in parameters):
        optimizer.load_state_dict(cast(dict[str, Any], state))
        return
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owner = dict(zip(numbers, parameters, strict=True))
    shares = {
        number: {key: divided(value, owner[number]) for key, value in kept.items()}
        for number, kept in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shares})


class ShardedAverage:
    """Moving average of a sharded model's weights, sharded alike.

    Args:
        model: The model, divided already.
        config: Settings of the average.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the weights after the t-th optimizer step, counted from 0."""
        share = 1 - average_decay(self.config, step)
        for name, value in model.state_dict().items():
            mine, fresh = local(self.weights[name]), local(value)
            if mine.is_floating_point():
                mine.lerp_(fresh, share)
            else:
                mine.copy_(fresh)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load an unsharded average."""
        self.weights = {k: divided(v, self.weights[k]) for k, v in weights.items()}
