"""A few leading singular triplets of a linear map that is known only by its products.

Block Golub-Kahan bidiagonalisation with full reorthogonalisation (Golub and Kahan 1965; Golub,
Luk and Overton 1981): right and left bases grow in turns, each new block is what the map makes of
the last one, orthogonal to all before, and the small matrix between the bases has the leading
singular values of the map. A block of as many vectors as triplets are wanted finds repeated values.

Vectors may be given by coefficients of something that isn't orthonormal: a space says with its
``metric`` what ⟨x, y⟩ = x · metric(y) is. Batches of maps go together, the leading dimension.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

_TINY = torch.finfo(torch.float64).tiny
Metric = Callable[[Tensor], Tensor]


class Map(Protocol):
    """A linear map, its adjoint, and the inner products on both sides.

    Vectors are rows (groups, count, size). What a map is applied to is the dual of a vector, its
    ``metric``.
    """

    @property
    def cancelled(self) -> float:
        """Norms below that, relative to those of absolute coefficients, are rounding."""
        ...

    def apply(self, dual: Tensor) -> Tensor:
        """What the map makes of right vectors, in left coefficients."""
        ...

    def adjoint(self, dual: Tensor) -> Tensor:
        """What the adjoint makes of left vectors, in right coefficients."""
        ...

    def left_metric(self, x: Tensor) -> Tensor:
        """Duals of left vectors."""
        ...

    def right_metric(self, x: Tensor) -> Tensor:
        """Duals of right vectors."""
        ...


class Triplets(NamedTuple):
    """Singular values with unit vectors; what there is not has value and vectors zero."""

    values: Tensor  # (groups, rank), descending, float64
    left: Tensor  # (groups, rank, left size)
    right: Tensor  # (groups, rank, right size)
    residual: float  # largest ‖Zᵀu − σv‖ / σ₁

    def leading(self, rank: int) -> "Triplets":
        """The first of them, filled up with zeros."""
        short = (0, 0, 0, max(0, rank - self.values.shape[1]))
        values, left, right = (
            nn.functional.pad(part[:, :rank], short)
            for part in (self.values[:, :, None], self.left, self.right)
        )
        return Triplets(values[:, :, 0], left, right, self.residual)

    def turned(self, toward: Tensor, tolerance: float) -> "Triplets":
        """The same, but where the largest value is repeated, with the first pair turned.

        Args:
            toward: Dual of a right vector, (groups, right size): the first right vector becomes
                the nearest to it, with its sign.
            tolerance: Relative distance of values that count as equal.
        """
        left, right = self.left.clone(), self.right.clone()
        parts = (self.right @ toward[:, :, None])[:, :, 0]
        for h, part in enumerate(parts):
            equal = max(1, int((self.values[h] >= self.values[h, :1] * (1 - tolerance)).sum()))
            wanted = part[:equal]
            if not bool(wanted.any()):
                continue
            # the reflection that takes the first axis to where the wanted vector lies
            axis = wanted / wanted.norm()
            mirror = axis.clone()
            mirror[0] += torch.where(axis[0] < 0, -1.0, 1.0)
            turn = torch.eye(equal).to(axis) - 2 * mirror.outer(mirror) / mirror.dot(mirror)
            turn = torch.where(axis[0] < 0, turn, -turn)
            left[h, :equal], right[h, :equal] = turn @ left[h, :equal], turn @ right[h, :equal]
        return Triplets(self.values, left, right, self.residual)


class _Noise(NamedTuple):
    """What is too small to be more than rounding."""

    scale: Tensor  # (groups, 1), of images of unit vectors
    epsilon: float
    cancelled: float

    def filtered(
        self, lengths: Tensor, x: Tensor, metric: Metric, before: Tensor | float = 0.0
    ) -> Tensor:
        """Lengths of x (groups, count), zero where that is rounding.

        It is so beside the image's scale, beside the vector ``before`` a basis was taken out, and
        beside the vector's own coefficients, which a semi-definite metric may cancel.
        """
        own = self.cancelled * _norms(x.abs(), metric)
        small = torch.maximum(own, self.epsilon * (self.scale + before))
        return torch.where(lengths > small, lengths, 0.0)


class _Basis(NamedTuple):
    vectors: Tensor  # (groups, count, size)
    duals: Tensor

    def without(self, x: Tensor) -> Tensor:
        """What is left of x orthogonally to the basis."""
        return x - (x @ self.duals.transpose(1, 2)) @ self.vectors

    def joined(self, other: "_Basis") -> "_Basis":
        return _Basis(
            torch.cat([self.vectors, other.vectors], 1), torch.cat([self.duals, other.duals], 1)
        )


def golub_kahan(
    operator: Map,
    start: Tensor,
    rank: int,
    tolerance: float,
    locked: Triplets | None = None,
    steps: int = 24,
    restarts: int = 4,
) -> Triplets:
    """The leading triplets of a map.

    Args:
        operator: The map Z.
        start: (groups, block, right size), the first right vectors, block ≥ 1.
        rank: Triplets wanted.
        tolerance: On ‖Zᵀu − σv‖ / σ₁ of each.
        locked: Triplets already known: those that come after them are looked for.
        steps: Blocks in a basis, after which the search starts again from the best vectors.
        restarts: How often; the last result is returned with its residual, converged or not.

    Returns:
        ``rank`` triplets, without the locked ones.
    """
    found = _search(operator, start, rank, tolerance, locked, steps)
    for _ in range(restarts):
        if found.residual <= tolerance:
            break
        found = _search(operator, found.right, rank, tolerance, locked, steps)
    return found


def _search(
    operator: Map,
    start: Tensor,
    rank: int,
    tolerance: float,
    locked: Triplets | None,
    steps: int,
) -> Triplets:
    """One bidiagonalisation, of at most ``steps`` blocks."""
    known = 0 if locked is None else locked.values.shape[1]
    right = _basis(start[:, :0] if locked is None else locked.right, operator.right_metric)
    epsilon = 100 * torch.finfo(start.dtype).eps
    noise = _Noise(start.new_zeros(len(start), 1), epsilon, operator.cancelled)
    block = _orthonormal(start, right, operator.right_metric, noise)
    right = right.joined(block)
    image = operator.apply(block.duals)
    left = _basis(image[:, :0] if locked is None else locked.left, operator.left_metric)
    scale = _norms(image, operator.left_metric).amax(1, keepdim=True)
    if locked is not None:
        scale = torch.maximum(scale, locked.values[:, :1].to(scale))
    noise = noise._replace(scale=scale)
    small = image.new_zeros(len(image), 0, 0, dtype=torch.float64)
    for step in range(1, steps + 1):
        block = _orthonormal(image, left, operator.left_metric, noise)
        left = left.joined(block)
        small = _bordered(small, (left.duals[:, known:] @ image.transpose(1, 2)).double())
        x, values, yt = torch.linalg.svd(small, full_matrices=False)
        # Zᵀu lies in the right basis but for what the newest left block adds
        rest = right.without(right.without(operator.adjoint(block.duals)))
        lengths = noise.filtered(_norms(rest, operator.right_metric), rest, operator.right_metric)
        corner = x[:, -rest.shape[1] :, :rank].abs()
        outside = (corner * lengths.double()[:, :, None]).sum(1)
        reference = torch.maximum(values[:, :1], scale.double())
        residual = float((outside / reference.clamp_min(_TINY)).max())
        exhausted = not bool(lengths.any())
        if exhausted or step == steps or (residual <= tolerance and values.shape[1] >= rank):
            break
        block = _orthonormal(rest, right, operator.right_metric, noise)
        right = right.joined(block)
        image = operator.apply(block.duals)
    u = x[:, :, :rank].transpose(1, 2).to(image) @ left.vectors[:, known:]
    v = yt[:, :rank].to(image) @ right.vectors[:, known:]
    return Triplets(values, u, v, residual).leading(rank)


def _basis(vectors: Tensor, metric: Metric) -> _Basis:
    return _Basis(vectors, metric(vectors))


def _orthonormal(x: Tensor, basis: _Basis, metric: Metric, noise: _Noise) -> _Basis:
    """An orthonormal basis of what x adds to a basis; zeros where that is only rounding."""
    added = _Basis(x[:, :0], x[:, :0])
    for number in range(x.shape[1]):
        vector = x[:, number : number + 1]
        before = _norms(vector.abs(), metric)
        for _ in range(2):  # twice is enough
            vector = added.without(basis.without(vector))
        length = noise.filtered(_norms(vector, metric), vector, metric, before)
        vector = vector / torch.where(length > 0, length, torch.inf)[:, :, None]
        added = added.joined(_Basis(vector, metric(vector)))
    return added


def _norms(x: Tensor, metric: Metric) -> Tensor:
    return (x * metric(x)).sum(2).clamp_min(0).sqrt()


def _bordered(small: Tensor, columns: Tensor) -> Tensor:
    """A matrix with rows of zeros below, and further columns."""
    below = columns.shape[1] - small.shape[1]
    return torch.cat([nn.functional.pad(small, (0, 0, 0, below)), columns], 2)
