"""Chow–Liu trees: maximum spanning trees of the variables' mutual information.

I(x_i; x_j) = Σ p(a, b) ln(p(a, b) / p(a)p(b)) from counts, over equal bins of the categories where
there are many. Source: Chow, Liu, IEEE Transactions on Information Theory 14 (3), 1968.
"""

import numpy as np
import torch
from numpy.typing import NDArray

BINS = 16
MOST_NUMBERS = 2**27  # of a one-hot table: 512 MiB
BLOCK = 64  # variables whose pairs with all others are counted at a time


def mutual_information(
    samples: NDArray[np.integer], categories: int, bins: int = BINS
) -> NDArray[np.float64]:
    """Estimate the mutual information of all pairs of variables, in nats.

    Args:
        samples: Values in 0 … categories − 1, (samples, variables). Of very many, evenly spread
            ones are used.
        categories: Number of values.
        bins: Bins of equal width, if there are more categories.

    Returns:
        (variables, variables), with entropies on the diagonal.
    """
    bins = min(bins, categories)
    size = samples.shape[1]
    most = max(1, MOST_NUMBERS // (size * bins))
    chosen = np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)
    binned = torch.from_numpy(samples[chosen].astype(np.int64) * bins // categories)
    hot = torch.zeros(len(chosen), size * bins)
    hot.scatter_(1, binned + bins * torch.arange(size), 1.0)
    marginal = hot.mean(dim=0, dtype=torch.float64).view(size, bins)
    found = torch.empty(size, size, dtype=torch.float64)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        counts = hot[:, start * bins : stop * bins].T @ hot  # below 2²⁴, so exact
        joint = (counts.double() / len(chosen)).view(stop - start, bins, size, bins)
        joint = joint.transpose(1, 2)
        independent = marginal[start:stop, None, :, None] * marginal[None, :, None, :]
        terms = torch.xlogy(joint, joint / independent.clamp(min=1e-300))
        found[start:stop] = terms.sum(dim=(2, 3))
    result: NDArray[np.float64] = found.numpy()
    return result


def spanning_tree(weights: NDArray[np.float64]) -> tuple[int, ...]:
    """Find the maximum spanning tree by Prim's algorithm, rooted in the middle of a longest path.

    Args:
        weights: Symmetric, (variables, variables).

    Returns:
        Parent of each variable, -1 for the root.

    Example:
        >>> import numpy as np
        >>> from smallfry.compress.coding.chow_liu import spanning_tree
        >>> spanning_tree(np.array([[0.0, 2, 1], [2, 0, 3], [1, 3, 0]]))
        (1, -1, 1)
    """
    size = len(weights)
    best, source = weights[0].copy(), np.zeros(size, int)
    best[0] = -np.inf
    edges: list[list[int]] = [[] for _ in range(size)]
    outside = np.arange(size) != 0
    for _ in range(size - 1):
        new = int(np.flatnonzero(outside)[best[outside].argmax()])
        edges[new].append(int(source[new]))
        edges[int(source[new])].append(new)
        outside[new] = False
        closer = outside & (weights[new] > best)
        best[closer], source[closer] = weights[new][closer], new
    end = _order(edges, 0)[0][-1]
    order, parents = _order(edges, end)
    path = [order[-1]]  # the way back from the farthest
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return tuple(_order(edges, path[len(path) // 2])[1])


def _order(edges: list[list[int]], root: int) -> tuple[list[int], list[int]]:
    """Return the variables in order of their distance from a root, and their parents."""
    parents, order = [-1] * len(edges), [root]
    for variable in order:  # which grows
        fresh = [n for n in edges[variable] if n != parents[variable]]
        for neighbour in fresh:
            parents[neighbour] = variable
        order += fresh
    return order, parents


def levels(parents: tuple[int, ...]) -> list[list[int]]:
    """Group the variables of a tree by their distance from the root."""
    children: dict[int, list[int]] = {}
    for variable, parent in enumerate(parents):
        children.setdefault(parent, []).append(variable)
    found, level = [], children.get(-1, [])
    while level:
        found.append(level)
        level = [child for variable in level for child in children.get(variable, [])]
    return found
