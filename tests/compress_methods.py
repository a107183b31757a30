"""Two small methods: one that only observes, and one that freezes a tenth of the channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch

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
        self.frozen, self.first = dict(state["frozen"]), dict(state["first"])
