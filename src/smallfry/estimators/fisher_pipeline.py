"""Fisher vectors of images, from pixels through descriptors and windows to pooled codes.

Both the estimator and its module compute them by this class, from the parts that a fit has found.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.layers.fisher_vector import (
    Mixture,
    Sums,
    fisher_vector,
    log_joint,
    normalized,
    sums_of,
)

__all__ = ["FisherModule", "FisherPipeline", "Whitening", "with_places"]

CONTRAST = 10.0  # added to a patch's variance
STEP = 2  # of local windows, in descriptors


class Whitening(NamedTuple):
    """Principal components, scaled to variance 1."""

    mean: Tensor  # (features,)
    basis: Tensor  # (features, kept)

    def __call__(self, rows: Tensor) -> Tensor:
        """Project rows (..., features)."""
        return (rows - self.mean) @ self.basis


class FisherPipeline:
    """Fisher vectors of images by fitted parts.

    Classes that inherit it have the attributes below.
    """

    layers: int
    patch: int  # side in pixels
    window: int  # side of local windows, in descriptors
    _whitening: Whitening | None  # of patches; None for tables
    _scale: tuple[Tensor, Tensor]  # mean and deviation of a table's columns
    _first: Mixture
    _projection: Tensor  # (projected, features of a window)
    _stacking: Whitening | None
    _second: Mixture

    def _vectors(self, images: Tensor) -> Tensor:
        """Compute the features of images, (images, features)."""
        rows = self._descriptors(images)
        down, across = self._grid(images)
        parts = [_pooled(rows, self._first, down, across)]
        if self.layers == 2:
            second, lines, columns = self._stack(rows, down, across)
            parts.append(_pooled(second, self._second, lines, columns))
        return torch.cat(parts, dim=1)

    def _patches(self, images: Tensor) -> Tensor:
        """Extract patches of equal contrast, (images, places, features)."""
        rows = F.unfold(images, self.patch).transpose(1, 2)
        rows = rows - rows.mean(-1, keepdim=True)
        return rows / (rows.square().mean(-1, keepdim=True) + CONTRAST).sqrt()

    def _descriptors(self, images: Tensor) -> Tensor:
        """Compute descriptors (images, places, features)."""
        if self._whitening is None:
            mean, deviation = self._scale
            return ((images - mean) / deviation)[:, None]
        down, across = (side - self.patch + 1 for side in images.shape[2:])
        return with_places(self._whitening(self._patches(images)), down, across)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        if self._whitening is None:
            return 1, 1
        down, across = (side - self.patch + 1 for side in images.shape[2:])
        return down, across

    def _windows(self, rows: Tensor, down: int, across: int) -> tuple[Tensor, int, int]:
        """Compute Fisher vectors of local windows, (images, windows, features), and their grid."""
        if min(down, across) < self.window + STEP:
            raise UsageError(f"windows of {self.window} leave no neighbours in {down}×{across}")
        posteriors = log_joint(rows, self._first).softmax(-1)
        number = self.window**2

        def boxed(values: Tensor) -> Tensor:
            maps = values.transpose(1, 2).reshape(len(values), -1, down, across)
            return F.avg_pool2d(maps, self.window, STEP) * number

        shape = (*self._first.means.shape,)
        each = [posteriors[..., None] * power[..., None, :] for power in (rows, rows.square())]
        count = boxed(posteriors)
        lines, columns = count.shape[2:]
        first, second = (
            boxed(e.flatten(2)).flatten(2).transpose(1, 2).reshape(len(rows), -1, *shape)
            for e in each
        )
        sums = Sums(count.flatten(2).transpose(1, 2), first, second)
        return normalized(fisher_vector(sums, self._first, number)), lines, columns

    def _stack(self, rows: Tensor, down: int, across: int) -> tuple[Tensor, int, int]:
        """Compute the descriptors of the second layer, and their grid."""
        vectors, lines, columns = self._windows(rows, down, across)
        maps = (vectors @ self._projection.T).transpose(1, 2)
        maps = maps.reshape(len(rows), -1, lines, columns)
        stacked = F.normalize(F.unfold(maps, 2).transpose(1, 2), dim=-1)
        if self._stacking is None:
            return stacked, lines - 1, columns - 1
        whitened = with_places(self._stacking(stacked), lines - 1, columns - 1)
        return whitened, lines - 1, columns - 1


class FisherModule(nn.Module, FisherPipeline):
    """Frozen network of Fisher vectors with timm's model interface.

    Args:
        fitted: Its parts.
        weight: Of the linear classifier, (classes, features).
        bias: (classes,).
        shape: Of an image, (channels, height, width).

    Example:
        >>> import numpy as np
        >>> from smallfry.estimators.deep_fisher import DeepFisherNet
        >>> images = np.random.default_rng(0).integers(0, 256, (8, 1, 12, 12))
        >>> net = DeepFisherNet(components=(2, 2)).fit(images, [0, 1] * 4)
        >>> net.to_module()(torch.zeros(2, 1, 12, 12)).shape
        torch.Size([2, 2])
    """

    projection: Tensor  # of two layers

    def __init__(
        self,
        fitted: FisherPipeline,
        weight: Tensor,
        bias: Tensor,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.layers, self.patch, self.window = fitted.layers, fitted.patch, fitted.window
        parts: dict[str, Any] = {"whitening": fitted._whitening, "first": fitted._first}
        if fitted.layers == 2:
            parts |= {"stacking": fitted._stacking, "second": fitted._second}
            self.register_buffer("projection", fitted._projection.clone())
        for name, part in parts.items():
            for field in part._fields:
                self.register_buffer(f"{name}_{field}", getattr(part, field).clone())
        self.num_features, self.num_classes = weight.shape[1], len(weight)
        self.head: nn.Module = nn.Linear(weight.shape[1], len(weight))
        self.head.load_state_dict({"weight": weight, "bias": bias})
        self.pretrained_cfg = {  # which makes pixels of 0 to 255 of those of 0 to 1
            "input_size": shape,
            "num_classes": len(weight),
            "mean": (0.0,) * shape[0],
            "std": (1 / 255,) * shape[0],
            "classifier": "head",
        }
        self.requires_grad_(False)

    def _part(self, kind: Any, name: str) -> Any:
        return kind(*(getattr(self, f"{name}_{field}") for field in kind._fields))

    @property
    def _whitening(self) -> Whitening:  # type: ignore[override]
        part: Whitening = self._part(Whitening, "whitening")
        return part

    @property
    def _stacking(self) -> Whitening:  # type: ignore[override]
        part: Whitening = self._part(Whitening, "stacking")
        return part

    @property
    def _first(self) -> Mixture:  # type: ignore[override]
        part: Mixture = self._part(Mixture, "first")
        return part

    @property
    def _second(self) -> Mixture:  # type: ignore[override]
        part: Mixture = self._part(Mixture, "second")
        return part

    @property
    def _projection(self) -> Tensor:  # type: ignore[override]
        return self.projection

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute Fisher vectors, (images, features), of pixels from 0 to 255."""
        return self._vectors(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute scores (images, classes) of Fisher vectors; or return these."""
        scores: Tensor = x if pre_logits else self.head(x)
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Compute the support vector machine's scores, (images, classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one, which is trained; 0 gives none."""
        self.num_classes = num_classes
        self.head = linear_classifier(self.num_features, num_classes)


def _pooled(rows: Tensor, mixture: Mixture, down: int, across: int) -> Tensor:
    """Pool over the whole image and, of more than one place, its quarters."""
    posteriors = log_joint(rows, mixture).softmax(-1)

    def of(places: Tensor) -> Tensor:
        sums = sums_of(rows[:, places], posteriors[:, places])
        return normalized(fisher_vector(sums, mixture, len(places)))

    grid = torch.arange(down * across).view(down, across)
    cells = [grid]
    if min(down, across) > 1:
        halves = [half for strip in grid.tensor_split(2) for half in strip.tensor_split(2, dim=1)]
        cells += halves
    vectors = torch.cat([of(cell.flatten()) for cell in cells], dim=1)
    return F.normalize(vectors, dim=1)


def with_places(rows: Tensor, down: int, across: int) -> Tensor:
    """Append positions from -½ to ½ to rows (images, places, features)."""
    lines, columns = (torch.linspace(-0.5, 0.5, n) for n in (down, across))
    places = torch.cartesian_prod(lines, columns).expand(len(rows), -1, -1)
    return torch.cat([rows, places], dim=2)
