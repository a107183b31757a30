"""Limits of infinite depth: the classifier of a model's activation without norms.

Theory is in ``smallfry.layers.hermite``. Finite networks behave differently; the kernel classifier
on the same features shows what the limit would do.
"""

from typing import Any

import numpy as np

from smallfry.analysis.features import collect, spread
from smallfry.analysis.question import Answer, Picture, Subject, Table, register_question
from smallfry.errors import UsageError
from smallfry.estimators.deep_kernel import DeepKernelClassifier
from smallfry.layers.hermite import DeepLimit, find_limit, hermite_coefficients
from smallfry.models.critical import Activation, find_activation, moments
from smallfry.models.critical_init import activation_of
from smallfry.report.figure import COLOURS, GREY, encode, new_figure, style

__all__ = ["limit_of"]

SHOWN = ("tanh", "sin", "erf", "relu", "gelu", "silu", "selu", "sigmoid")
DEPTHS = (1, 2, 5, 10, 20, 50)
SAMPLES = 600  # of each split: the kernel classifier solves a dense system


def limit_of(activation: Activation) -> DeepLimit:
    """Find the limit of depth of an activation, scaled to E σ² = 1.

    Example:
        >>> limit_of(find_activation("relu")).kind
        'majority vote'
    """
    constant, slope = hermite_coefficients(activation.function, 2)
    means = moments(activation, 1.0)
    return find_limit(constant**2, slope**2, means.slope_square / means.square)


@register_question
def ask(subject: Subject) -> Answer:
    """Find the limits of activations, and compare the model with infinitely wide classifiers."""
    limits = {name: limit_of(find_activation(name)) for name in SHOWN}
    findings = []
    try:
        own = activation_of(subject.trained.model)
    except UsageError:
        findings.append("The modules of the model show no single kind of activation.")
    else:
        found = limits[own] = limit_of(find_activation(own))
        findings.append(
            f"Stacked without norms, residuals and biases, {own} would become "
            f"{_described(found)} at infinite depth; real networks are finite."
        )
    training, test = (
        collect(subject.trained, split.images, split.labels)
        for split in (spread(subject.training, SAMPLES), spread(subject.test, SAMPLES))
    )
    scores = {
        name: [
            float(
                DeepKernelClassifier(activation=name, depth=depth)
                .fit(training.features.numpy(), training.labels.numpy())
                .score(test.features.numpy(), test.labels.numpy())
            )
            for depth in DEPTHS
        ]
        for name in ("optimal", "relu")
    }
    best = max(scores, key=lambda name: max(scores[name]))
    findings.append(
        f"On the classifier's inputs, {len(training.labels)} training images, an infinitely wide "
        f"network reaches {max(scores[best]):.2%} ({best}, depth "
        f"{DEPTHS[int(np.argmax(scores[best]))]}); the model's own classifier {test.accuracy:.2%}."
    )
    numbers: dict[str, Any] = {
        "limits": {name: limit._asdict() for name, limit in limits.items()},
        "depths": DEPTHS,
        "kernel_accuracy": scores,
        "model_accuracy": test.accuracy,
    }
    rows = [
        [name, limit.kind, *(None if v is None else round(v, 9) for v in limit[1:])]
        for name, limit in limits.items()
    ]
    head = ["activation", "limit", "ψ(0)", "ψ′(0)", "ψ′(1)", "exponent α"]
    return Answer(
        "Limits of depth",
        findings,
        numbers,
        [Picture("Infinitely wide classifiers by depth", _draw(scores, test.accuracy))],
        [Table("Limits of activations", head, rows)],
    )


def _described(limit: DeepLimit) -> str:
    if limit.kind == "singular kernel":
        return f"a vote weighted by 1/r^{limit.exponent:.3g}"
    if limit.kind == "unknown":
        return "none of the known limits"
    return f"a {limit.kind}"


def _draw(scores: dict[str, list[float]], own: float) -> bytes:
    with style():
        figure = new_figure(6.5, 3.6)
        axes = figure.subplots()
        for colour, (name, found) in zip(COLOURS, scores.items(), strict=False):
            axes.plot(DEPTHS, found, ".-", color=colour, label=f"{name} activation")
        axes.axhline(own, color=GREY, linestyle=":", label="the model's classifier")
        axes.set_xscale("log")
        axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
        axes.set_xlabel("depth")
        axes.set_ylabel("test accuracy")
        axes.legend()
        return encode(figure)
