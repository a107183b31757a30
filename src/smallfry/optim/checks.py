"""Run-time checks of the stated loss and layers against the backward pass."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from smallfry.curvature import Block, Coverage, Likelihood, Observation
from smallfry.curvature.scaled import Scaled
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.optim.collectives import Collectives
from smallfry.optim.weighing import Weighing

TOLERANCE = 0.05
MOST = 0.8  # of the weights


def check_first_batch(
    blocks: Sequence[Block],
    tapped: Sequence[Observation],
    grads: Mapping[str, Tensor],
    collectives: Collectives,
    likelihood: Likelihood,
    factor: float,
    weighed: Iterable[Weighing],
    loss_scale: float | str,
    share: float,
    check: str,
) -> None:
    """Check layers and loss against their description; called in all processes alike.

    Args:
        blocks: The covered blocks.
        tapped: What was seen of the batch, with the training loss's gradients.
        grads: ``.grad`` of the covered parameters, by name.
        collectives: Messages between processes.
        likelihood: Stated likelihood.
        factor: The training loss over the mean negative log-likelihood, as stated.
        weighed: Row weights of each output.
        loss_scale: The factor as it was given.
        share: Samples of a process, on average.
        check: "error", or "warn" of what is wrong.

    Raises:
        UsageError: They are not, here or in another process.
    """
    weighed, wrong = list(weighed), None
    try:
        rescaled = check_layers(blocks, tapped, grads, collectives)
        if not any(rows.within and rows.certain for rows in weighed):
            counted = min((r.counted(loss_scale) / r.samples for r in weighed), default=1.0)
            check_loss(likelihood, tapped, factor, rescaled, share * counted)
    except UsageError as error:
        wrong = error
    if wrong is not None and check == "warn":
        warn(str(wrong))
    if collectives.any_process(wrong is not None) and check == "error":
        raise wrong or UsageError("in another process the loss does not match loss_scale")


def warn_of_unfrozen(frozen: dict[str, nn.Parameter]) -> None:
    """Warn of one frozen parameter that has a gradient, and exclude it."""
    late = next((name for name, p in frozen.items() if p.grad is not None), None)
    if late is not None:
        frozen.pop(late)
        warn(
            f"parameter '{late}' was frozen when the optimizer was built, and has a gradient "
            "now: it is not trained; build the optimizer anew after unfreezing"
        )


def complain_unseen(counters: dict[str, int]) -> None:
    """Count a due refresh without a forward pass, and warn of the first.

    Raises:
        UsageError: There never was one.
    """
    if counters["statistics"] == 0:
        raise UsageError(
            "no training forward pass was seen, and a step needs its curvature: call the "
            "optimizer's model (model.train(), with gradients) and loss.backward(), as gradients "
            "of torch.autograd.grad don't count; or name the called module with forward=; give "
            "the compiled model if it is compiled"
        )
    counters["missed_refreshes"] += 1
    if counters["missed_refreshes"] == 1:
        warn("a refresh was due, but no training forward pass was seen; it waits for the next")


def check_layers(
    blocks: Sequence[Block],
    observations: Sequence[Observation],
    grads: Mapping[str, Tensor],
    collectives: Collectives,
) -> float:
    """Check that the taps observed every use of each covered weight.

    The gradient that inputs and output gradients multiply to is compared with ``.grad``, up to a
    common factor that gradient clipping or a GradScaler may have put there.

    Returns:
        ``.grad`` over the gradient that was seen in the backward pass; 1 where nobody scaled it.

    Raises:
        UsageError: A weight is used where its module is not called, with the layer's name.
    """
    ratios = []
    averaged = " the processes' gradients are not averaged," if collectives.count > 1 else ""
    for block, actual, found, terms in _both_gradients(blocks, observations, grads, collectives):
        size = torch.linalg.vector_norm(actual)
        rounding = 1e3 * torch.finfo(actual.dtype).eps * terms
        if float(size) <= rounding and float(torch.linalg.vector_norm(found)) <= rounding:
            continue  # such as a bias in front of a batch norm: terms that cancel
        scale = float((actual * found).sum() / (found**2).sum().clamp_min(1e-300))
        rest = float(torch.linalg.vector_norm(actual - scale * found))
        most = actual.abs().max()
        clipped = float(torch.linalg.vector_norm(actual - found.clamp(-most, most)))
        if clipped <= TOLERANCE * float(size):
            ratios.append(scale if rest <= TOLERANCE * float(size) else 1.0)
            continue  # perhaps by clip_grad_value_
        if not rest <= TOLERANCE * float(size):
            raise UsageError(
                f"layer '{next(iter(block.layers))}': its parameters have gradients that its "
                "calls don't account for. Its weight is used without calling the layer (such as "
                "F.linear(x, layer.weight)), inside a reentrant checkpoint, .grad was changed "
                f"before step(),{averaged} or the loss has a term of the weights, or of "
                "derivatives of the model. Call the layer; "
                f"or exclude it: exclude=['{next(iter(block.layers))}'] trains it by the inner "
                "AdamW; or, for such a term, give check='off'"
            )
        ratios.append(scale)
    return sorted(ratios)[len(ratios) // 2] if ratios else 1.0


def _both_gradients(
    blocks: Sequence[Block],
    observations: Sequence[Observation],
    grads: Mapping[str, Tensor],
    collectives: Collectives,
) -> list[tuple[Block, Tensor, Tensor, float]]:
    """Return each block's ``.grad``, its observed gradient, and the size of its terms.

    All messages are sent before any process judges, as one that raised would leave the others in
    the middle of them.
    """
    lacking = [float(any(name not in grads for name in block.parameters)) for block in blocks]
    lacking = collectives.sums(lacking)
    covered = [block for block, lacks in zip(blocks, lacking, strict=True) if not lacks]
    actual = [
        block.to_matrix({name: grads[name] for name in block.parameters}) for block in covered
    ]
    found, terms = [torch.zeros_like(matrix) for matrix in actual], [0.0] * len(covered)
    with collectives.publish_failure():
        for number, block in enumerate(covered):
            for seen in observations:
                part = seen.training_matrix(block, actual[number].dtype)
                if part is not None:
                    found[number] += part[0]
                    terms[number] += part[1]
    mean = [collectives.sum(matrix) / collectives.count for matrix in found]  # as gradients are
    means = [term / collectives.count for term in collectives.sums(terms)]
    return list(zip(covered, actual, mean, means, strict=True))


def _described(likelihood: Likelihood) -> str:
    """Describe a likelihood, with its factor and the dimension of its classes."""
    if not isinstance(likelihood, Scaled):
        return f"'{type(likelihood).__name__.lower()}'"
    inner = type(likelihood.inner).__name__.lower()
    named = f"'{inner}' times {likelihood.factor}"
    if likelihood.factor == "mean":
        named = f"'{inner}_mean'"
    dimension = getattr(likelihood.inner, "dim", None)
    return named + ("" if dimension is None else f", with the classes in dimension {dimension},")


def check_loss(
    likelihood: Likelihood,
    observations: Sequence[Observation],
    stated: float,
    rescaled: float,
    samples: float,
) -> None:
    """Check that the loss is the stated multiple of the mean negative log-likelihood.

    Args:
        likelihood: Stated likelihood.
        observations: With the training loss's gradients at the outputs.
        stated: The multiple that the optimizer was told.
        rescaled: ``.grad`` over the gradient seen in the backward pass, from ``check_layers``.
        samples: In the batch; of several processes, their mean share.

    Raises:
        UsageError: The likelihood can't explain the gradients, or another multiple does.
    """
    factors = []
    for seen in observations:
        pairs = zip(seen.output_gradients, seen.outputs, strict=True)
        gradients = tuple((torch.zeros_like(z) if g is None else g) * samples for g, z in pairs)
        scale = likelihood.loss_factor(seen.outputs, gradients, max(stated, stated / rescaled))
        if scale is None:
            continue
        if not scale.fits:
            raise UsageError(
                f"the likelihood {_described(likelihood)} does not fit the loss: no targets give "
                "the gradients at the model's output. Name the likelihood of the loss, its "
                "negative logarithm (categorical for cross_entropy, bernoulli for "
                "binary_cross_entropy_with_logits, gaussian for mse_loss), or give a function to "
                "a torch.distributions object"
            )
        factors.append(scale)
    if not factors:
        return
    found = max(factors, key=lambda scale: scale.factor)
    likely = found.factor / stated
    # a loss scale put on before and taken off after the backward pass is none of our concern
    taken_off = likely > 1 and rescaled < 1 and likely * rescaled <= 1 + 2 * TOLERANCE
    if likely <= 1 + TOLERANCE and (likely >= 0.6 or not found.hard):
        if likely < 0.1:
            _suspect(likely)
        return
    if taken_off:
        return
    if not found.even:
        raise UsageError(
            "the rows of the loss have unequal weights, which the gradient does not determine: "
            "for class or sample weights and certain targets give "
            "likelihood=Categorical(hard=True) or Bernoulli(hard=True); for soft targets call "
            "weigh(weights) before each backward(). Else the likelihood does not fit the loss, or "
            f"the loss is more than {found.factor:.4g} times the mean over samples of the negative "
            f"log-likelihood, not {stated:.4g}: see loss_scale="
        )
    hint = _reduction_hint(found.factor, samples)
    raise UsageError(
        f"the loss is {found.factor:.4g} times the mean over samples of the negative "
        f"log-likelihood, but loss_scale is {stated:.4g}: the curvature and damping would "
        f"be off by that.{hint} Give loss_scale={found.factor:.4g}, or loss_scale='mean' or 'sum' "
        "for what PyTorch calls reduction; or the likelihood does not fit the loss"
    )


def _reduction_hint(factor: float, samples: float) -> str:
    if math.isclose(factor, samples, rel_tol=TOLERANCE):
        return f" {samples:g} is the number of samples: the loss is a sum over them."
    if factor < 1 and math.isclose(1 / factor, round(1 / factor), rel_tol=TOLERANCE):
        return f" 1/{round(1 / factor)} looks like a mean over outputs or positions."
    return ""


def _suspect(likely: float) -> None:
    warnings.warn(
        f"the gradients at the model's output are those of a loss about {likely:.2g} times the "
        "stated scale, or of targets near the predictions; check loss_scale",
        SmallfryWarning,
        stacklevel=4,
    )


def require_model(optimizer: object, model: object) -> None:
    """Require a model whose gradients the optimizer can take.

    Raises:
        UsageError: It is something else, on the device "meta", or has an embedding with sparse
            gradients.
    """
    name = type(optimizer).__name__
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{name} needs the model itself: pass it, not "
            f"{type(model).__name__} of its parameters: {name}(model, lr=…), or {name}(model, "
            "params=groups, lr=…) for groups or some of its parameters"
        )
    empty = next((path for path, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise UsageError(
            f"parameter '{empty}' is on the device 'meta' and has no numbers: call "
            "model.to_empty(device=…) and load or initialise its weights first"
        )
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "sparse", False) and weight is not None and weight.requires_grad:
            raise UsageError(
                f"layer '{path}' has sparse gradients, and the inner AdamW takes none: build it "
                "with sparse=False, or freeze it here and train it by torch.optim.SparseAdam"
            )


def check_coverage(optimizer: object, model: nn.Module, coverage: Coverage) -> None:
    """Warn if less than four fifths of the trained weights are in covered layers.

    Layers that the user excludes are not counted.

    Raises:
        UsageError: No layer is covered.
    """
    if not coverage.blocks:
        raise UsageError(
            f"{type(model).__name__} has no layer that {type(optimizer).__name__} can cover "
            "(Linear, Embedding, a convolution, attention, RNN, LSTM or GRU with a trained weight "
            "or bias): take AdamW"
        )
    left = {name for name, reason in coverage.uncovered.items() if reason != "excluded"}
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in left}
    covered = sum(block.size for block in coverage.blocks)
    whole = covered + sum(sizes.values())
    if covered >= MOST * whole:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"'{n}' ({sizes[n]:,}: {coverage.uncovered[n]})" for n in largest)
    warnings.warn(
        f"only {covered / whole:.0%} of the trained weights have layers that are covered; AdamW "
        f"inside trains the rest with fallback_lr, the largest {named}",
        SmallfryWarning,
        stacklevel=5,
    )


def warn(message: str) -> None:
    """Warn of a problem that does not stop training."""
    warnings.warn(message, SmallfryWarning, stacklevel=3)
