"""GL⁺(n) and SL(n) by their polar decomposition: coordinates, Haar measure and samples.

    g = P r,   P = (g gᵀ)^½ symmetric positive definite,   r = P⁻¹ g a rotation

exp reaches only a part of these groups: diag(−2, −½) in SL(2) has no real logarithm. But P has
one, r has one, and the decomposition is unique, so log P and log r are coordinates of every g.

    dμ(g) = |det S|^(−(n+1)/2) dS dr,   S = g gᵀ

is Haar's measure, of the left and of the right.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smallfry.errors import UsageError
from smallfry.layers.group_conv import Samples

__all__ = [
    "GL",
    "SL",
    "angle",
    "log_rotation",
    "map_eigenvalues",
    "polar",
    "rotations",
    "sample_rotations",
    "symmetric",
]

FLAT = 1e-6  # |sin| of an angle that counts as zero: −0.0 would become 2π


def polar(g: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose matrices g = P r into a symmetric positive definite one and a rotation.

    Args:
        g: (…, n, n) of positive determinant.

    Returns:
        P and r, (…, n, n) each.

    Example:
        >>> P, r = polar(torch.diag(torch.tensor([-2.0, -0.5])))
        >>> P.diagonal().tolist(), (r + 0.0).tolist()
        ([2.0, 0.5], [[-1.0, 0.0], [0.0, -1.0]])
    """
    u, values, vh = torch.linalg.svd(g)
    return (u * values[..., None, :]) @ u.mT, u @ vh


def map_eigenvalues(symmetric_matrices: Tensor, function: str) -> Tensor:
    """Apply exp or log to symmetric matrices (…, n, n).

    Example:
        >>> map_eigenvalues(torch.zeros(2, 2), "exp").tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    values, vectors = torch.linalg.eigh(symmetric_matrices)
    mapped = {"exp": torch.exp, "log": torch.log}[function](values)
    found: Tensor = (vectors * mapped[..., None, :]) @ vectors.mT
    return found


def angle(r: Tensor) -> Tensor:
    """Compute the angles in [0, 2π) of plane rotations (…, 2, 2)."""
    sine = torch.where(r[..., 1, 0].abs() < FLAT, 0.0, r[..., 1, 0])
    found: Tensor = torch.atan2(sine, r[..., 0, 0]).remainder(2 * math.pi)
    return found


def log_rotation(r: Tensor) -> Tensor:
    """Compute the antisymmetric logarithms of rotations (…, n, n), n ≥ 3.

    A rotation by π in some plane has several, and the one found there need not be real.
    """
    even, odd = (r + r.mT) / 2, (r - r.mT) / 2
    # both parts commute, so a combination of them that is Hermitian has their eigenvectors
    _, vectors = torch.linalg.eigh(0.6 * even + 0.8j * odd)
    moved = (vectors.conj() * (r.to(vectors.dtype) @ vectors)).sum(-2)
    found: Tensor = ((vectors * (1j * moved.angle())[..., None, :]) @ vectors.mH).real
    return found


def symmetric(coordinates: Tensor, n: int) -> Tensor:
    """Build symmetric matrices (…, n, n) from coordinates in an orthonormal basis.

    Args:
        coordinates: (…, n (n + 1) / 2), the upper triangle row by row; or one fewer for a trace of
            zero: those off the diagonal, then the diagonal's.
        n: Rows.

    Example:
        >>> symmetric(torch.tensor([0.0, 1.0, 0.0]), 2).diagonal().tolist()
        [0.0, 0.0]
    """
    upper = torch.triu_indices(n, n).tolist()
    found = coordinates.new_zeros(*coordinates.shape[:-1], n, n)
    if coordinates.shape[-1] == len(upper[0]):
        for k, (i, j) in enumerate(zip(*upper, strict=True)):
            value = coordinates[..., k]
            found[..., i, j] = found[..., j, i] = value if i == j else value / math.sqrt(2)
        return found
    pairs = [(i, j) for i, j in zip(*upper, strict=True) if i != j]
    for k, (i, j) in enumerate(pairs):
        found[..., i, j] = found[..., j, i] = coordinates[..., k] / math.sqrt(2)
    diagonal = coordinates[..., len(pairs) :] @ _traceless(n).to(coordinates)
    return found + torch.diag_embed(diagonal)


def _traceless(n: int) -> Tensor:
    """Return an orthonormal basis (n − 1, n) of the vectors of sum zero (Helmert's)."""
    rows = torch.zeros(n - 1, n, dtype=torch.float64)
    for k in range(1, n):
        rows[k - 1, :k], rows[k - 1, k] = 1.0, -float(k)
        rows[k - 1] /= math.sqrt(k * (k + 1))
    return rows


def sample_rotations(count: int, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw rotations (count, n, n) from Haar's measure of SO(n), in float64.

    QR of Gaussian matrices, made unique by the signs of R's diagonal; a column is turned where the
    determinant is negative.
    """
    noise = torch.randn(count, n, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    flip = torch.ones(count, n, dtype=torch.float64)
    flip[:, 0] = torch.linalg.det(q).sign()
    found: Tensor = q * flip[..., None, :]
    return found


def rotations(count: int, offset: float = 0.0) -> Samples:
    """Return plane rotations by 2π i / count + offset, in float64; quarter turns are exact.

    Args:
        count: How many.
        offset: Angle of the first, in radians.

    Example:
        >>> rotations(4).elements[1].tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """
    turn = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count + offset
    cos, sin = (each.where(each.abs() > 1e-15, 0.0) for each in (turn.cos(), turn.sin()))
    elements = torch.stack([cos, -sin, sin, cos], dim=-1).reshape(-1, 2, 2) + 0.0
    return Samples(elements, elements.mT.contiguous())


@dataclass(frozen=True)
class GL:
    """GL⁺(n), the matrices of positive determinant.

    Samples are exp(X/2) r: X Gaussian among the symmetric matrices, r from Haar's measure of the
    rotations. So they are a window around the rotations, not samples of Haar's measure.

    Args:
        n: Rows.
        variance: Of each coordinate of X.

    Raises:
        UsageError: A value out of range.

    Example:
        >>> elements, inverses = GL().sample(5, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(elements @ inverses, torch.eye(2, dtype=torch.float64)))
        True
    """

    n: int = 2
    variance: float = 0.1

    def __post_init__(self) -> None:
        if self.n < 2 or not 0 <= self.variance <= 10:
            raise UsageError(
                f"a matrix group has n ≥ 2 and a variance of 0 to 10, got n = {self.n} and a "
                f"variance of {self.variance}"
            )

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return self.n**2

    @property
    def _symmetric(self) -> int:
        return self.n * (self.n + 1) // 2

    def coordinates(self, elements: Tensor) -> Tensor:
        """Compute coordinates (…, n²): log P by rows of its upper triangle, then log r.

        Off the diagonal of log P they are multiplied with √2. Of log r they are the entries below
        its diagonal; for n = 2 the angle in [0, 2π).
        """
        log_p, turn = _logs(elements)
        rows, columns = torch.triu_indices(self.n, self.n).tolist()
        scale = log_p.new_tensor(
            [1.0 if i == j else math.sqrt(2) for i, j in zip(rows, columns, strict=True)]
        )
        return torch.cat([log_p[..., rows, columns] * scale, turn], dim=-1)

    def mask(self, places: Tensor, coordinates: Tensor) -> Tensor:
        """Compute sigmoid(2 (1 − norm of places and coordinates)), (…)."""
        norms = torch.cat([places, coordinates], dim=-1).norm(dim=-1)
        return torch.sigmoid(2 * (1 - norms))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Samples:
        """Draw elements and their inverses, in float64 and without inverting a matrix."""
        noise = torch.randn(count, self._symmetric, generator=generator, dtype=torch.float64)
        half = symmetric(noise * math.sqrt(self.variance), self.n) / 2
        if self.n == 2:
            first = float(torch.rand((), generator=generator, dtype=torch.float64))
            r = rotations(count, 2 * math.pi * first).elements
        else:
            r = sample_rotations(count, self.n, generator)
        return Samples(map_eigenvalues(half, "exp") @ r, r.mT @ map_eigenvalues(-half, "exp"))


@dataclass(frozen=True)
class SL(GL):
    """SL(n), the matrices of determinant one; see ``GL``.

    Example:
        >>> g = torch.diag(torch.tensor([-2.0, -0.5], dtype=torch.float64))
        >>> [round(value, 6) for value in SL().coordinates(g).tolist()]  # 0, π, √2 ln 2
        [0.0, 3.141593, 0.980258]
    """

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return self.n**2 - 1

    @property
    def _symmetric(self) -> int:
        return self.n * (self.n + 1) // 2 - 1

    def coordinates(self, elements: Tensor) -> Tensor:
        """Compute coordinates (…, n² − 1): √2 log P off the diagonal, log r, log P's diagonal."""
        log_p, turn = _logs(elements)
        rows, columns = torch.triu_indices(self.n, self.n, 1).tolist()
        diagonal = log_p.diagonal(dim1=-2, dim2=-1) @ _traceless(self.n).to(log_p).mT
        return torch.cat([log_p[..., rows, columns] * math.sqrt(2), turn, diagonal], dim=-1)

    def mask(self, places: Tensor, coordinates: Tensor) -> Tensor:
        """Return 1 inside the unit disc and 0 outside, (…)."""
        inside: Tensor = places.norm(dim=-1) <= 1
        return inside.to(places)


def _logs(elements: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log P, (…, n, n), and the coordinates of log r, (…, n (n − 1) / 2)."""
    n = elements.shape[-1]
    p, r = polar(elements)
    if n == 2:
        return map_eigenvalues(p, "log"), angle(r)[..., None]
    rows, columns = torch.tril_indices(n, n, -1).tolist()
    return map_eigenvalues(p, "log"), log_rotation(r)[..., rows, columns]
