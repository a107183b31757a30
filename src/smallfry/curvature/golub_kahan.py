"""Leading singular triplets of a linear map given by its products.

Block Golub-Kahan bidiagonalisation with full reorthogonalisation (Golub and Kahan 1965; Golub,
Luk and Overton 1981): right and left bases grow in turns, each new block is what the map makes of
the last one, orthogonal to all before, and the small matrix between the bases has the leading
singular values of the map. A block of as many vectors as triplets are wanted finds repeated values.

Vectors may be given by coefficients in a basis that isn't orthonormal: the ``metric`` of a space
defines ⟨x, y⟩ = x · metric(y). Batches of maps go together, the leading dimension.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

_TINY = torch.finfo(torch.float64).tiny
Metric = Callable[[Tensor], Tensor]


class Map(Protocol):
    """Linear map with its adjoint and the inner products on both sides.

    Vectors are rows (groups, count, size). What a map is applied to is the dual of a vector, its
    ``metric``.
    """

    @property
    def cancelled(self) -> float:
        """Relative length below which a vector is rounding error."""
        ...

    def left_bound(self, x: Tensor) -> Tensor:
        """Bound the lengths of left vectors without cancellation, (groups, count)."""
        ...

    def right_bound(self, x: Tensor) -> Tensor:
        """Bound the lengths of right vectors without cancellation."""
        ...

    def apply(self, dual: Tensor) -> Tensor:
        """Apply the map to right vectors, giving left coefficients."""
        ...

    def adjoint(self, dual: Tensor) -> Tensor:
        """Apply the adjoint to left vectors, giving right coefficients."""
        ...

    def left_metric(self, x: Tensor) -> Tensor:
        """Return the duals of left vectors."""
        ...

    def right_metric(self, x: Tensor) -> Tensor:
        """Return the duals of right vectors."""
        ...


class Triplets(NamedTuple):
    """Singular values with unit vectors; missing triplets are zero."""

    values: Tensor  # (groups, rank), descending, float64
    left: Tensor  # (groups, rank, left size)
    right: Tensor  # (groups, rank, right size)
    residual: float  # largest ‖Zᵀu − σv‖ / σ₁

    def leading(self, rank: int) -> "Triplets":
        """Return the first triplets, padded with zeros."""
        short = (0, 0, 0, max(0, rank - self.values.shape[1]))
        values, left, right = (
            nn.functional.pad(part[:, :rank], short)
            for part in (self.values[:, :, None], self.left, self.right)
        )
        return Triplets(values[:, :, 0], left, right, self.residual)

    def turned(self, toward: Tensor, tolerance: float) -> "Triplets":
        """Rotate the first pair where the largest value is repeated.

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


class _Side(NamedTuple):
    """Orthonormal vectors of one side, and its rounding threshold.

    Rounding is measured by the images' size, by the vector that a basis was taken out of, and by
    the vector's own coefficients, which a semi-definite metric may cancel.
    """

    vectors: Tensor  # (groups, count, size)
    duals: Tensor
    metric: Metric
    bound: Metric
    scale: Tensor  # (groups, 1), of images of unit vectors
    cancelled: float

    def without(self, x: Tensor) -> Tensor:
        """Project x onto the orthogonal complement of the vectors, twice for accuracy."""
        for _ in range(2):
            x = x - (x @ self.duals.transpose(1, 2)) @ self.vectors
        return x

    def joined(self, vectors: Tensor, duals: Tensor) -> "_Side":
        """Append vectors."""
        vectors = torch.cat([self.vectors, vectors], 1)
        return self._replace(vectors=vectors, duals=torch.cat([self.duals, duals], 1))

    def grown(self, x: Tensor) -> tuple["_Side", Tensor]:
        """Append the directions that x adds, zero where that is only rounding.

        Returns:
            The side, and x orthogonally to it before as combinations of the new directions,
            (groups, count, count).
        """
        epsilon = 100 * torch.finfo(x.dtype).eps
        side, known, count = self, self.vectors.shape[1], x.shape[1]
        triangle = x.new_zeros(len(x), count, count)
        for number in range(count):
            vector = x[:, number : number + 1]
            before = self.bound(vector)
            vector = self.without(vector)
            if number:
                fresh = side.duals[:, known:].transpose(1, 2)
                for _ in range(2):
                    part = vector @ fresh
                    vector = vector - part @ side.vectors[:, known:]
                    triangle[:, number : number + 1, :number] += part
            dual = self.metric(vector)
            length = (vector * dual).sum(2).clamp_min(0).sqrt()
            own = self.cancelled * self.bound(vector)
            small = torch.maximum(own, epsilon * (self.scale + before))
            length = torch.where(length > small, length, 0.0)
            triangle[:, number, number] = length[:, 0]
            divisor = torch.where(length > 0, length, torch.inf)[:, :, None]
            side = side.joined(vector / divisor, dual / divisor)
        return side, triangle


def golub_kahan(
    operator: Map,
    start: Tensor,
    rank: int,
    tolerance: float,
    locked: Triplets | None = None,
    steps: int = 24,
    restarts: int = 4,
) -> Triplets:
    """Compute the leading triplets of a map.

    Args:
        operator: The map Z.
        start: (groups, block, right size), the first right vectors, block ≥ 1.
        rank: Triplets wanted.
        tolerance: On ‖Zᵀu − σv‖ / σ₁ of each.
        locked: Triplets already known: those that come after them are looked for.
        steps: Blocks in a basis, after which the search starts again from the best vectors.
        restarts: Maximum number of restarts; the last result is returned even if not converged.

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
    """Run one bidiagonalisation of at most ``steps`` blocks."""
    known = 0 if locked is None else locked.values.shape[1]
    block, none = start.shape[1], start.new_zeros(len(start), 1)
    first = start[:, :0] if locked is None else locked.right
    right = _side(first, operator.right_metric, operator.right_bound, none, operator)
    right, _ = right.grown(start)
    image = operator.apply(right.duals[:, known:])
    scale = (image * operator.left_metric(image)).sum(2).clamp_min(0).sqrt().amax(1, keepdim=True)
    if locked is not None:
        scale = torch.maximum(scale, locked.values[:, :1].to(scale))
    first = image[:, :0] if locked is None else locked.left
    left = _side(first, operator.left_metric, operator.left_bound, scale, operator)
    right = right._replace(scale=scale)
    small = image.new_zeros(len(image), 0, 0, dtype=torch.float64)
    for step in range(1, steps + 1):
        left, _ = left.grown(image)
        small = _bordered(small, (left.duals[:, known:] @ image.transpose(1, 2)).double())
        x, values, yt = torch.linalg.svd(small, full_matrices=False)
        # Zᵀu lies in the right basis but for what the newest left vectors add
        wider, rest = right.grown(operator.adjoint(left.duals[:, -block:]))
        outside = (x[:, -block:, :rank].transpose(1, 2) @ rest.double()).norm(dim=2)
        reference = torch.maximum(values[:, :1], scale.double())
        residual = float((outside / reference.clamp_min(_TINY)).max())
        done = residual <= tolerance and values.shape[1] >= rank
        if done or step == steps or not bool(rest.any()):
            break
        right = wider
        image = operator.apply(right.duals[:, -block:])
    u = x[:, :, :rank].transpose(1, 2).to(image) @ left.vectors[:, known:]
    v = yt[:, :rank].to(image) @ right.vectors[:, known:]
    return Triplets(values, u, v, residual).leading(rank)


def _side(vectors: Tensor, metric: Metric, bound: Metric, scale: Tensor, operator: Map) -> _Side:
    return _Side(vectors, metric(vectors), metric, bound, scale, operator.cancelled)


def _bordered(small: Tensor, columns: Tensor) -> Tensor:
    """Pad a matrix with zero rows below, and append columns."""
    below = columns.shape[1] - small.shape[1]
    return torch.cat([nn.functional.pad(small, (0, 0, 0, below)), columns], 2)
