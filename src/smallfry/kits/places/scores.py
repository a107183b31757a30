"""Scores of places, their recall and precision, and two plain baselines."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Curve",
    "absolute_difference",
    "place_scores",
    "precision_recall",
    "recall_at",
    "ridge",
]

Floats = NDArray[np.float64]
NOWHERE = -1  # the place of a neuron that never fired
PENALTY = 100.0  # of the ridge classifier, on inputs of variance about 1


class Curve(NamedTuple):
    """Precision and recall over the confidence from which a match is taken."""

    recall: Floats
    precision: Floats

    @property
    def area(self) -> float:
        """Area under the curve, by steps: the mean of precisions over right matches."""
        rises = np.diff(self.recall, prepend=0.0)
        return float((rises * self.precision).sum())

    @property
    def recall_at_full_precision(self) -> float:
        """Greatest recall without a wrong match."""
        right = self.recall[self.precision >= 1.0]
        return float(right.max()) if len(right) else 0.0


def place_scores(
    responses: NDArray[np.int64],
    assignment: NDArray[np.int64],
    places: int,
    silenced: NDArray[np.bool_] | None = None,
) -> Floats:
    """Compute the mean spike count of each place's neurons; silenced ones count 0, and divide.

    Args:
        responses: Spike counts (images, neurons).
        assignment: (neurons,), the place of each, or -1.
        places: Number of places.
        silenced: (neurons,), True for hyperactive ones.

    Returns:
        (images, places); 0 for places without neurons.
    """
    counts = responses if silenced is None else responses * ~silenced
    table = np.zeros((len(assignment), places))
    known = np.flatnonzero(assignment != NOWHERE)
    table[known, assignment[known]] = 1.0
    result: Floats = counts @ table / np.maximum(table.sum(axis=0), 1.0)
    return result


def recall_at(
    scores: Floats, truth: NDArray[np.int64], count: int = 1, tolerance: int = 0
) -> float:
    """Compute the share of queries with the true place among the best few.

    Of equal scores the place of the lower number comes first. A query that scores 0 everywhere has
    no match.

    Args:
        scores: (queries, places).
        truth: (queries,).
        count: Places that are looked at.
        tolerance: Places on either side that are right too.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    near = np.abs(best - truth[:, None]) <= tolerance
    matched = np.take_along_axis(scores, best, axis=1) != 0
    return float((near & matched).any(axis=1).mean()) if len(truth) else 0.0


def precision_recall(scores: Floats, truth: NDArray[np.int64]) -> Curve:
    """Compute precision and recall as the needed score falls; recall is over all queries.

    Args:
        scores: (queries, places); the best score is the confidence, and 0 is no match.
        truth: (queries,).
    """
    best, confidence = scores.argmax(axis=1), scores.max(axis=1)
    right = (best == truth) & (confidence != 0)
    order = np.argsort(-confidence, kind="stable")
    order = order[confidence[order] != 0]
    hits, values = np.cumsum(right[order]), confidence[order]
    last = np.append(values[1:] != values[:-1], True)[: len(values)]  # of equal confidences
    taken = np.arange(1, len(order) + 1)
    return Curve((hits / max(1, len(truth)))[last], (hits / taken)[last])


def absolute_difference(references: Floats, queries: Floats) -> Floats:
    """Score places by the negative mean absolute difference to the nearest traverse, above 0.

    Args:
        references: (traverses, places, pixels), patch-normalised.
        queries: (queries, pixels).

    Returns:
        (queries, places), 2 minus the difference: the greatest difference of inputs is 2.
    """
    each = [[np.abs(queries - one).mean(axis=1) for one in places] for places in references]
    result: Floats = 2.0 - np.array(each).min(axis=0).T
    return result


def ridge(references: Floats, queries: Floats, penalty: float = PENALTY) -> Floats:
    """Score places by a linear classifier with a quadratic penalty, fitted on all traverses.

    Arguments and result are those of ``absolute_difference``; scores may be negative.
    """
    traverses, places, pixels = references.shape
    inputs = references.reshape(-1, pixels)
    targets = np.tile(np.eye(places), (traverses, 1))
    centre = inputs.mean(axis=0)
    shifted = inputs - centre
    # the dual form: fewer images than pixels
    gram = shifted @ shifted.T + penalty * np.eye(len(inputs))
    dual = np.linalg.solve(gram, targets - targets.mean(axis=0))
    result: Floats = (queries - centre) @ shifted.T @ dual + targets.mean(axis=0)
    return result
