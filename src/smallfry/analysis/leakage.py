"""Leakage of the architecture: which family of blocks a running model gives away.

After DeepPeep (Jha, Mittal, Kumar, Mattela, 2020), whose classifier and features are not published:
these are ours. A random forest learns families of building blocks from traces of known networks and
is tested on versions of their code that it has not seen. Traces come from shapes alone, without
time: an observer of operators sees all of it, of memory the allocated bytes, of totals their peak.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from math import log, log2
from typing import Any, NamedTuple

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction import DictVectorizer
from sklearn.metrics import confusion_matrix, mutual_info_score
from sklearn.pipeline import make_pipeline

from smallfry.analysis import families as block_families
from smallfry.analysis.families import build_member, members
from smallfry.analysis.question import Answer, Picture, Subject, Table, register_question
from smallfry.analysis.traces import Operation, find_period, trace_model
from smallfry.report.figure import encode, new_figure, style

__all__ = ["OBSERVERS", "Identified", "features_of", "identify", "make_attack"]

OBSERVERS = ("operators", "memory", "totals")  # from the strongest
CONVOLUTIONS = ("convolution", "pointwise", "depthwise", "grouped")
PRODUCTS = (*CONVOLUTIONS, "addmm", "mm", "bmm")
TREES = 100
WIDEST = 6  # of log₂ ratios; those beyond count there


class Identified(NamedTuple):
    """Families found by an attack, for networks of unseen versions.

    Attributes:
        names: Of the networks.
        true: Their families.
        found: Families by the attack.
        bits: Mutual information of the two.
    """

    names: tuple[str, ...]
    true: tuple[str, ...]
    found: tuple[str, ...]
    bits: float

    @property
    def accuracy(self) -> float:
        """Share of the networks that were identified."""
        return float(np.mean([a == b for a, b in zip(self.true, self.found, strict=True)]))


def features_of(trace: Sequence[Operation], observer: str) -> dict[str, float]:
    """Compute what an observer learns from a trace, as shares and ratios without order or scale.

    Args:
        trace: Of a forward pass.
        observer: ``operators`` sees names and shapes, ``memory`` the bytes after each operator,
            ``totals`` only their peak and the number of operators.

    Example:
        >>> shape = (1, 8, 4, 4)
        >>> trace = [Operation("convolution", shape, 512), Operation("relu", shape, 512)]
        >>> features_of(trace, "operators")["1 relu"]
        0.5
    """
    bytes_ = [each.allocated for each in trace]
    peak = max(bytes_)
    if observer == "totals":
        return {
            "operators": log(len(trace)),
            "peak": log(peak),
            "mean": sum(bytes_) / len(bytes_) / peak,
        }
    if observer == "memory":
        found = _histogram("bytes", [b / a for a, b in pairwise(bytes_) if a and b])
        return {**found, "mean": sum(bytes_) / len(bytes_) / peak}
    names = [each.name for each in trace]
    sizes = [int(np.prod(each.shape)) for each in trace]
    found = _histogram("size", [b / a for a, b in pairwise(sizes) if a and b])
    for length in (1, 2, 3):
        grams = Counter(zip(*(names[i:] for i in range(length)), strict=False))
        total = sum(grams.values()) or 1
        found |= {f"{length} {' '.join(gram)}": n / total for gram, n in grams.items()}
    widths = [e.shape[1] for e in trace if e.name in CONVOLUTIONS]
    found |= _histogram("width", [b / a for a, b in pairwise(widths)])
    convolutions = max(1, len(widths))
    found["same width"] = sum(a == b for a, b in pairwise(widths)) / convolutions
    narrow = [e.shape[1] for e in trace if e.name == "pointwise"]
    found |= _histogram("pointwise", [b / a for a, b in pairwise(narrow)])
    for name in ("add", "cat", "mean", "sigmoid", "mul", "max_pool2d_with_indices"):
        found[f"{name} per convolution"] = names.count(name) / convolutions
    return found


def _histogram(name: str, ratios: Sequence[float]) -> dict[str, float]:
    """Count log₂ ratios, rounded, as shares."""
    places = Counter(max(-WIDEST, min(WIDEST, round(log2(ratio)))) for ratio in ratios)
    return {f"{name} × 2^{place}": count / len(ratios) for place, count in places.items()}


def make_attack(seed: int = 0) -> Any:
    """Build the attack: a random forest on an observer's features, for scikit-learn."""
    forest = RandomForestClassifier(TREES, class_weight="balanced", random_state=seed)
    return make_pipeline(DictVectorizer(sparse=False), forest)


def identify(
    features: Mapping[str, Mapping[str, float]],
    families: Mapping[str, str],
    versions: Mapping[str, str],
    seed: int = 0,
) -> Identified:
    """Attack each version of the networks after learning from all others.

    Args:
        features: An observer's, by network.
        families: Of the networks.
        versions: Of their code.
        seed: Of the forests.
    """
    found: dict[str, str] = {}
    for version in dict.fromkeys(versions.values()):
        known = [name for name in features if versions[name] != version]
        held_out = [name for name in features if versions[name] == version]
        attack = make_attack(seed).fit([features[n] for n in known], [families[n] for n in known])
        answers = attack.predict([features[name] for name in held_out])
        found |= dict(zip(held_out, map(str, answers), strict=True))
    names = tuple(features)
    true, answers = tuple(families[n] for n in names), tuple(found[n] for n in names)
    return Identified(names, true, answers, mutual_info_score(true, answers) / log(2))


@cache
def known_traces() -> dict[str, tuple[Operation, ...]]:
    """Trace the networks of ``FAMILIES``, once in a process."""
    return {each.name: tuple(trace_model(*build_member(each))) for each in members()}


@register_question
def ask(subject: Subject) -> Answer:
    """Attack the known networks and the model, as observers of different power."""
    known = list(members())
    families = {each.name: each.family for each in known}
    versions = {each.name: each.version for each in known}
    traces = known_traces()
    own = trace_model(subject.trained.model, subject.trained.input_shape)
    architecture = subject.trained.spec.architecture
    left_out = versions.get(architecture)
    results, posteriors = {}, {}
    for observer in OBSERVERS:
        features = {name: features_of(trace, observer) for name, trace in traces.items()}
        results[observer] = identify(features, families, versions, subject.seed)
        learnt = [name for name in features if versions[name] != left_out]
        attack = make_attack(subject.seed).fit(
            [features[name] for name in learnt], [families[name] for name in learnt]
        )
        chances = attack.predict_proba([features_of(own, observer)])[0]
        posteriors[observer] = dict(zip(attack.classes_, map(float, chances), strict=True))
    return _answer(results, posteriors, own, families.get(architecture))


def _answer(
    results: Mapping[str, Identified],
    posteriors: Mapping[str, Mapping[str, float]],
    own: Sequence[Operation],
    family: str | None,
) -> Answer:
    period, repeats = find_period([each.name for each in own])
    strongest = results[OBSERVERS[0]]
    guess = max(posteriors[OBSERVERS[0]], key=posteriors[OBSERVERS[0]].__getitem__)
    products = sum(each.name in PRODUCTS for each in own)
    families = len(block_families.FAMILIES)
    findings = [
        f"From the sequence of operators, {strongest.accuracy:.0%} of {len(strongest.names)} known "
        f"networks are assigned to the right one of {families} families, by an attack that has not "
        f"seen their code; from allocated bytes {results['memory'].accuracy:.0%}, from their "
        f"peak {results['totals'].accuracy:.0%}; chance is {1 / families:.0%}.",
        f"This model looks like “{guess}” ({posteriors[OBSERVERS[0]][guess]:.0%} of the trees"
        + (f"; it is listed as “{family}”)." if family else ")."),
        f"{products} products of {len(own)} operators are visible with the shapes of their "
        "outputs, and so are all widths.",
    ]
    if repeats > 1:
        findings.append(
            f"The operators repeat {repeats} times with a period of {period}, "
            f"{period * repeats / len(own):.0%} of all: the number of equal blocks or recursion "
            "steps is visible. A constant number of steps hides it."
        )
    rows = [
        [observer, found.accuracy, found.bits, *_top(posteriors[observer])]
        for observer, found in results.items()
    ]
    head = ["observer", "identified", "bits", "this model", "share of trees"]
    numbers: dict[str, Any] = {
        "identified": {name: found._asdict() for name, found in results.items()},
        "accuracy": {name: found.accuracy for name, found in results.items()},
        "posterior": dict(posteriors),
        "period": period,
        "repetitions": repeats,
        "operators": len(own),
    }
    drawing = _draw(strongest, list(block_families.FAMILIES))
    return Answer(
        "Leakage",
        findings,
        numbers,
        [Picture("Families found from operators", drawing)],
        [Table("Observers", head, rows)],
    )


def _top(posterior: Mapping[str, float]) -> tuple[str, float]:
    best = max(posterior, key=posterior.__getitem__)
    return best, posterior[best]


def _draw(found: Identified, families: Sequence[str]) -> bytes:
    counts = confusion_matrix(found.true, found.found, labels=list(families))
    with style():
        figure = new_figure(7.5, 6.0)
        axes = figure.subplots()
        axes.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="Blues", vmax=1.4)
        for row, column in zip(*counts.nonzero(), strict=True):
            axes.text(column, row, str(counts[row, column]), ha="center", va="center")
        places = range(len(families))
        axes.set_xticks(places, list(families), rotation=45, ha="right")
        axes.set_yticks(places, list(families))
        axes.set_xlabel("family found")
        axes.set_ylabel("family")
        axes.grid(False)
        return encode(figure)
