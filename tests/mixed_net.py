"""A small network with a little of everything."""

import torch
from torch import nn


class Net(nn.Module):
    """A little of everything: shared and plain layers, a norm, an embedding-like parameter."""

    def __init__(self, norm=True, inputs=5, classes=3):
        super().__init__()
        self.first, self.shared = nn.Linear(inputs, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        z = h = self.first(x)
        for _ in range(2):
            z = torch.tanh(self.shared(z)) + h
        return self.head(self.act(self.norm(z)))
