"""Sensitivity of the loss to the rounding of each layer's weights, ½ δᵀ H δ.

Of a layer with the rounding error Δ = Ŵ − W, δ = vec Δ, and n weights:

    kronecker   ½ tr(Δᵀ G Δ A)        KFAC's factors: it sees the direction of the error
    fisher      ½ (tr F / n) ‖δ‖²     F the Fisher of the model's own predictions
    hessian     ½ (tr H / n) ‖δ‖²     H of the loss, by Hutchinson's estimator: HAWQ-V2's measure
                                      (Dong et al. 2019, arXiv 1911.03852)

The Fisher's gradients of a shared layer are summed over its calls before they are squared.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from smallfry.curvature.coverage import cover
from smallfry.curvature.kronecker import input_factor, output_factor
from smallfry.curvature.layers import weight_to_matrix
from smallfry.curvature.likelihoods import Categorical, Likelihood
from smallfry.curvature.rows import Rows
from smallfry.curvature.taps import Observation, Taps
from smallfry.errors import UsageError
from smallfry.training.evaluation import forward

Measure = Literal["kronecker", "fisher", "hessian"]
MEASURES: tuple[Measure, ...] = ("kronecker", "fisher", "hessian")
EXACT_UP_TO = 16  # outputs of which every gradient is taken; of more, one is sampled per image
CHUNK = 32  # images per backward pass
PROBES = 50
LEAST_PROBES = 10  # fewer may agree by accident
PRECISE = 0.05  # relative standard error at which Hutchinson's estimator may end


class LayerCurvature(NamedTuple):
    """Curvature of the loss with respect to one weight, a mean over images."""

    inputs: Tensor  # A, (groups, inputs, inputs), float64
    outputs: Tensor  # G, (groups, outputs, outputs)
    trace: float | None  # of the Fisher of the weight, if asked for
    uses: int  # of the weight by one image, over all calls


def curvature(
    model: nn.Module,
    batches: Iterable[Tensor],
    likelihood: Likelihood | None = None,
    seed: int = 0,
    traces: bool = True,
) -> dict[str, LayerCurvature]:
    """Compute KFAC's factors and the trace of the Fisher for every covered layer.

    Args:
        model: In evaluation mode; left as it is.
        batches: Batches of images.
        likelihood: Of the targets given the outputs; categorical by default.
        seed: Seed of the sampled targets of models with more than 16 outputs.
        traces: Also compute the traces, which takes the gradient of every image.

    Returns:
        By the name of the layer; every name of a shared weight has the same entry.

    Example:
        >>> import torch
        >>> from smallfry.compress.quantize.sensitivity import curvature
        >>> found = curvature(torch.nn.Sequential(torch.nn.Linear(3, 2)), [torch.randn(8, 3)])
        >>> tuple(found["0"].inputs.shape), found["0"].uses
        ((1, 3, 3), 1)
    """
    density = Categorical() if likelihood is None else likelihood
    small = deepcopy(model).eval()
    blocks = cover(_trainable(small), _weights(small)).blocks
    taps, sums = Taps(blocks), dict[str, list[Tensor]]()
    generator, samples, uses = torch.Generator().manual_seed(seed), 0, dict[str, int]()
    for batch in batches:
        for images in torch.split(batch, CHUNK):
            seen = _observe(small, images, taps, density, generator)
            for block in blocks:
                rows = seen.rows(block, images.dtype)
                if rows is not None:
                    _add(sums, block.name, rows, traces)
                    uses[block.name] = rows.inputs.shape[2]
            samples += len(images)
    if not samples:
        raise UsageError("no images to measure curvature on: give data, or batches=")
    return {
        layer: LayerCurvature(
            sums[block.name][0] / samples,
            sums[block.name][1] / samples,
            float(sums[block.name][2]) / samples if traces else None,
            uses[block.name],
        )
        for block in blocks
        if block.name in sums
        for layer in block.layers
    }


def kronecker_sensitivity(error: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    """Compute ½ tr(Δᵀ G Δ A).

    Args:
        error: Δ, (groups, outputs, inputs).
        inputs: A, (groups, inputs, inputs).
        outputs: G, (groups, outputs, outputs).
    """
    wide = error.double()
    return 0.5 * float(((outputs.double() @ wide @ inputs.double()) * wide).sum())


def trace_sensitivity(error: Tensor, trace: float) -> float:
    """Compute ½ (trace / n) ‖δ‖² of n weights."""
    return 0.5 * trace / error.numel() * float(error.double().square().sum())


def hessian_traces(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Tensor],
    labels: Sequence[Tensor] | None = None,
    probes: int = PROBES,
    seed: int = 0,
) -> dict[str, float]:
    """Estimate the trace of the loss's Hessian for each layer's weight by Hutchinson's estimator.

    One random ±1 vector over all weights gives an estimate for each of them.

    Args:
        model: In evaluation mode; left as it is.
        layers: Names of the layers.
        batches: Batches of images.
        labels: Classes of the images, batch by batch; the model's own predictions by default.
        probes: Most random vectors; fewer, but 10 at least, once the standard error of every trace
            is below 5 %.
        seed: Seed of the vectors.
    """
    small = _trainable(deepcopy(model).eval())
    inputs = list(batches)
    targets = labels if labels is not None else [_predicted(small, each) for each in inputs]
    weights = {name: cast(Tensor, small.get_submodule(name).weight) for name in layers}
    flat = list(dict.fromkeys(weights.values()))
    generator, found = torch.Generator().manual_seed(seed), list[list[float]]()
    count = sum(map(len, inputs))
    for _ in range(probes):
        probe = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in flat]
        totals = [0.0] * len(flat)
        for images, classes in zip(inputs, targets, strict=True):
            products = _hessian_product(small, images, classes, flat, probe)
            for number, (v, hv) in enumerate(zip(probe, products, strict=True)):
                totals[number] += float((v * hv).sum())
        found.append([total / count for total in totals])
        if len(found) >= LEAST_PROBES and _is_precise(torch.tensor(found, dtype=torch.float64)):
            break
    means = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    by_weight = {id(weight): mean for weight, mean in zip(flat, means, strict=True)}
    return {name: by_weight[id(weight)] for name, weight in weights.items()}


def sensitivities(
    model: nn.Module,
    errors: Mapping[str, Mapping[int, Tensor]],
    measure: Measure,
    batches: Iterable[Tensor],
    likelihood: Likelihood | None = None,
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Compute the sensitivity of every layer at every number of bits.

    Args:
        model: In evaluation mode; left as it is.
        errors: Ŵ − W of each layer, in the weight's shape, by bits.
        measure: ``kronecker``, ``fisher`` or ``hessian``.
        batches: Batches of images, which can be read twice.
        likelihood: See ``curvature``.
        seed: Random seed.

    Raises:
        UsageError: Another measure, or a layer without curvature.
    """
    if measure not in MEASURES:
        raise UsageError(f"a sensitivity is one of {', '.join(MEASURES)}, not '{measure}'")
    if measure == "hessian":
        traces = hessian_traces(model, list(errors), batches, seed=seed)
        return {
            name: {bits: trace_sensitivity(e, traces[name]) for bits, e in by_bits.items()}
            for name, by_bits in errors.items()
        }
    known = curvature(model, batches, likelihood, seed, measure == "fisher")
    found: dict[str, dict[int, float]] = {}
    for name, by_bits in errors.items():
        if name not in known:
            raise UsageError(f"the curvature of '{name}' is not known: exclude it")
        layer, of = model.get_submodule(name), known[name]
        found[name] = {
            bits: trace_sensitivity(error, of.trace)
            if of.trace is not None
            else kronecker_sensitivity(weight_to_matrix(layer, error), of.inputs, of.outputs)
            for bits, error in by_bits.items()
        }
    return found


def _trainable(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights without the biases, which are not rounded."""
    return [p for p in model.parameters() if p.ndim > 1]


def _observe(
    model: nn.Module,
    images: Tensor,
    taps: Taps,
    likelihood: Likelihood,
    generator: torch.Generator,
) -> Observation:
    """Run the model, and take the gradients of its own predictions at every call."""
    taps.open()
    try:
        with torch.enable_grad():
            outputs = likelihood.select(forward(model, images)[0])
    finally:
        calls = taps.close()
    values = tuple(z.detach() for z in outputs)
    few = sum(z[0].numel() for z in values) <= EXACT_UP_TO
    columns = likelihood.columns(values) if few else iter(
        [likelihood.sample_gradients(values, generator)]
    )  # fmt: skip
    seen, edges = Observation(len(images), calls), [call.edge for call in calls]
    for column in columns:
        seen.draws.append(
            torch.autograd.grad(
                outputs, edges, column, retain_graph=True, allow_unused=True  # type: ignore[arg-type]
            )
        )  # fmt: skip
    return seen


def _add(sums: dict[str, list[Tensor]], name: str, rows: Rows, traces: bool) -> None:
    count = rows.inputs.shape[1]
    found = [
        input_factor(rows).double() * count,
        output_factor(rows).double() * count,
    ]
    if traces:
        found.append(_squared_gradients(rows))
    sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found


def _squared_gradients(rows: Rows) -> Tensor:
    """Sum the squared gradients of all samples and draws, each summed over its uses first."""
    total = rows.inputs.new_zeros((), dtype=torch.float64)
    for draw in rows.gradients.unbind(1):  # (groups, samples, uses, outputs)
        for sample in range(draw.shape[1]):
            gradient = draw[:, sample].mT @ rows.inputs[:, sample]
            total += gradient.double().square().sum()
    return total


def _predicted(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = forward(model, images)[0].argmax(1)
    return answers


def _hessian_product(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    """Multiply the Hessian of the summed loss by vectors."""
    # the fused kernels of attention have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(forward(model, images)[0], classes, reduction="sum")
        gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        inner = torch.stack([(g * v).sum() for g, v in zip(gradients, vectors, strict=True)]).sum()
        if not inner.requires_grad:
            return [torch.zeros_like(w) for w in weights]
        return list(torch.autograd.grad(inner, weights, materialize_grads=True))


def _is_precise(found: Tensor) -> bool:
    error = found.std(0) / len(found) ** 0.5
    return bool((error <= PRECISE * found.mean(0).abs()).all())
