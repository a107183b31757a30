"""Response of a layer's weights to hyper-parameters, as gates (self-tuning networks).

    y = W x + b + u ⊙ (W_h x) + v ⊙ b_h,   (u, v) = V λ        λ: hyper-parameters of each example

W and b stay those of the layer; W_h, b_h and V are the response. In a two-layer linear network with
a penalty on its Jacobian, the exact response is such a gate of each hidden unit (MacKay, Vicol,
Lorraine, Duvenaud, Grosse, ICLR 2019, arXiv 1903.03088; Δ-STN: Bae, Grosse, NeurIPS 2020, arXiv
2010.13514).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError

__all__ = ["Response"]


class Response(nn.Module):
    """Response of a linear layer or a convolution; zero until it is trained.

    Args:
        layer: The layer, of the same inputs and outputs.
        hypers: Number of hyper-parameters.

    Raises:
        UsageError: Another kind of layer.

    Example:
        >>> layer, inputs = nn.Linear(4, 3), torch.randn(5, 4)
        >>> response = Response(layer, hypers=2)
        >>> torch.equal(response(layer, inputs, layer(inputs), torch.randn(5, 2)), layer(inputs))
        True
    """

    def __init__(self, layer: nn.Module, hypers: int) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise UsageError(f"a response is of a linear layer or convolution, not {layer}")
        weight = layer.weight
        bound = 1 / math.sqrt(weight[0].numel())
        self.weight = nn.Parameter(torch.empty_like(weight).uniform_(-bound, bound))
        self.bias: nn.Parameter | None = None
        if layer.bias is not None:
            self.bias = nn.Parameter(torch.empty_like(layer.bias).uniform_(-bound, bound))
        self.gates = nn.Parameter(weight.new_zeros(2 * len(weight), hypers))  # V

    def forward(self, layer: Any, inputs: Tensor, outputs: Tensor, hypers: Tensor) -> Tensor:
        """Add the response to the outputs of the layer.

        Args:
            layer: The layer.
            inputs: Its inputs, (rows, ...), of several rows an example or one.
            outputs: Its outputs, (rows, ..., features) or (rows, channels, height, width).
            hypers: Hyper-parameters, (examples, hyper-parameters).
        """
        u, v = F.linear(hypers, self.gates).chunk(2, dim=1)
        if len(outputs) != len(hypers):
            u, v = (each.repeat_interleave(len(outputs) // len(hypers), 0) for each in (u, v))
        if isinstance(layer, nn.Linear):
            shape = (len(outputs), *(1 for _ in outputs.shape[2:]), outputs.shape[-1])
            change = F.linear(inputs, self.weight)
        else:
            shape = (*outputs.shape[:2], 1, 1)
            change = layer._conv_forward(inputs, self.weight, None)
        found = outputs + u.reshape(shape) * change
        if self.bias is not None:
            biases = self.bias if isinstance(layer, nn.Linear) else self.bias[:, None, None]
            found = found + v.reshape(shape) * biases
        return found

    def dense(self, layer: Any, hypers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fold the gates into ordinary weights.

        Args:
            layer: The layer.
            hypers: One value of each hyper-parameter, (hyper-parameters,).

        Returns:
            Weight and bias of a layer with the same outputs.
        """
        u, v = (self.gates @ hypers).chunk(2)
        weight = layer.weight + u.reshape(-1, *(1 for _ in layer.weight.shape[1:])) * self.weight
        return weight, None if self.bias is None else layer.bias + v * self.bias

    def squares(self, layer: Any, hypers: Tensor) -> Tensor:
        """Compute the squared norm of the folded weight, (examples,).

        Args:
            layer: The layer.
            hypers: Hyper-parameters, (examples, hyper-parameters).
        """
        u = F.linear(hypers, self.gates).chunk(2, dim=1)[0]
        rows, changes = layer.weight.flatten(1), self.weight.flatten(1)
        own, mixed, change = (rows * rows).sum(1), (rows * changes).sum(1), (changes**2).sum(1)
        found: Tensor = own.sum() + 2 * u @ mixed + (u * u) @ change
        return found
