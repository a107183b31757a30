"""Cues of a teacher's anchors, as further tokens of an image.

    guess = softmax(R · mean(tokens) / τ)          (anchors,)
    cues  = reshape(P â),  â = the teacher's assignment or the guess       (tokens, width)

The idea is that of Embedding Consistency Regulation (arXiv 2601.00543, known by its abstract); that
the network guesses the assignment by itself is this project's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE = 0.1  # τ


class PrefixCues(nn.Module):
    """Tokens made of the assignment of an image to anchors.

    Args:
        width: Of tokens.
        anchors: Number of anchors, k.
        tokens: Number of cue tokens, p.

    Example:
        >>> import torch
        >>> from smallfry.layers.prefix_cues import PrefixCues
        >>> PrefixCues(width=8, anchors=5, tokens=4)(torch.rand(2, 9, 8)).shape
        torch.Size([2, 13, 8])
    """

    def __init__(self, width: int, anchors: int, tokens: int = 4) -> None:
        super().__init__()
        self.width, self.tokens = width, tokens
        self.guess = nn.Linear(width, anchors)  # R
        self.project = nn.Linear(anchors, tokens * width, bias=False)  # P
        nn.init.normal_(self.project.weight, std=width**-0.5)
        self._given: Tensor | None = None
        self._logits: Tensor | None = None

    @contextmanager
    def given(self, assignments: Tensor) -> Iterator[None]:
        """Take a teacher's assignments for a batch, in half of the images instead of the guess.

        Args:
            assignments: (batch, anchors), each row of sum 1.
        """
        self._given = assignments
        try:
            yield
        finally:
            self._given = self._logits = None

    def guess_loss(self) -> Tensor:
        """Compute the cross-entropy of the last guess to the assignments, inside ``given``."""
        if self._given is None or self._logits is None:
            raise RuntimeError("guess_loss comes after a call of the model, inside given")
        return F.cross_entropy(self._logits, self._given)

    def forward(self, tokens: Tensor) -> Tensor:
        """Append cues to tokens (batch, count, width)."""
        logits = self.guess(tokens.mean(dim=1)) / TEMPERATURE
        assignments = logits.softmax(-1)
        if self._given is not None:
            self._logits = logits
            taught = torch.rand(len(tokens), 1, device=tokens.device) < 0.5
            assignments = torch.where(taught, self._given.to(assignments), assignments)
        cues = self.project(assignments).view(-1, self.tokens, self.width)
        return torch.cat([tokens, cues], dim=1)
