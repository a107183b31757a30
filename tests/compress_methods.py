"""Small methods: to observe, to freeze channels, to penalise weights, to train another layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from smallfry.training.method import Method, register_method
from smallfry.transforms.declared import declared_groups
from smallfry.transforms.resize import tensors_of


@register_method
@dataclass(frozen=True)
class Observe:
    """Records the norm of all weights after each step."""

    name: ClassVar[str] = "observe"
    trains: ClassVar[bool] = True

    every: int = 1

    def start(self):
        return _Observe(self.every)


class _Observe(Method):
    def __init__(self, every):
        self.every, self.norms = every, []

    def begin(self, model, setting):
        self.model, self.steps = model, setting.steps

    def after_step(self, optimizer, step):
        if step % self.every == 0:
            self.norms.append(
                float(sum(p.detach().square().sum() for p in self.model.parameters()))
            )

    def state_dict(self):
        return {"norms": list(self.norms)}

    def load_state_dict(self, state):
        self.norms = list(state["norms"])


@register_method
@dataclass(frozen=True)
class Freeze:
    """Keeps a random share of the hidden channels at their first values."""

    name: ClassVar[str] = "freeze"
    trains: ClassVar[bool] = True

    share: float = 0.1

    def start(self):
        return _Freeze(self.share)


class _Freeze(Method):
    def __init__(self, share):
        self.share, self.frozen, self.first = share, {}, {}

    def begin(self, model, setting):
        random = torch.Generator().manual_seed(setting.seed)
        self.tensors = tensors_of(model)
        for group in declared_groups(model):
            chosen = torch.rand(group.channels, generator=random) < self.share
            for each in group.zeroed:
                rows = each.entries[chosen].flatten()
                self.frozen[each.tensor] = rows
                self.first[each.tensor] = self.tensors[each.tensor].detach()[rows].clone()

    @torch.no_grad()
    def after_step(self, optimizer, step):
        for name, rows in self.frozen.items():
            self.tensors[name][rows] = self.first[name]

    def state_dict(self):
        return {"frozen": self.frozen, "first": self.first}

    def load_state_dict(self, state):
        self.frozen = dict(state["frozen"])
        self.first = {name: rows.to(self.tensors[name]) for name, rows in state["first"].items()}


@register_method
@dataclass(frozen=True)
class Shrink:
    """An L2 penalty on all matrices."""

    name: ClassVar[str] = "shrink"
    trains: ClassVar[bool] = True

    strength: float = 0.01

    def start(self):
        return _Shrink(self.strength)


class _Shrink(Method):
    def __init__(self, strength):
        self.strength = strength

    def penalty(self, model):
        return self.strength * sum(p.square().sum() for p in model.parameters() if p.ndim > 1)


@register_method
@dataclass(frozen=True)
class Scaled:
    """Trains a linear classifier times a number, which is folded into it at the end."""

    name: ClassVar[str] = "scaled"
    trains: ClassVar[bool] = True

    def start(self):
        return _Scaled()


class _Scaled(Method):
    def begin(self, model, setting):
        model.head = Times(model.head)
        self.calibrated = [len(batch) for batch in setting.batches]
        self.numbers, self.steps = [], setting.steps

    def before_step(self, optimizer, step):
        assert all(g["params"][0].grad is not None for g in optimizer.param_groups)
        self.numbers.append(step)

    def finish(self, model):
        head = model.head.layer
        with torch.no_grad():
            head.weight *= model.head.factor
            head.bias *= model.head.factor
        model.head = head

    def state_dict(self):
        return {"calibrated": self.calibrated, "numbers": self.numbers, "steps": self.steps}

    def load_state_dict(self, state):
        self.numbers = list(state["numbers"])


class Times(nn.Module):
    """A layer with a factor for its outputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.factor = layer, nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs):
        return self.factor * self.layer(inputs)
