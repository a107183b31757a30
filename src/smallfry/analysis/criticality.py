"""Criticality of a model: sizes of signals and gradients by depth and by recursion step.

Theory is in ``smallfry.models.critical``; here is what a model's own layers do, with its trained
weights and with newly initialised ones.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smallfry.analysis.features import spread
from smallfry.analysis.question import Answer, Picture, Subject, Table, register_question
from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.models import Recursive
from smallfry.models.contract import tensors
from smallfry.models.critical import (
    Activation,
    Criticality,
    aspect_ratio,
    find_activation,
    find_critical,
    moments,
    residual_kernels,
)
from smallfry.models.critical_init import LAYERS, activation_of
from smallfry.report.axes import log_axis
from smallfry.report.figure import COLOURS, GREY, encode, new_figure, style
from smallfry.training.evaluation import forward
from smallfry.transforms.build import build
from smallfry.transforms.modes import evaluating
from smallfry.transforms.norms import is_norm

__all__ = ["LayerSignal", "StepSignal", "layer_signals", "step_signals"]

IMAGES = 128  # that signals are measured on
LONGEST = 4  # times the trained number of recursion steps
DEPTH = 50  # layers of the map over (C_W, C_b)


class LayerSignal(NamedTuple):
    """Size of a layer's signal in one call.

    Attributes:
        layer: Its name.
        call: Number of the call in the pass, from 0.
        width: Outputs, or channels.
        kernel: Mean square of the outputs (K).
        gradient: Mean square of their gradients, for random cotangents of the logits; 0 where
            none arrives.
    """

    layer: str
    call: int
    width: int
    kernel: float
    gradient: float


class StepSignal(NamedTuple):
    """Sizes of a recursive model's state and the correlations of its changes.

    Attributes:
        rms: Root mean square after each step, by the state's tensor: (tensors, steps).
        correlation: Cosines between the changes of two steps in the last tensor, (steps, steps).
        accuracy: After each step.
    """

    rms: NDArray[np.float64]
    correlation: NDArray[np.float64]
    accuracy: list[float]


def layer_signals(model: nn.Module, images: Tensor, seed: int = 0) -> list[LayerSignal]:
    """Measure signals and gradients of linear layers and convolutions, call by call.

    Args:
        model: In any mode; it is measured in evaluation mode.
        images: Normalised inputs, or numbers of tokens.
        seed: Of the cotangents.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(each.layer, each.width) for each in layer_signals(net, torch.ones(3, 4))]
        [('0', 8), ('2', 2)]
    """
    found: list[dict[str, Any]] = []

    def note(layer: str, module: nn.Module, output: Tensor) -> None:
        width = len(module.weight)  # type: ignore[arg-type]
        call = sum(each["layer"] == layer for each in found)
        kernel = float(output.detach().double().square().mean())
        entry = {"layer": layer, "call": call, "width": width, "kernel": kernel, "gradient": 0.0}
        found.append(entry)

        def keep(gradient: Tensor) -> None:
            entry["gradient"] = float(gradient.double().square().mean())

        if output.requires_grad:
            output.register_hook(keep)  # type: ignore[no-untyped-call]

    handles = [
        module.register_forward_hook(lambda m, _, output, name=name: note(name, m, output))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    generator = torch.Generator().manual_seed(seed)
    try:
        with evaluating(model), torch.enable_grad():
            inputs = images.detach()
            sources: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
            if inputs.is_floating_point():
                sources = [inputs.requires_grad_()]
            logits = forward(model, inputs)[0]
            cotangents = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
            torch.autograd.grad(logits, sources, cotangents, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return [LayerSignal(**each) for each in found]


@torch.no_grad()
def step_signals(model: Recursive, images: Tensor, labels: Tensor, steps: int) -> StepSignal:
    """Measure the state of a recursive model over its recursion steps.

    Args:
        model: The model, in evaluation mode.
        images: Normalised inputs.
        labels: Their classes.
        steps: Steps to take; more than in training show where it leaves its range.
    """
    states = [tensors(model.initial_state(len(images)))]
    accuracy = []
    for step in model.recurse(images, steps):
        states.append(tensors(step.state))
        accuracy.append(float((step.logits.argmax(1) == labels).float().mean()))
    rms = [[float(part.double().square().mean().sqrt()) for part in state] for state in states[1:]]
    last = [state[-1].expand_as(states[-1][-1]).double().flatten() for state in states]
    changes = torch.stack([after - before for before, after in pairwise(last)])
    unit = changes / changes.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return StepSignal(np.array(rms).T, (unit @ unit.T).numpy(), accuracy)


@register_question
def ask(subject: Subject) -> Answer:
    """Compare a model's signals by depth with those of critical initial weights."""
    trained = subject.trained
    images, labels = _inputs(subject, subject.test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        fresh = build(trained.spec).to(images)
    signals = {
        "trained weights": layer_signals(trained.model, images, subject.seed),
        "initial weights": layer_signals(fresh, images, subject.seed),
    }
    signals = {name: found for name, found in signals.items() if found}
    if not signals:
        raise UsageError("the model has no linear layer or convolution in floating point")
    first = next(iter(signals.values()))
    numbers: dict[str, Any] = {
        name: [each._asdict() for each in found] for name, found in signals.items()
    }
    findings, pictures = [], [Picture("Signals and gradients by depth", _draw_signals(signals))]
    for name, found in signals.items():
        findings.append(f"{name}: {_growth(found)}")
    normed = any(map(is_norm, trained.model.modules()))
    try:
        point = find_critical(activation_of(trained.model))
    except UsageError as error:
        findings.append(f"No critical point is shown: {error}.")
    else:
        numbers["critical"] = point._asdict()
        depth_over_width = point.vertex * sum(1 / each.width for each in first)
        numbers["depth_over_width"] = depth_over_width
        findings += _advice(point, normed, depth_over_width, len(trained.classes))
        act = find_activation(point.activation)
        pictures.append(
            Picture(f"Plain networks of {act.name} by initial variances", _draw_map(act, point))
        )
    if isinstance(trained.model, Recursive):
        taken = step_signals(
            trained.model, images, labels, LONGEST * max(2, trained.model.recursion_steps)
        )
        numbers["steps"] = {key: np.asarray(v).tolist() for key, v in taken._asdict().items()}
        numbers["tied_theory"] = _tied_theory(len(taken.accuracy)).tolist()
        findings.append(_advice_on_steps(taken, trained.model.recursion_steps))
        pictures.append(
            Picture("State by recursion step", _draw_steps(taken, trained.model.recursion_steps))
        )
    rows = [
        [each.layer, each.call, f"{each.width:,}", each.kernel, each.gradient]
        for each in next(iter(signals.values()))
    ]
    table = Table(
        next(iter(signals)).capitalize(),
        ["layer", "call", "width", "mean square", "of gradients"],
        rows,
    )
    return Answer("Criticality", findings, numbers, pictures, [table])


def _inputs(subject: Subject, split: Split) -> tuple[Tensor, Tensor]:
    some = spread(split, IMAGES)
    return subject.trained.normalize(some.images), some.labels


def _growth(signals: Sequence[LayerSignal]) -> str:
    """Describe the growth of signals and of gradients through all hidden layers."""
    kernels = [each.kernel for each in signals[:-1] if each.kernel > 0] or [1.0]
    gradients = [each.gradient for each in signals[:-1] if each.gradient > 0] or [1.0]
    forward = (kernels[-1] / kernels[0]) ** (1 / max(1, len(kernels) - 1))
    back = (gradients[0] / gradients[-1]) ** (1 / max(1, len(gradients) - 1))
    return (
        f"from the first to the last hidden layer call the mean square of signals changes by a "
        f"factor of {forward:.3g} a call, and that of gradients, going back, by {back:.3g}; "
        "1 is critical."
    )


def _advice(point: Criticality, normed: bool, ratio: float, classes: int) -> list[str]:
    found = [
        f"{point.activation} is {point.kind}: critical are C_W = {point.weight:.6g} and "
        f"C_b = {point.bias:.6g} (model.init critical)"
        + (", but norms set the scale of this model's signals." if normed else ".")
    ]
    if normed or not np.isfinite(ratio):
        return found
    verdict = (
        "the wide-network picture holds"
        if ratio < 0.1
        else "fluctuations between initialisations matter"
        if ratio < 1
        else "fluctuations dominate: widen the layers, or add norms"
    )
    best = aspect_ratio(point, classes)
    return [
        *found,
        f"ν Σ 1/width is {ratio:.3g}: {verdict}. Rule of thumb: depth over width of {best:.2g}.",
    ]


def _tied_theory(steps: int) -> NDArray[np.float64]:
    """Return the root mean square of a tied residual block after each step, over the first."""
    relu = find_activation("relu")
    squares = np.diagonal(residual_kernels(relu, 2.0, steps, tied=True))[1:]
    rms: NDArray[np.float64] = np.sqrt(squares / squares[0])
    return rms


def _advice_on_steps(taken: StepSignal, trained_steps: int) -> str:
    steps = len(taken.accuracy)
    rms = taken.rms[-1]
    late = max(1, steps // 2)
    growth = float(np.log(rms[-1] / rms[late - 1]) / np.log(steps / late)) if rms[0] > 0 else 0.0
    off = taken.correlation[~np.eye(steps, dtype=bool)].mean()
    best = int(np.argmax(taken.accuracy)) + 1
    law = "∝ t, as changes by one shared block add up" if growth > 0.75 else (
        "∝ √t, as independent changes add up" if growth > 0.25 else "almost not: it has settled"
    )  # fmt: skip
    return (
        f"The state grows as t^{growth:.2f} over the last steps ({law}); changes of different "
        f"steps have a mean cosine of {off:.2f}. Trained with T = {trained_steps}; of {steps} "
        f"steps the accuracy is best after {best} ({taken.accuracy[best - 1]:.2%}), and "
        f"{taken.accuracy[-1]:.2%} after the last."
    )


# Pictures


def _draw_signals(signals: dict[str, list[LayerSignal]]) -> bytes:
    with style():
        figure = new_figure(9.5, 3.6)
        left, right = figure.subplots(1, 2)
        for colour, (name, found) in zip(COLOURS, signals.items(), strict=False):
            left.plot([each.kernel for each in found], ".-", color=colour, label=name)
            gradients = [each.gradient or np.nan for each in found]
            right.plot(gradients, ".-", color=colour, label=name)
        for axes, title in ((left, "mean square of outputs"), (right, "of their gradients")):
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("layer call")
        left.legend()
        return encode(figure)


def _draw_map(act: Activation, point: Criticality) -> bytes:
    """Draw growth of gradients after ``DEPTH`` layers over (C_W, C_b)."""
    grid = np.logspace(-6, 4, 161)
    means = [moments(act, kernel) for kernel in grid]
    square, slope = (
        np.array([getattr(m, name) for m in means]) for name in ("square", "slope_square")
    )
    weights = np.linspace(0.4, 1.6, 49) * point.weight
    biases = np.linspace(0, max(1.0, 3 * point.bias), 41)
    c_w, c_b = np.meshgrid(weights, biases)
    kernel, growth = np.ones_like(c_w), np.zeros_like(c_w)
    for _ in range(DEPTH):
        growth += np.log10(c_w * np.interp(np.log(kernel), np.log(grid), slope))
        kernel = c_b + c_w * np.exp(np.interp(np.log(kernel), np.log(grid), np.log(square)))
        kernel = kernel.clip(grid[0], grid[-1])
    with style():
        figure = new_figure(6, 4)
        axes = figure.subplots()
        drawn = axes.pcolormesh(weights, biases, growth, cmap="RdBu_r", vmin=-12, vmax=12)
        axes.contour(weights, biases, growth, levels=[0], colors="black", linewidths=1)
        axes.plot(point.weight, point.bias, "*", color="#facc15", markersize=14, label="critical")
        figure.colorbar(drawn, label=f"log₁₀ growth of gradients over {DEPTH} layers")
        axes.grid(False)
        axes.set_xlabel("C_W")
        axes.set_ylabel("C_b")
        axes.legend()
        return encode(figure)


def _draw_steps(taken: StepSignal, trained_steps: int) -> bytes:
    steps = np.arange(1, len(taken.accuracy) + 1)
    with style():
        figure = new_figure(12, 3.6)
        left, middle, right = figure.subplots(1, 3)
        for number, (colour, rms) in enumerate(zip(COLOURS, taken.rms, strict=False)):
            left.plot(steps, rms / rms[0], ".-", color=colour, label=f"state, tensor {number + 1}")
        left.plot(steps, _tied_theory(len(steps)), "--", color=GREY, label="tied block, theory")
        left.plot(steps, np.sqrt((1 + steps) / 2), ":", color=GREY, label="untied, theory")
        tallest = float(np.nanmax(taken.rms / taken.rms[:, :1]))
        log_axis(left, "x", 0.9, 1.1 * len(steps))
        log_axis(left, "y", 0.9, 1.2 * max(tallest, float(_tied_theory(len(steps))[-1])))
        left.set_title("root mean square over the first")
        left.legend(fontsize=8)
        drawn = middle.imshow(taken.correlation, cmap="RdBu_r", vmin=-1, vmax=1)
        middle.grid(False)
        middle.set_title("cosines between changes of steps")
        figure.colorbar(drawn, ax=middle)
        right.plot(steps, taken.accuracy, ".-", color=COLOURS[0])
        right.axvline(trained_steps, color=GREY, linestyle=":")
        right.set_title("accuracy; dotted: trained number of steps")
        for axes in (left, right):
            axes.set_xlabel("recursion step")
        return encode(figure)
