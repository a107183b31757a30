"""Partial differential equations on the unit square, solved by finite differences.

Darcy        −∇·(a ∇u) = f in the square, u = 0 on its border
Helmholtz    −Δu − k² u = 0, ∂u/∂n = g on y = 1 and 0 on the other sides

Arrays are (y, x), with the nodes on the border. Both solvers are of second order, and exact up to
rounding otherwise: the linear systems are solved directly (SciPy's SuperLU).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["gaussian_field", "solve_darcy", "solve_helmholtz"]

Array = NDArray[np.float64]


def gaussian_field(random: np.random.Generator, n: int, alpha: float = 2, tau: float = 3) -> Array:
    """Draw a Gaussian field (n, n) with the covariance (−Δ + τ²)^−α, ∂u/∂n = 0, and mean zero.

    Args:
        random: Random state.
        n: Points a side.
        alpha: Smoothness.
        tau: Inverse length.
    """
    from scipy.fft import idctn

    noise = random.standard_normal((n, n))
    k = np.arange(n)
    squares = np.pi**2 * (k[:, None] ** 2 + k**2)
    coefficients = noise * n * tau ** (alpha - 1) * (squares + tau**2) ** (-alpha / 2)
    coefficients[0, 0] = 0.0
    field: Array = idctn(coefficients, type=2, norm="ortho")
    return field


def solve_darcy(a: Array, f: float | Array = 1.0) -> Array:
    """Solve −∇·(a ∇u) = f, u = 0 on the border, by five-point finite volumes.

    The coefficient of a face is the arithmetic mean of its two nodes.

    Args:
        a: Coefficient at the nodes (n, n), positive.
        f: Right side, a number or (n, n).

    Returns:
        u (n, n).

    Raises:
        ValueError: ``a`` is not (n, n) with two nodes a side at least.

    Example:
        >>> float(solve_darcy(np.ones((5, 5)))[2, 2].round(4))
        0.0703
    """
    from scipy.sparse import diags
    from scipy.sparse.linalg import spsolve

    n = _side(a)
    h2, inner = 1 / (n - 1) ** 2, n - 2
    down, right = (a[:-1] + a[1:])[:, 1:-1] / 2, (a[:, :-1] + a[:, 1:])[1:-1] / 2
    centre = (down[:-1] + down[1:] + right[:, :-1] + right[:, 1:]).ravel()
    beside = np.zeros((inner, inner))
    beside[:, :-1] = -right[:, 1:-1]  # none across the end of a row
    below = -down[1:-1].ravel()
    side = beside.ravel()[:-1]
    wanted = np.broadcast_to(f, (n, n))[1:-1, 1:-1].ravel() * h2
    if inner < 2:  # no neighbours but the border
        return np.pad((wanted / centre).reshape(inner, inner), 1)
    matrix = diags([centre, side, side, below, below], [0, 1, -1, inner, -inner], format="csc")
    u = np.zeros((n, n))
    u[1:-1, 1:-1] = spsolve(matrix, wanted).reshape(inner, inner)
    return u


def _side(field: Array) -> int:
    """Return the nodes a side of a square grid."""
    shape = np.shape(field)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2:
        raise ValueError(f"expected numbers at the nodes (n, n), n ≥ 2, got shape {shape}")
    return int(shape[0])


def solve_helmholtz(k: float | Array, g: Callable[[Array], Array]) -> Array:
    """Solve −Δu − k² u = 0 with ∂u/∂n = g on y = 1, and 0 on the other sides.

    Args:
        k: Wave number at the nodes (n, n).
        g: Of x on the upper side, (n,).

    Returns:
        u (n, n), whose last row is y = 1.

    Raises:
        ValueError: ``k`` is not (n, n) with two nodes a side at least.
    """
    from scipy.sparse import diags, eye, kron
    from scipy.sparse.linalg import spsolve

    field = np.asarray(k, np.float64)
    n = _side(field)
    h = 1 / (n - 1)
    above, under = -np.ones(n - 1), -np.ones(n - 1)
    above[0], under[-1] = -2.0, -2.0  # ghost nodes mirror their neighbours
    line = diags([2 * np.ones(n), above, under], [0, 1, -1])
    matrix = kron(eye(n), line) + kron(line, eye(n)) - diags((field.ravel() * h) ** 2)
    wanted = np.zeros((n, n))
    wanted[-1] = 2 * h * g(np.linspace(0, 1, n))
    solved: Array = spsolve(matrix.tocsc(), wanted.ravel()).reshape(n, n)
    return solved
