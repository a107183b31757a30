"""Anchors of a teacher's embeddings, for students trained without the teacher (ECR).

Anchors are the centres of a spherical k-means of the teacher's pooled features. A student gets each
training image's assignment to them as cue tokens (``smallfry.layers.prefix_cues``): no logits and
no hidden states of the teacher. After Embedding Consistency Regulation, arXiv 2601.00543, of which
the abstract alone was at hand: k-means, the sizes, the guess and the consistency loss are this
project's, and the last is not in the paper.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import DataError, UsageError
from smallfry.io.replace import write_whole
from smallfry.transforms.modes import evaluating
from smallfry_runtime.files import read_large

ITERATIONS = 50
TEMPERATURE = 0.1  # of assignments, τ


class AnchorSet(NamedTuple):
    """Anchors of a teacher with the assignments of its training images.

    Example:
        >>> import torch
        >>> from smallfry.compress.distill.anchors import AnchorSet
        >>> anchors = AnchorSet.from_features(torch.randn(50, 8), k=4)
        >>> anchors.assignments.shape, anchors.similarities.shape
        (torch.Size([50, 4]), torch.Size([4, 4]))
    """

    centres: Tensor  # C, (k, width), of norm 1
    similarities: Tensor  # cosines between the centres, (k, k)
    assignments: Tensor  # (images, k), softmax of an image's cosines with the centres over τ

    @classmethod
    def from_features(cls, features: Tensor, k: int = 64, seed: int = 0) -> "AnchorSet":
        """Find the anchors of features.

        Args:
            features: Of a teacher, (images, width).
            k: Number of anchors.
            seed: Random seed of the first centres.

        Raises:
            UsageError: Fewer images than anchors, or features that don't differ.
        """
        if not 1 <= k <= len(features):
            raise UsageError(f"{k} anchors of {len(features)} images: take 1 to {len(features)}")
        rows = features.double() - features.double().mean(dim=0)
        scale = rows.norm(dim=1).mean()
        if not bool(scale > 0):
            raise UsageError("the teacher's features are the same for all images: take another")
        rows = F.normalize(rows / scale, dim=1)
        centres = spherical_k_means(rows, k, seed)
        assignments = (rows @ centres.T / TEMPERATURE).softmax(dim=1)
        return cls(centres.float(), (centres @ centres.T).float(), assignments.float())

    @classmethod
    def from_teacher(
        cls, teacher: nn.Module, batches: Iterable[Tensor], k: int = 64, seed: int = 0
    ) -> "AnchorSet":
        """Find the anchors of a model's pooled features.

        Args:
            teacher: Model of timm's interface; left as it is.
            batches: Batches of its normalised images, in the order of the student's images.
            k: Number of anchors.
            seed: Random seed.

        Raises:
            UsageError: As ``from_features``.
        """
        return cls.from_features(pooled_features(teacher, batches), k, seed)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, all that training needs of the teacher."""
        write_whole(Path(file), safetensors.torch.save(self._asdict()))

    @classmethod
    def load(cls, file: str | Path) -> "AnchorSet":
        """Read a file of ``save``.

        Raises:
            DataError: It can't be read, or holds something else.
        """
        try:
            found = cls(**safetensors.torch.load(read_large(Path(file))))
        except (OSError, SafetensorError, TypeError) as error:
            raise DataError(f"{file}: no file of anchors ({error})") from error
        k = len(found.centres)
        if found.similarities.shape != (k, k) or found.assignments.shape[1:] != (k,):
            raise DataError(f"{file}: anchors and assignments of different numbers")
        return found


@torch.no_grad()
def pooled_features(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Compute the inputs of a model's classifier, (images, width).

    Raises:
        UsageError: The model lacks timm's ``forward_features`` and ``forward_head``.
    """
    network: Any = model
    if not all(hasattr(model, f"forward_{part}") for part in ("features", "head")):
        raise UsageError(f"{type(model).__name__} has no forward_features and forward_head")
    with evaluating(model):
        found = [
            network.forward_head(network.forward_features(batch), pre_logits=True)
            for batch in batches
        ]
    return torch.cat(found)


def spherical_k_means(rows: Tensor, k: int, seed: int) -> Tensor:
    """Cluster rows of norm 1 by their cosines, from k-means++'s first centres.

    Args:
        rows: (count, width), float64.
        k: Number of clusters; one that loses all rows keeps its centre.
        seed: Random seed.

    Returns:
        Centres of norm 1, (k, width).
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    distance = 1 - rows @ rows[chosen[0]]
    while len(chosen) < k:
        weights = distance.clamp(min=1e-12)  # not all are zero, where rows are equal
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - rows @ rows[chosen[-1]])
    centres = rows[chosen]
    for _ in range(ITERATIONS):
        nearest = F.one_hot((rows @ centres.T).argmax(dim=1), k).to(rows)
        sums = nearest.T @ rows
        is_alive = sums.norm(dim=1, keepdim=True) > 0
        fresh = torch.where(is_alive, F.normalize(sums, dim=1), centres)
        if torch.equal(fresh, centres):
            break
        centres = fresh
    return centres


@dataclass
class AnchorConsistency:
    """Loss between the geometry of a student's features and that of the anchors.

    The student's anchors are means of its features, weighed by the assignments, averaged over
    batches. The loss is the mean squared difference of both matrices of cosines. It is an addition
    of this project to ECR, which has no auxiliary loss.

    Args:
        similarities: Cosines between the teacher's anchors, (k, k).
        keep: Share of the averages that a batch leaves.
    """

    similarities: Tensor
    keep: float = 0.99

    def __post_init__(self) -> None:
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def __call__(self, features: Tensor, assignments: Tensor) -> Tensor:
        """Compute the loss of a batch.

        Args:
            features: Of the student, (batch, width).
            assignments: Of the teacher, (batch, k).
        """
        sums, counts = assignments.T @ features, assignments.sum(dim=0)
        if self._sums is not None and self._counts is not None:
            sums = self.keep * self._sums + sums
            counts = self.keep * self._counts + counts
        self._sums, self._counts = sums.detach(), counts.detach()
        means = sums / counts.clamp(min=1e-6)[:, None]
        centred = means - (sums.sum(dim=0) / counts.sum())
        rows = F.normalize(centred, dim=1)
        return (rows @ rows.T - self.similarities.to(rows)).square().mean()
