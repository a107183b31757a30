"""The network, gradients and optimizers of the pruning goldens, all in closed form."""

import json
from pathlib import Path

import torch
from torch import nn

from smallfry.training.method import Setting
from smallfry.transforms.groups import ChannelGroup, Slice
from smallfry.transforms.spec import ModelSpec

GOLDEN = json.loads((Path(__file__).parent / "golden" / "pruning.json").read_text())
SHAPES = GOLDEN["pruning_setup"]["parameters"]
NAMES = [name for name, _ in SHAPES]
FAMILIES = {"A": ("conv.weight", "bn.weight", "bn.bias"), "B": ("fc1.weight", "fc1.bias")}


class Net(nn.Module):
    """The parameters of the goldens at their first values, in float64."""

    def __init__(self, names=NAMES):
        super().__init__()
        for k, (name, shape) in enumerate(SHAPES):
            if name in names:
                owner, leaf = name.split(".")
                if not hasattr(self, owner):
                    setattr(self, owner, nn.Module())
                i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
                value = 0.5 * torch.sin(0.37 * i + 0.11 * k + 0.2)
                getattr(self, owner).register_parameter(leaf, nn.Parameter(value.view(shape)))

    def set_gradients(self, t):
        for k, (name, shape) in enumerate(SHAPES):
            parameter = dict(self.named_parameters()).get(name)
            if parameter is not None:
                i = torch.arange(parameter.numel(), dtype=torch.float64)
                wave = 0.3 * torch.cos(0.23 * i + 0.31 * k + 0.17 * t).view(shape)
                parameter.grad = wave + 0.1 * parameter.detach()

    def loss(self, t):
        squares = sum(p.detach().square().mean() for p in self.parameters())
        return 1 + 0.1 * squares + 0.05 * torch.sin(torch.tensor(0.7 * t, dtype=torch.float64))


def families():
    sizes = dict(SHAPES)
    found = []
    for key, names in FAMILIES.items():
        channels = sizes[names[0]][0]
        slices = tuple(Slice(name, 0, torch.arange(channels)[:, None]) for name in names)
        found.append(ChannelGroup(key, channels, slices, slices))
    return found


def setting(steps):
    return Setting(ModelSpec("unknown"), torch.zeros(2, 1), (), steps)


class ReferenceAdamW(torch.optim.Optimizer):
    """AdamW whose moments start at g and g², as in only_train_once."""

    def __init__(self, params, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        )
        self.betas, self.eps, self.t = betas, eps, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.t += 1
        first, second = self.betas
        for group in self.param_groups:
            for p in group["params"]:
                state, g = self.state[p], p.grad
                if not state:
                    state["m"], state["v"] = g.clone(), g.square()
                else:
                    state["m"] = first * state["m"] + (1 - first) * g
                    state["v"] = second * state["v"] + (1 - second) * g.square()
                m = state["m"] / (1 - first**self.t)
                v = state["v"] / (1 - second**self.t)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * m / (v.sqrt() + self.eps))


def optimizer(model, settings):
    lr, decay = settings["lr"], settings.get("weight_decay", 0.0)
    if settings["variant"] == "adamw":
        return ReferenceAdamW(model.parameters(), lr, decay)
    momentum = settings.get("first_momentum", 0.0)
    return torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=decay)


def attach(optimizer, method):
    """Hook a method into an optimizer, with its own count of steps."""
    steps = iter(range(10_000)), iter(range(10_000))
    optimizer.register_step_pre_hook(lambda o, *_: method.before_step(o, next(steps[0])))
    optimizer.register_step_post_hook(lambda o, *_: method.after_step(o, next(steps[1])))


def assert_parameters(model, entry):
    parameters = dict(model.named_parameters())
    for name, total in entry.get("sums", {}).items():
        assert abs(float(parameters[name].detach().sum()) - total) < 1e-9, name
    for name in NAMES:
        if name in entry:
            expected = torch.tensor(entry[name], dtype=torch.float64)
            torch.testing.assert_close(
                parameters[name].detach().flatten(), expected, atol=1e-9, rtol=0
            )


def by_family(chosen):
    return dict(zip(FAMILIES, map(list, chosen), strict=True))
