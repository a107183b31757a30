"""Gated residual layers.

    out ← layernorm(P a + v ⊙ σ(g)),  [g; v] = W₃ (W₂ elu(W₁ a + b₁) + b₂) + b₃     gated residual
    out ← t ⊙ relu(W x + b) + (1 − t) ⊙ x,  t = σ(W_t x + b_t)                       highway

The gated residual network of Lim et al. 2019 (arXiv 1912.09363) and the highway layer of Srivastava
et al. 2015 (arXiv 1505.00387). A third form, the gated linear unit, is ViTRM's SwiGLU.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GatedResidual", "Highway"]


class GatedResidual(nn.Module):
    """Gated residual network: a change of the input that a gate can switch off, normalised.

    Args:
        inputs: Features of the input.
        hidden: Features inside.
        outputs: Features of the output; the input is projected where they differ.
        drop: Dropout of the gated change.

    Example:
        >>> import torch
        >>> from smallfry.layers.gated_residual import GatedResidual
        >>> GatedResidual(6, 8, 4)(torch.zeros(2, 6)).shape
        torch.Size([2, 4])
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, 2 * outputs)  # gates first, values second
        self.project = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)
        self.drop = nn.Dropout(drop)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., inputs) to (..., outputs)."""
        gates, values = self.gate(self.fc2(F.elu(self.fc1(x)))).chunk(2, dim=-1)
        change = self.drop(values * gates.sigmoid())
        return cast(Tensor, self.norm(self.project(x) + change))


class Highway(nn.Module):
    """Highway layer, which carries most of its input at the start.

    Args:
        features: Of input and output.
        drop: Dropout of the change.

    Example:
        >>> import torch
        >>> from smallfry.layers.gated_residual import Highway
        >>> Highway(6)(torch.zeros(2, 6)).shape
        torch.Size([2, 6])
    """

    def __init__(self, features: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(features, features), nn.Linear(features, features)
        nn.init.constant_(self.gate.bias, -2.0)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., features)."""
        changed = self.drop(F.relu(self.fc(x)))
        return torch.lerp(x, changed, self.gate(x).sigmoid())
