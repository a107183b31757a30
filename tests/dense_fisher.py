"""An oracle that shares nothing with smallfry.curvature: dense Fishers by autograd, in float64."""

import copy

import torch
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn import functional as F

from smallfry.curvature import Taps
from smallfry.curvature.taps import Observation

NLL = {
    "categorical": lambda z: torch.logsumexp(z, -1).sum(),
    "bernoulli": lambda z: F.softplus(z).sum(),
    "gaussian": lambda z: 0.5 * (z**2).sum(),
}  # each up to a linear term, which has no second derivative


def dense_fisher(model, inputs, likelihood, names=None):
    """Mean over samples of Jᵀ H J, in the order of ``names`` and of each flattened parameter."""
    model = copy.deepcopy(model)  # without the hooks of an optimizer
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    names = list(parameters) if names is None else list(names)

    def output(chosen, x):
        return functional_call(model, parameters | chosen, (x[None],))[0]

    def derivatives(x):
        z = output({}, x)
        jacobian = jacrev(lambda chosen: output(chosen, x))({n: parameters[n] for n in names})
        j = torch.cat([jacobian[n].reshape(z.numel(), -1) for n in names], 1)
        return j, hessian(NLL[likelihood])(z).reshape(z.numel(), z.numel()) @ j

    try:
        j, hj = vmap(derivatives)(inputs)
    except (RuntimeError, ValueError, NotImplementedError):  # such as what asks a tensor's value
        j, hj = map(torch.stack, zip(*map(derivatives, inputs), strict=True))
    return j.flatten(0, 1).T @ hj.flatten(0, 1) / len(inputs)


def observe(model, coverage, inputs, likelihood, fisher="exact", generator=None, draws=1):
    """One forward pass with taps, and the gradients of the exact or the sampled Fisher."""
    taps = Taps(coverage.blocks)
    taps.open()
    output = model(inputs)
    seen = Observation(len(inputs), taps.close())
    z = likelihood.select(output)
    edges = [call.edge for call in seen.calls]
    if fisher == "exact":
        columns = list(likelihood.columns(z))
    else:
        columns = [likelihood.sample_gradients(z, generator) for _ in range(draws)]
        columns = [tuple(g / draws**0.5 for g in column) for column in columns]
    for column in columns:
        seen.draws.append(
            torch.autograd.grad(z, edges, column, retain_graph=True, allow_unused=True)
        )
    return seen


def flat(block, matrix):
    """A block's matrix as one vector, parameter after parameter, as ``dense_fisher`` orders."""
    return torch.cat([t.reshape(-1) for t in block.from_matrix(matrix).values()])


def dense_of(block, rows):
    """The Fisher of a block from its rows, multiplied out."""
    w = torch.einsum("hknto,hnti->knhoi", rows.gradients, rows.inputs)
    j = torch.stack([flat(block, one) for one in w.flatten(0, 1)])
    return j.T @ j / rows.samples


def dense_operator(block, apply):
    """A linear map on a block's matrices, as a matrix."""
    size = block.size
    identity = torch.eye(size, dtype=torch.float64)
    columns = []
    shapes = {n: p.shape for n, p in block.parameters.items()}
    for unit in identity:
        tensors, start = {}, 0
        for name, shape in shapes.items():
            count = shape.numel()
            tensors[name] = unit[start : start + count].reshape(shape)
            start += count
        columns.append(flat(block, apply(block.to_matrix(tensors))))
    return torch.stack(columns, 1)


def inverted_fisher(optimizer, block):
    """The Fisher that a method inverts, as a matrix: the inverse of what it applies, minus λ."""
    state, damping = optimizer.curvature[block.name], optimizer.lambdas[block.name]
    apply = optimizer.approximation.apply
    inverse = dense_operator(block, lambda m: apply(block, state, m, damping))
    return torch.linalg.inv(inverse) - damping * torch.eye(block.size, dtype=torch.float64)
