"""The exact quadratic model of a step: M(Δ) = ∇Lᵀ Δ + ½ Δᵀ (GGN + λ I) Δ, on the current batch.

The generalised Gauss-Newton matrix is Jᵀ H J with J the Jacobian of the network's outputs and H
the likelihood's Hessian there; J Δ takes one forward-mode pass over the batch, without gradients.
The best step lengths follow Martens and Grosse 2015 (arXiv 1503.05671, sections 6.4 and 7), the
reduction ratio their section 6.5. L is in units of the mean negative log-likelihood.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from smallfry.curvature import Observation
from smallfry.optim.weighing import weigh_rows

if TYPE_CHECKING:
    from smallfry.optim.base import NaturalGradient

Outputs = tuple[Tensor, ...]


def best_step(
    optimizer: "NaturalGradient",
    observations: Sequence[Observation],
    grads: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """The combination of −direction and the last step that minimises M.

    Args:
        optimizer: The optimizer; its ``clip`` is set by the divergence of the real step.
        observations: Of the current batch, with the arguments of the forward pass.
        grads: Gradients of L by parameter name.
        directions: Preconditioned gradients by parameter name.
        parameters: Parameters by name.
    """
    bases = [{name: -v for name, v in directions.items()}]
    last = {
        name: optimizer.state[parameters[name]]["last_step"]
        for name in directions
        if "last_step" in optimizer.state[parameters[name]]
    }
    if last:
        bases.append({n: last.get(n, torch.zeros_like(v)) for n, v in directions.items()})
    count = len(bases)
    curved = torch.zeros(count, count, dtype=torch.float64)
    samples = optimizer._batch_size(observations)
    weigh_rows(optimizer, observations, optimizer._loss_factor(observations))
    for seen in observations:
        pushed = [push_forward(optimizer, seen, basis, parameters)[1] for basis in bases]
        for i in range(count):
            bent = seen.hessian_product(pushed[i])
            for j in range(count):
                curved[i, j] += _dot(bent, pushed[j]) / samples
    curved = optimizer.exchange.sum(curved.to(optimizer.device)).cpu()
    ridge = torch.zeros_like(curved)
    slope = torch.zeros(count, dtype=torch.float64)
    for i, basis in enumerate(bases):
        slope[i] = sum(float((grads[name] * d).sum()) for name, d in basis.items())
        for j, other in enumerate(bases):
            ridge[i, j] = sum(
                damping_of(optimizer, name) * float((d * other[name]).sum())
                for name, d in basis.items()
            )
    matrix = curved + ridge
    lengths = -(torch.linalg.pinv(matrix, hermitian=True) @ slope)
    rate = max(group["lr"] for group in optimizer.param_groups if "momentum" in group)
    size = float(rate**2 * lengths @ curved @ lengths)
    result = {
        name: sum((float(c) * b[name] for c, b in zip(lengths, bases, strict=True)), start=0 * v)
        for name, v in directions.items()
    }
    if optimizer.kl_clip is not None:
        optimizer.targets = targets_of(optimizer, observations)
        optimizer.clip = min(
            1.0, (optimizer.kl_clip * optimizer.targets / max(size, 1e-300)) ** 0.5
        )
    return result


def adapt_damping(
    optimizer: "NaturalGradient",
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """λ falls where M foretold the change of the loss, else rises (Levenberg and Marquardt)."""
    ratio = reduction_ratio(optimizer, observations, step, parameters)
    optimizer.reduction_ratio = ratio
    if ratio is None:
        return
    omega = 0.95**optimizer.statistics_every
    if ratio > 0.75:
        optimizer.damping_factor = max(optimizer.damping_factor * omega, 1e-6)
    elif ratio < 0.25:
        optimizer.damping_factor = min(optimizer.damping_factor / omega, 1e6)


def reduction_ratio(
    optimizer: "NaturalGradient",
    observations: Sequence[Observation],
    step: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> float | None:
    """How much of the fall of the loss that M foretells really comes.

    −∞ if M foretells a rise and it comes; None if there is nothing to learn from.

    The targets are not needed: the gradient that arrived at the outputs gives the linear part of
    the real change, and the divergence of the likelihood the rest.
    """
    samples = optimizer._batch_size(observations)
    # processes average their gradients
    factor = optimizer._loss_factor(observations) * optimizer.exchange.count
    linear = real = curved = 0.0
    for seen in observations:
        before, tangents = push_forward(optimizer, seen, step, parameters)
        after = run(optimizer, seen, parameters, step)
        gradients = [
            torch.zeros_like(z) if g is None else g
            for g, z in zip(seen.output_gradients, before, strict=True)
        ]
        linear += _dot(gradients, tangents) / factor
        moved = [new - old for new, old in zip(after, before, strict=True)]
        divergence = optimizer.likelihood.divergence(before, after, seen.row_shares)
        real += _dot(gradients, moved) / factor + float(divergence.double().sum()) / samples
        curved += _dot(seen.hessian_product(tangents), tangents) / samples
    terms = [linear, real, curved]
    linear, real, curved = optimizer.exchange.sums(terms, optimizer.device)
    ridge = sum(damping_of(optimizer, n) * float((d**2).sum()) for n, d in step.items())
    foretold = linear + 0.5 * (curved + ridge)
    if foretold < 0:
        return real / foretold
    return -math.inf if real > 0 else None


def targets_of(optimizer: "NaturalGradient", observations: Sequence[Observation]) -> float:
    """Targets to a sample, by the weights of their rows, over the whole batch."""
    count = optimizer.exchange.count
    samples = optimizer._batch_size(observations)
    unit = samples / count / optimizer._loss_factor(observations)
    found = 0.0
    for seen in observations:
        # of a loss that a GradScaler has multiplied, nobody can tell how large they are
        hidden = optimizer.observer.rescaled and optimizer.grad_scaler is None
        scaled = tuple(None if g is None or hidden else g * unit for g in seen.output_gradients)
        likelihood = seen.likelihood or optimizer.likelihood
        found += likelihood.targets(seen.outputs, scaled, seen.row_shares) * seen.size
    # where no row counts, as in a batch of padding, momentum may move by what others had
    return optimizer.exchange.sums([found], optimizer.device)[0] / samples or optimizer.targets


def damping_of(optimizer: "NaturalGradient", name: str) -> float:
    """λ of the block that a parameter belongs to."""
    for block in optimizer.blocks:
        if name in block.parameters:
            return optimizer.lambdas[block.name]
    raise KeyError(name)


def push_forward(
    optimizer: "NaturalGradient",
    seen: Observation,
    direction: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> tuple[Outputs, Outputs]:
    """The outputs of an observed forward pass, and J Δ there."""
    function, chosen, tangents = _as_function(optimizer, seen, parameters, direction)

    def pushed() -> tuple[Outputs, Outputs]:
        # fused attention has no forward-mode derivative
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            make: Any = forward_ad.make_dual
            read: Any = forward_ad.unpack_dual
            duals = {name: make(p, tangents[name]) for name, p in chosen.items()}
            found = [read(z) for z in function(duals)]
        moved = [torch.zeros_like(z) if t is None else t for z, t in found]
        return tuple(z.detach() for z, _ in found), tuple(moved)

    result: tuple[Outputs, Outputs] = optimizer.observer.rerun(seen, pushed)
    return result


def run(
    optimizer: "NaturalGradient",
    seen: Observation,
    parameters: Mapping[str, nn.Parameter],
    step: Mapping[str, Tensor],
    kernels: Sequence[SDPBackend] = (SDPBackend.MATH,),
) -> Outputs:
    """The outputs of an observed forward pass with moved parameters.

    Args:
        optimizer: The optimizer.
        seen: The forward pass.
        parameters: Parameters by name.
        step: What is added to them.
        kernels: Attention's, such as ``push_forward`` has; none given takes what is fastest.
    """
    function, chosen, moves = _as_function(optimizer, seen, parameters, step)
    moved = {name: chosen[name] + moves[name] for name in chosen}

    def again() -> Outputs:
        with sdpa_kernel(list(kernels)) if kernels else nullcontext():
            return function(moved)

    outputs: Outputs = optimizer.observer.rerun(seen, again)
    return outputs


def _as_function(
    optimizer: "NaturalGradient",
    seen: Observation,
    parameters: Mapping[str, nn.Parameter],
    direction: Mapping[str, Tensor],
) -> tuple[Callable[[dict[str, Tensor]], Outputs], dict[str, Tensor], dict[str, Tensor]]:
    """The watched module as a function of some parameters, with their values and a direction."""
    root: Any = optimizer.observer.root
    root = getattr(root, "_orig_mod", root)
    paths = {p: path for path, p in root.named_parameters()}
    buffers = {path: b.clone() for path, b in root.named_buffers()}
    chosen = {paths[parameters[name]]: parameters[name].detach() for name in direction}
    tangents = {paths[parameters[name]]: d for name, d in direction.items()}

    def function(values: dict[str, Tensor]) -> Outputs:
        # containers of its own, as a model may put other things into them
        given, named = tree_map(lambda leaf: leaf, (seen.arguments, seen.keywords))
        output = functional_call(root, {**buffers, **values}, given, named)
        return optimizer.likelihood.select(output)

    return function, chosen, tangents


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return float(sum((a.double() * b.double()).sum() for a, b in pairs))
