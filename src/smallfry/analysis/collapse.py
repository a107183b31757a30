"""Neural collapse: features of a class contract to their mean, and the means spread evenly.

    NC1  tr(Σ_W Σ_B⁺) / K                  features within classes vary less than means between them
    NC2  ‖WWᵀ/‖WWᵀ‖ − E‖, of means likewise   an equiangular tight frame E, or orthogonal (I/√K)
    NC3  ‖W/‖W‖ − Mᵀ/‖M‖‖                  classifier and means M agree
    NC4  share of images whose nearest class mean is another class than the decision

Sources: Papyan, Han, Donoho, PNAS 2020 (metrics); Dang et al., "Neural Collapse in Deep Linear
Networks", ICML 2023 (closed form).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smallfry.analysis.features import Features, collect, collect_layers
from smallfry.analysis.question import Answer, Picture, Subject, Table, register_question
from smallfry.data import Split
from smallfry.data.splits import take_some
from smallfry.errors import RunError, UsageError
from smallfry.io.replace import write_whole
from smallfry.report.figure import COLOURS, GREY, encode, new_figure, plain, save, style
from smallfry.training.augment import Normalize
from smallfry.training.callbacks import Callback, EpochDone, Started
from smallfry.training.config import read_config
from smallfry.training.evaluation_data import load_config_data
from smallfry.training.run import RunFolder, TrainedModel

__all__ = [
    "Collapse",
    "LinearCollapse",
    "WatchCollapse",
    "collapse_threshold",
    "etf_head",
    "linear_collapse",
    "measure_collapse",
    "within_over_between",
]

NEAR = 0.3  # of the median distance between means, below which two classes have merged
SAMPLE = 1000  # training images that the callback looks at
MOST_CLASSES = 40  # that a cosine matrix names


class Collapse(NamedTuple):
    """Measures of neural collapse; 0 is complete collapse.

    Attributes:
        nc1: Variation within classes over that between means.
        nc2_weights: Distance of the classifier from an equiangular tight frame.
        nc2_means: That of the centred class means.
        nc2_orthogonal: That of the class means, not centred, from an orthogonal frame.
        nc3: Distance of the classifier from the class means, both of norm 1.
        nc4: Share of images whose nearest class mean is not the decision.
        equinorm_means: Standard deviation of the norms of class means over their mean.
        equinorm_weights: That of the classifier's rows.
        per_class: Variation within each class over the mean square of the means, (classes,).
        cosines: Between centred class means, (classes, classes).
        distances: Between class means, (classes, classes).
    """

    nc1: float
    nc2_weights: float
    nc2_means: float
    nc2_orthogonal: float
    nc3: float
    nc4: float
    equinorm_means: float
    equinorm_weights: float
    per_class: Tensor
    cosines: Tensor
    distances: Tensor


class LinearCollapse(NamedTuple):
    """Global minimum of a deep linear network on free features.

    Attributes:
        ratio: b/n of each class, to be compared with ``collapse_threshold``.
        root: x of each class; 0 is minority collapse.
        singular_values: Of every layer (s).
        mean_norms: Norms of the class means.
        logits: Output for the own class.
        loss: At the minimum.
    """

    ratio: Tensor
    root: Tensor
    singular_values: Tensor
    mean_norms: Tensor
    logits: Tensor
    loss: float


def within_over_between(features: Tensor, labels: Tensor) -> float:
    """Compute NC1 of features (images, features) in float64; classes without images are left out.

    Example:
        >>> import torch
        >>> points = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        >>> within_over_between(points.double(), torch.tensor([0, 0, 1, 1]))
        0.0
    """
    features = features.double()
    means, index, counts = _means(features, labels)
    centred = means - features.mean(0)
    within = features - means[index]
    # the nonzero part of Σ_B lives in the span of the centred means, of rank K − 1 at most
    _, sizes, axes = torch.linalg.svd(centred / math.sqrt(len(counts)), full_matrices=False)
    limit = max(features.shape) * torch.finfo(sizes.dtype).eps * float(means.norm())
    rank = min(len(counts) - 1, int((sizes > limit).sum()))
    projected = within @ axes[:rank].T
    variances = projected.square().mean(0)
    return float((variances / sizes[:rank].square()).sum() / len(counts))


def measure_collapse(
    features: Tensor, labels: Tensor, weight: Tensor, logits: Tensor | None = None
) -> Collapse:
    """Measure neural collapse of a classifier and its inputs.

    Args:
        features: (images, features); they are taken in float64.
        labels: (images,), of all classes.
        weight: (classes, features).
        logits: (images, classes), for NC4; default features @ weightᵀ.

    Raises:
        UsageError: A class has no image, a label has no class, there is one class, or features are
            not finite.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]], dtype=torch.float64)
        >>> weight = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64)
        >>> found = measure_collapse(features, torch.tensor([0, 0, 1, 1]), weight)
        >>> found.nc1, found.nc4
        (0.0, 0.0)
    """
    features, weight, classes = features.double(), weight.double(), len(weight)
    if classes < 2 or len(torch.unique(labels)) != classes:
        raise UsageError(
            "neural collapse needs images of every class, and two classes at least: got labels of "
            f"{len(torch.unique(labels))} classes, and a classifier of {classes}"
        )
    if not bool(features.isfinite().all()):
        raise UsageError("the features are not finite: the model's training has diverged")
    means, index, _ = _means(features, labels)
    centred = means - features.mean(0)
    eye = torch.eye(classes).double()
    frame = (eye - 1 / classes) / math.sqrt(classes - 1)
    decided = (features @ weight.T if logits is None else logits).argmax(1)
    norms, rows = centred.norm(dim=1), weight.norm(dim=1)
    unit = centred / norms[:, None].clamp(min=1e-300)
    within = (features - means[index]).square().sum(1)
    per_class = torch.zeros(classes).double().index_add_(0, index, within)
    return Collapse(
        within_over_between(features, labels),
        float((_normal(weight @ weight.T) - frame).norm()),
        float((_normal(centred @ centred.T) - frame).norm()),
        float((_normal(means @ means.T) - eye / math.sqrt(classes)).norm()),
        float((_normal(weight) - _normal(centred)).norm()),
        float((_apart(features, means).argmin(1) != decided).double().mean()),
        float(norms.std(correction=0) / norms.mean()),
        float(rows.std(correction=0) / rows.mean()),
        per_class / torch.bincount(index) / norms.square().mean(),
        unit @ unit.T,
        _apart(means, means),
    )


def etf_head(features: int, classes: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a simplex equiangular tight frame (classes, features), a classifier to keep fixed.

    Args:
        features: Columns, at least as many as classes.
        classes: Rows.
        generator: Of the random rotation; default PyTorch's.

    Raises:
        UsageError: Fewer features than classes, or one class.

    Example:
        >>> head = etf_head(8, 4)
        >>> round(float(head[0] @ head[1] / head[0].square().sum()), 6)
        -0.333333
    """
    if classes < 2:
        raise UsageError(f"a frame needs two classes at least, not {classes}")
    if features < classes:
        raise UsageError(f"a frame of {classes} classes needs as many features, not {features}")
    draw = torch.randn(features, classes, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(draw).Q
    eye = torch.eye(classes).double()
    frame: Tensor = math.sqrt(classes / (classes - 1)) * (eye - 1 / classes) @ basis.T
    return frame


def collapse_threshold(layers: int) -> float:
    """Return b/n above which a class collapses to zero, for layers M ≥ 2: (M − 1)^((M−1)/M) / M.

    For one layer it is 1.
    """
    return 1.0 if layers == 1 else float((layers - 1) ** ((layers - 1) / layers) / layers)


def linear_collapse(
    counts: Sequence[int], layers: int, weight_decay: float, feature_decay: float
) -> LinearCollapse:
    """Compute the minimum of ‖W_M…W₁H − Y‖²/2N + λ_W/2 Σ‖W_j‖² + λ_H/2 ‖H‖².

    Each class minimises n/(1 + x^M) + b x over x ≥ 0, b = M N (N λ_W^M λ_H)^(1/M).

    Args:
        counts: Images of each class (n); features are at least as many as classes.
        layers: Linear layers without bias (M).
        weight_decay: λ_W.
        feature_decay: λ_H.

    Raises:
        UsageError: No class, a class without image, or a decay of 0.

    Example:
        >>> found = linear_collapse([20, 10, 5, 5], 2, 5e-3, 5e-3)
        >>> round(found.loss, 8)
        0.0611457
    """
    if not counts or min(counts) < 1 or layers < 1 or min(weight_decay, feature_decay) <= 0:
        raise UsageError("counts and layers are at least 1, and both decays above 0")
    from scipy.optimize import brentq

    total, m = sum(counts), layers
    b = m * total * (total * weight_decay**m * feature_decay) ** (1 / m)
    threshold = collapse_threshold(m)

    def root(ratio: float) -> float:
        if ratio >= threshold:
            return 0.0
        if m == 1:
            return math.sqrt(1 / ratio) - 1
        low, high = ((m - 1) / (m + 1)) ** (1 / m), 1.0

        def slope(x: float) -> float:
            return float(m * x ** (m - 1) / (1 + x**m) ** 2 - ratio)

        while slope(high) > 0:
            high *= 2
        return float(brentq(slope, low, high, xtol=1e-15, rtol=1e-14))

    ratios = [b / n for n in counts]
    x = torch.tensor([root(each) for each in ratios], dtype=torch.float64)
    n = torch.tensor(counts, dtype=torch.float64)
    decay = total * feature_decay
    s = (decay * x**m) ** (1 / (2 * m))
    loss = float((n / (1 + x**m) + b * x).sum() / (2 * total))
    return LinearCollapse(
        n.reciprocal() * b, x, s, s**m / (s ** (2 * m) + decay), x**m / (1 + x**m), loss
    )


class WatchCollapse(Callback):
    """Callback for measuring collapse on training images after each epoch.

    It writes ``collapse.json`` and ``pictures/collapse.png`` into the run folder.

    Example:
        >>> import smallfry
        >>> smallfry.train(epochs=50, callbacks=[WatchCollapse()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_start(self, started: Started) -> None:
        """Load training images, and the rows of a run that goes on."""
        config = read_config(RunFolder(started.folder).config)
        data = load_config_data(config.data)
        self.split: Split = take_some(data.train, SAMPLE, 0)
        self.normalize = Normalize(config.data.mean or data.mean, config.data.std or data.std)
        self.trained = (data.classes, data.image_size, data.channels)
        file = started.folder / "collapse.json"
        done = len(started.history)
        self.rows = _read_rows(file)[:done] if done and file.is_file() else []

    def on_epoch(self, done: EpochDone) -> None:
        """Measure, write and draw."""
        trained = TrainedModel(done.model, *self.trained, self.normalize, {})
        found = collect(trained, self.split.images, self.split.labels)
        measures = _scalars(measure_collapse(*found[:3], found.logits))
        self.rows.append({"epoch": done.epoch, "accuracy": found.accuracy, **measures})
        write_whole(
            done.folder / "collapse.json", (json.dumps(self.rows, indent=1) + "\n").encode()
        )
        with style():
            figure = new_figure(7, 4)
            axes = figure.subplots()
            epochs = [row["epoch"] for row in self.rows]
            names = ("nc1", "nc2_weights", "nc2_means", "nc3", "nc4")
            for colour, name in zip(COLOURS, names, strict=True):
                values = [row[name] or np.nan for row in self.rows]
                axes.plot(epochs, values, ".-", color=colour, label=name.replace("_", " "))
            axes.set_yscale("log")
            axes.set_xlabel("epoch")
            axes.set_title("neural collapse on training images")
            axes.legend()
            (done.folder / "pictures").mkdir(exist_ok=True)
            save(figure, done.folder / "pictures" / "collapse.png")


def _read_rows(file: Path) -> list[dict[str, float]]:
    try:
        rows = [dict(row) for row in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file}: damaged ({error}); remove it, then the run goes on") from error
    return rows


@register_question
def ask(subject: Subject) -> Answer:
    """Measure neural collapse on training images, in all layers."""
    split, classes = subject.training, subject.trained.classes
    found = collect(subject.trained, split.images, split.labels)
    measured = measure_collapse(*found[:3], found.logits)
    layers = {
        name: within_over_between(features, split.labels)
        for name, features in collect_layers(subject.trained, split).items()
    }
    layers["features"] = measured.nc1
    counts = torch.bincount(split.labels, minlength=len(classes))
    rows = [
        [name, int(counts[i]), float(measured.per_class[i]), _nearest(measured, classes, i)]
        for i, name in enumerate(classes)
    ]
    numbers: dict[str, Any] = {
        **_scalars(measured),
        "training_accuracy": found.accuracy,
        "layers": layers,
        "cosines": measured.cosines.tolist(),
        "per_class": measured.per_class.tolist(),
    }
    return Answer(
        "Neural collapse",
        _diagnose(measured, classes, found, counts),
        numbers,
        [
            Picture("Variation within classes over that between them", _draw_layers(layers)),
            Picture("Cosines between class means", _draw_cosines(measured.cosines, classes)),
        ],
        [
            Table(
                "Measures on training images; 0 is complete collapse",
                ["measure", "value"],
                [[name.replace("_", " "), value] for name, value in _scalars(measured).items()],
            ),
            Table("Classes", ["class", "images", "variation", "nearest class"], rows),
        ],
    )


def _diagnose(
    measured: Collapse, classes: Sequence[str], found: Features, counts: Tensor
) -> list[str]:
    """Describe the state of collapse in sentences."""
    state = "far" if measured.nc1 < 0.1 else "halfway" if measured.nc1 < 1 else "not begun"
    lines = [
        f"Collapse: {state}. NC1 is {measured.nc1:.3g}, and the nearest class mean disagrees with "
        f"the decision on {measured.nc4:.2%} of training images ({found.accuracy:.2%} right)."
    ]
    upper = measured.distances[*torch.triu_indices(len(classes), len(classes), 1)]
    middle = float(upper.quantile(0.5))
    pairs = (measured.distances < NEAR * middle).triu(1).nonzero().tolist()
    lines += [
        f"Features of classes {classes[i]} and {classes[j]} have collapsed onto each other: their "
        f"means are {float(measured.distances[i, j]) / middle:.2f} of the median apart."
        for i, j in pairs[:5]
    ]
    frames = {"an equiangular tight frame": measured.nc2_means}
    frames["an orthogonal frame"] = measured.nc2_orthogonal
    nearer = min(frames, key=lambda name: frames[name])
    lines.append(f"Class means are nearer to {nearer} (distance {frames[nearer]:.3g}).")
    small = int(counts.argmin())
    if counts.max() >= 2 * counts.min():
        rare = float(measured.per_class[small] / measured.per_class.quantile(0.5))
        lines.append(
            f"Classes are unequal: {classes[small]} has {int(counts[small])} images of at most "
            f"{int(counts.max())}, and varies {rare:.2g} times the median class."
        )
    return lines


def _means(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return class means, the row of each image, and counts, without empty classes."""
    _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, index, features)
    return sums / counts[:, None], index, counts


def _apart(points: Tensor, others: Tensor) -> Tensor:
    """Compute distances, without the cancellation of a product of matrices."""
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")


def _normal(matrix: Tensor) -> Tensor:
    unit: Tensor = matrix / torch.linalg.norm(matrix).clamp(min=1e-300)
    return unit


def _scalars(measured: Collapse) -> dict[str, float]:
    return {k: v for k, v in measured._asdict().items() if isinstance(v, float)}


def _nearest(measured: Collapse, classes: Sequence[str], number: int) -> str:
    distances = measured.distances[number].clone()
    distances[number] = math.inf
    return classes[int(distances.argmin())]


def _draw_layers(layers: Mapping[str, float]) -> bytes:
    with style():
        figure = new_figure(8, 3.6)
        axes = figure.subplots()
        axes.plot(range(len(layers)), list(layers.values()), ".-", color=COLOURS[0])
        axes.axhline(1, color=GREY, linestyle=":")
        axes.set_yscale("log")
        axes.set_xlabel("layer, in the order of the calls; the last are the classifier's inputs")
        axes.set_ylabel("NC1")
        return encode(figure)


def _draw_cosines(cosines: Tensor, classes: Sequence[str]) -> bytes:
    with style():
        side = min(9.0, 3.0 + 0.25 * len(classes))
        figure = new_figure(side + 1, side)
        axes = figure.subplots()
        drawn = axes.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        axes.grid(False)
        if len(classes) <= MOST_CLASSES:
            axes.set_xticks(range(len(classes)), plain(classes), rotation=90)
            axes.set_yticks(range(len(classes)), plain(classes))
        figure.colorbar(drawn, ax=axes)
        return encode(figure)
