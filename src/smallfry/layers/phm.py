"""Hypercomplex products and the adapters of Compacter.

    H = Σ_i A_i ⊗ s_i t_iᵀ,  i = 1 … n        x ↦ x H + b        (parametrised hypercomplex, PHM)
    h ← h + up(gelu(down(h)))                                     (adapter)

``down`` and ``up`` are PHM products with a small width between them. The A_i (n × n), the *rules*,
are the same in all adapters of a model; s_i (inputs / n × rank) and t_i (outputs / n × rank) are
each product's own. Karimi Mahabadi, Henderson, Ruder, *Compacter*, NeurIPS 2021. Without the gelu
an adapter is linear and merges into the layer before it.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.layers.linear_map import sizes_of

Activation = Literal["gelu", "none"]


class PHMRules(nn.Module):
    """Rules A_i that all hypercomplex products of a model share.

    They are one vector of n³ numbers: optimizers leave vectors out of weight decay, which would
    pull the rules, a factor of every product, to zero.

    Args:
        n: Number and size of the rules.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.rules = nn.Parameter(0.01 * torch.randn(n**3))

    def tensor(self) -> Tensor:
        """Return the rules, (n, n, n)."""
        return self.rules.view(self.n, self.n, self.n)


def phm_matrix(rules: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute Σ_i A_i ⊗ s_i t_iᵀ, (inputs, outputs).

    Args:
        rules: A, (n, n, n).
        left: s, (n, inputs / n, rank).
        right: t transposed, (n, rank, outputs / n).

    Example:
        >>> import torch
        >>> from smallfry.layers.phm import phm_matrix
        >>> phm_matrix(torch.eye(2).expand(2, 2, 2), torch.ones(2, 3, 1), torch.ones(2, 1, 1))[0]
        tensor([2., 0.])
    """
    n, rows, _ = left.shape
    blocks = torch.einsum("iab,ipq->apbq", rules, left @ right)
    return blocks.reshape(n * rows, n * right.shape[2])


class PHMLinear(nn.Module):
    """Hypercomplex product of the last dimension, or of an image's channels.

    Args:
        rules: Rules; shared, and no part of this module.
        inputs: Inputs, a multiple of n.
        outputs: Outputs, a multiple of n.
        rank: Rank of s and t.

    Raises:
        ValueError: A width that is no multiple of n.

    Example:
        >>> import torch
        >>> from smallfry.layers.phm import PHMLinear, PHMRules
        >>> product = PHMLinear(PHMRules(4), 24, 8)
        >>> product(torch.zeros(3, 24)).shape, sum(p.numel() for p in product.parameters())
        (torch.Size([3, 8]), 40)
    """

    def __init__(self, rules: PHMRules, inputs: int, outputs: int, rank: int = 1) -> None:
        super().__init__()
        n = rules.n
        if inputs % n or outputs % n:
            raise ValueError(f"the widths {inputs} and {outputs} must be multiples of n = {n}")
        self._shared = (rules,)  # in a tuple, so that it is no part of this module
        self.left = nn.Parameter(torch.empty(n, inputs // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (*self.left, *self.right):
            nn.init.xavier_uniform_(factor.data, gain=2**0.5)

    def matrix(self) -> Tensor:
        """Compute H, (inputs, outputs)."""
        return phm_matrix(self._shared[0].tensor(), self.left, self.right)

    def forward(self, inputs: Tensor, is_image: bool = False) -> Tensor:
        """Map (..., inputs) to (..., outputs), or (batch, inputs, height, width) likewise."""
        weight = self.matrix().T
        if is_image:
            return F.conv2d(inputs, weight[:, :, None, None], self.bias)
        return F.linear(inputs, weight, self.bias)


class Adapter(nn.Module):
    """Two hypercomplex products with a small width between them, added to their inputs.

    Args:
        rules: Rules of the products.
        width: Inputs and outputs.
        inner: Width between the products.
        activation: Between the products; ``none`` for a linear adapter.
    """

    def __init__(self, rules: PHMRules, width: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.down, self.up = PHMLinear(rules, width, inner), PHMLinear(rules, inner, width)

    def forward(self, hidden: Tensor, is_image: bool = False) -> Tensor:
        """Adapt rows (..., width), or an image of so many channels."""
        inner = self.down(hidden, is_image)
        if self.activation == "gelu":
            inner = F.gelu(inner, approximate="tanh")
        return hidden + cast(Tensor, self.up(inner, is_image))


class Adapted(nn.Module):
    """Layer with an adapter of its outputs, or with one for each of its calls in a recursion.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``, which stays a part.
        rules: Rules of the adapters.
        inner: Width of the adapters.
        calls: Number of adapters; calls take them in turn.
        activation: Of the adapters.

    Raises:
        ValueError: Another layer, or widths that are no multiples of n.

    Attributes:
        called: Calls since ``smallfry.layers.quantized.CallReset``.

    Example:
        >>> import torch
        >>> from smallfry.layers.phm import Adapted, PHMRules
        >>> layer = Adapted(torch.nn.Linear(6, 16), PHMRules(4), inner=4, activation="none")
        >>> torch.allclose(layer.dense()(torch.ones(2, 6)), layer(torch.ones(2, 6)), atol=1e-6)
        True
    """

    def __init__(
        self,
        layer: nn.Module,
        rules: PHMRules,
        inner: int,
        calls: int = 1,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")
        vars(self).update(sizes_of(layer))
        self.layer, self.calls, self.called = layer, calls, 0
        self.is_image = isinstance(layer, nn.Conv2d)
        made = (Adapter(rules, len(layer.weight), inner, activation) for _ in range(calls))
        self.adapters = nn.ModuleList(made).to(layer.weight)

    @property
    def weight(self) -> Tensor:
        """Weight of the layer without its adapters."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the layer without its adapters."""
        return self.layer.bias

    @property
    def is_mergeable(self) -> bool:
        """True if ``dense`` exists: for a single adapter, linear, of a layer without groups."""
        is_linear = self.calls == 1 and cast(Adapter, self.adapters[0]).activation == "none"
        return is_linear and getattr(self.layer, "groups", 1) == 1

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """Merge a linear adapter into the layer.

        Raises:
            ValueError: The layer is not ``is_mergeable``.
        """
        if not self.is_mergeable:
            raise ValueError(
                "only a single adapter with activation: none, of a layer without groups, can be "
                "merged"
            )
        adapter, layer = cast(Adapter, self.adapters[0]), self.layer
        up = adapter.up.matrix()
        change = torch.eye(len(layer.weight)).to(up) + adapter.down.matrix() @ up
        constant = adapter.down.bias @ up + adapter.up.bias
        make: Any = nn.Conv2d if self.is_image else nn.Linear
        merged: nn.Linear | nn.Conv2d = make(**sizes_of(layer)).to(layer.weight)
        rows = layer.weight.flatten(1)
        merged.weight.copy_((change.T @ rows).view_as(layer.weight))
        assert merged.bias is not None
        merged.bias.copy_(constant if layer.bias is None else layer.bias @ change + constant)
        return merged

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the layer's inputs to its adapted outputs, and count the call."""
        adapter = self.adapters[self.called % self.calls]
        self.called += 1
        return cast(Tensor, adapter(self.layer(inputs), self.is_image))
