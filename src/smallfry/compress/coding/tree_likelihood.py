"""Likelihood of a hidden Chow–Liu tree.

    λ_i(z) = E_i[z, x_i] Π_children m_c(z),   m_c(z) = Σ_z' A_c[z, z'] λ_c(z'),   p(x) = Σ π λ_root

from the leaves to the root, in logarithms; E_i = 1 where x_i is missing. All variables of a level
are computed together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class Tables(NamedTuple):
    """Parameters; transitions and emissions have one table for each variable, or one for all."""

    root: NDArray[np.float64]  # (states,)
    transitions: NDArray[np.float64]  # (variables or 1, states, states)
    emissions: NDArray[np.float64]  # (variables or 1, states, categories)


class Logs(NamedTuple):
    """Logarithms of parameters."""

    root: Tensor  # (states,)
    transitions: Tensor  # (variables or 1, states, states)
    emissions: Tensor  # (variables or 1, categories, states)


def logs_of(tables: Tables, dtype: torch.dtype = torch.float64) -> Logs:
    """Compute the logarithms of parameters."""
    arrays = (tables.root, tables.transitions, tables.emissions.swapaxes(1, 2))
    return Logs(*(torch.from_numpy(np.log(each)).to(dtype).contiguous() for each in arrays))


def log_probability(
    logs: Logs,
    parents: tuple[int, ...],
    order: Sequence[Sequence[int]],
    samples: Tensor,
    given: Tensor | None = None,
) -> Tensor:
    """Compute ln p(x), differentiable in the logarithms of the parameters.

    Args:
        logs: Parameters.
        parents: Tree.
        order: Its variables by levels.
        samples: int64, (samples, variables).
        given: False where a value is missing, likewise; None if none is.

    Returns:
        (samples,).
    """
    # in the order of the levels, so that each of them is a slice
    variables = torch.tensor([variable for level in order for variable in level])
    sizes = [len(level) for level in order]
    rows = samples.T[variables]  # (variables, samples)
    if len(logs.emissions) > 1:
        rows = rows + logs.emissions.shape[1] * variables[:, None]
    likelihood = F.embedding(rows, logs.emissions.flatten(0, 1))
    if given is not None:
        likelihood = likelihood.masked_fill(~given.T[variables][..., None], 0.0)
    transitions = logs.transitions.exp()
    matrices = [transitions] * len(order)
    if len(transitions) > 1:
        matrices = list(torch.split(transitions[variables], sizes))
    parts = torch.split(likelihood, sizes)  # (variables of the level, samples, states)
    above = parts[-1]
    for depth in range(len(order) - 1, 0, -1):
        shift = above.detach().amax(dim=2, keepdim=True)
        messages = (above - shift).exp().matmul(matrices[depth].transpose(1, 2)).log() + shift
        position = {variable: k for k, variable in enumerate(order[depth - 1])}
        owners = torch.tensor([position[parents[child]] for child in order[depth]])
        above = parts[depth - 1].index_add(0, owners, messages)
    return torch.logsumexp(above[0] + logs.root, dim=1)
