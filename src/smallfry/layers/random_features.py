"""Layers from random features (SNNK): f(w·x + b) ≈ Φ(x)·Ψ(w, b), of which Ψ alone is stored.

With rows g_j of a fixed Gaussian matrix G (m × inputs), a² = 1 for exp and i for sin and cos,

    Φ_j(x) = c_j exp(√(1+4M) a g_j·x − a²‖x‖²/2) / √m,   c_j = (1+4M)^(inputs/4) exp(−M ‖g_j‖²)

and Φ_j(w) gives E Σ_j Φ_j(x) Φ_j(w) = exp(a² w·x) for every M ≥ 0; b multiplies Ψ by exp(a² b).
The variance grows as exp(‖x‖² + ‖w‖²): inputs of norm 1 or less are meant. For ReLU,

    Φ(x) = ReLU(G (x, 1)) / √m,        Ψ starts at ReLU(G (w, b)) / √m

whose expectation is the arc-cosine kernel of (x, 1) and (w, b), not ReLU(w·x + b): another layer,
to be fitted or trained. Sehanobish et al., *Scalable Neural Network Kernels*, ICLR 2024.
"""

import math
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from smallfry.io.json import Plain

Kernel = Literal["relu", "exp", "sin", "cos"]
MOST_FEATURES = 2**20
SETTINGS = {"features", "kernel", "seed", "variance"}


def gaussian_rows(features: int, inputs: int, seed: int) -> Tensor:
    """Draw standard normal rows, orthogonal in blocks of ``inputs``, which lowers the variance.

    Args:
        features: Rows, m.
        inputs: Columns.
        seed: Random seed; the rows follow from it.

    Returns:
        (features, inputs), float64, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-features // inputs)
    normal = torch.randn(blocks, inputs, inputs, generator=generator, dtype=torch.float64)
    directions, upper = torch.linalg.qr(normal)
    signs = upper.diagonal(dim1=1, dim2=2).sign()  # so that directions are uniformly distributed
    others = torch.randn(features, inputs, generator=generator, dtype=torch.float64)
    lengths: Tensor = others.norm(dim=1, keepdim=True)
    rows: Tensor = (directions * signs[:, None]).transpose(1, 2).flatten(0, 1)[:features]
    return rows * lengths


def relu_features(rows: Tensor, projection: Tensor) -> Tensor:
    """Compute ReLU(G x) / √m, (..., m), of rows (..., inputs) with G (m, inputs)."""
    return (rows @ projection.T).relu() / math.sqrt(len(projection))


def exponential_features(
    rows: Tensor, projection: Tensor, root: complex = 1.0, variance: float = 0.0
) -> Tensor:
    """Compute Φ for exp(a² w·x), (..., m); complex for a complex a.

    Args:
        rows: (..., inputs).
        projection: G, (m, inputs).
        root: a.
        variance: M; estimates are unbiased for every M ≥ 0.
    """
    m, inputs = projection.shape
    stretch = 1 + 4 * variance
    exponent: Tensor = math.sqrt(stretch) * root * (rows @ projection.T)
    exponent = exponent - root**2 / 2 * rows.square().sum(-1, keepdim=True)
    exponent = exponent - variance * projection.square().sum(1) + inputs / 4 * math.log(stretch)
    return exponent.exp() / math.sqrt(m)


def ridge_solution(gram: Tensor, products: Tensor, ridge: float = 1e-6) -> Tensor:
    """Solve the normal equations of least squares, (features, outputs).

    Args:
        gram: Φᵀ Φ, (features, features), summed over rows.
        products: Φᵀ Y, (features, outputs).
        ridge: Penalty, relative to the mean of the diagonal of ``gram``.
    """
    penalty = ridge * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    solution: Tensor = torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), products)
    return solution


class SNNKLinear(nn.Module):
    """Layer Ψ Φ(x) in place of a linear layer with its activation.

    The projection G follows from the seed: it is no parameter, and not in checkpoints, but in
    graphs of exports.

    Args:
        inputs: Inputs of the linear layer.
        outputs: Outputs.
        features: Random features, m; there are 2 m real ones for sin and cos.
        kernel: The activation, f.
        seed: Seed of the projection.
        variance: M, of kernels other than relu.
        bias: True adds a bias to the outputs, as of a linear layer after the activation.

    Raises:
        ValueError: Numbers out of range, or an unknown kernel.

    Example:
        >>> import torch
        >>> from smallfry.layers.random_features import SNNKLinear
        >>> layer = SNNKLinear.from_dense(torch.nn.Linear(256, 256), features=64)
        >>> layer(torch.zeros(2, 5, 256)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 5, 256]), 16384)
    """

    projection: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        features: int,
        kernel: Kernel = "relu",
        seed: int = 0,
        variance: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _require(features, kernel, seed, variance)
        self.in_features, self.out_features = inputs, outputs
        self.kernel, self.variance = kernel, variance
        columns = inputs + (kernel == "relu")
        rows = gaussian_rows(features, columns, seed).to(torch.get_default_dtype())
        self.register_buffer("projection", rows, persistent=False)
        is_complex = kernel in ("sin", "cos")
        self.psi = nn.Linear(features * (1 + is_complex), outputs, bias=bias)

    @property
    def weight(self) -> Tensor:
        """Ψ, of the device and type of the linear layer's weight, and of another shape."""
        return self.psi.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the outputs."""
        return self.psi.bias

    @classmethod
    def from_dense(cls, layer: nn.Linear, **settings: Plain) -> Self:
        """Create the layer that estimates f of a linear layer; for relu see this module.

        Args:
            layer: Linear layer before the activation f.
            settings: ``features``, and optionally ``kernel``, ``seed`` and ``variance``.

        Raises:
            ValueError: Other settings, or values out of range.
        """
        if not {"features"} <= set(settings) <= SETTINGS:
            raise ValueError(
                f"random features need features, and may have kernel, seed and variance; got "
                f"{settings}"
            )
        given: Any = settings
        made = cls(layer.in_features, layer.out_features, **given).to(layer.weight)
        with torch.no_grad():
            made.psi.weight.copy_(made._start(layer.weight, layer.bias))
        return made

    def _start(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute Ψ(w, b) of all outputs, (outputs, real features)."""
        shift = weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]
        if self.kernel == "relu":
            return relu_features(torch.cat([weight, shift], dim=1), self.projection)
        root = _root(self.kernel)
        found = exponential_features(weight, self.projection, root, self.variance)
        found = found * (root**2 * shift).exp()
        if self.kernel == "exp":
            return found
        parts = (found.real, -found.imag) if self.kernel == "cos" else (found.imag, found.real)
        return torch.cat(parts, dim=1)

    def features(self, inputs: Tensor) -> Tensor:
        """Compute Φ, real: (..., m), or (..., 2 m) for sin and cos."""
        if self.kernel == "relu":
            own, constant = self.projection[:, :-1], self.projection[:, -1]
            raised = nn.functional.linear(inputs, own, constant).relu()
            return raised / math.sqrt(len(self.projection))
        found = exponential_features(inputs, self.projection, _root(self.kernel), self.variance)
        return found if self.kernel == "exp" else torch.cat([found.real, found.imag], dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return cast(Tensor, self.psi(self.features(inputs)))


@torch.no_grad()
def bundle(layer: SNNKLinear, after: nn.Linear) -> SNNKLinear:
    """Merge the linear layer after random features into Ψ.

    Args:
        layer: Random features, without a bias; left as they are.
        after: Layer of their outputs.

    Example:
        >>> import torch
        >>> from smallfry.layers.random_features import SNNKLinear, bundle
        >>> one = bundle(SNNKLinear(8, 32, features=16), torch.nn.Linear(32, 4))
        >>> sum(p.numel() for p in one.parameters())
        68
    """
    features, m = layer.psi.in_features, len(layer.projection)
    made = SNNKLinear(
        layer.in_features, after.out_features, m, layer.kernel, 0, layer.variance, bias=True
    ).to(layer.psi.weight)
    made.projection.copy_(layer.projection)
    assert made.psi.in_features == features
    made.psi.weight.copy_(after.weight @ layer.psi.weight)
    made.psi.bias.copy_(0 if after.bias is None else after.bias)
    return made


def _root(kernel: Kernel) -> complex:
    """Return a, with a² = 1 for exp and a² = i for sin and cos."""
    return 1.0 if kernel == "exp" else complex(math.sqrt(0.5), math.sqrt(0.5))


def _require(features: Any, kernel: Any, seed: Any, variance: Any) -> None:
    if type(features) is not int or not 1 <= features <= MOST_FEATURES:
        raise ValueError(f"features is a number from 1 to {MOST_FEATURES}, got {features!r}")
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel is one of {', '.join(get_args(Kernel))}, got {kernel!r}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed is a number from 0, got {seed!r}")
    if type(variance) not in (int, float) or not 0 <= variance < 100:
        raise ValueError(f"variance is a number from 0 to below 100, got {variance!r}")
