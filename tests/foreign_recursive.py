"""A recursive model that is no ViTRM: a small recurrent net, with a dictionary for its state."""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from smallfry.models import RecursionStep
from smallfry.models.vitrm import image_cfg

NAME = "foreign_recurrent_8"
default_cfgs = generate_default_cfgs({NAME: image_cfg(8, 1)})


class Recurrent(nn.Module):
    """Rewrites a memory, and keeps its peak and its drift; the answer is no part of its state."""

    def __init__(self, img_size=8, in_chans=1, num_classes=10, width=12, recursion_steps=3):
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.recursion_steps = recursion_steps
        self.inside = nn.Linear(in_chans * img_size**2, width)
        self.again = nn.Linear(width, width)
        self.head = nn.Linear(2 * width, num_classes)
        self.halt_head = nn.Linear(width, 1)

    def embed(self, inputs):
        return self.inside(inputs.flatten(1))

    def initial_state(self, batch_size):
        zeros = self.again.weight.new_zeros(batch_size, len(self.again.weight))
        return {"memory": zeros, "past": (zeros - 1, [zeros])}

    def step(self, x, state):
        memory = torch.tanh(x + self.again(state["memory"]))
        peak, [drift] = state["past"]
        peak, drift = torch.maximum(peak, memory), 0.5 * drift + memory
        logits = self.head(torch.cat([memory, peak], dim=1))
        following = {"memory": memory, "past": (peak, [drift])}
        return RecursionStep(following, logits, self.halt_head(drift).squeeze(-1))

    def recurse(self, inputs, steps=None):
        trace, state = [], None
        for _ in range(self.recursion_steps if steps is None else steps):
            trace.append(self.advance(inputs, state))
            state = trace[-1].state
        return trace

    def advance(self, inputs, state=None):
        state = self.initial_state(inputs.shape[0]) if state is None else state
        return self.step(self.embed(inputs), state)

    def forward(self, inputs):
        return self.recurse(inputs)[-1].logits


@register_model
def foreign_recurrent_8(pretrained=False, **kwargs):
    return build_model_with_cfg(Recurrent, NAME, pretrained, **kwargs)
