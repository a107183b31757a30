"""Explanations of InterpretableCNN: the electrodes and moments that speak for a state.

With U the classifier's weights, V the temporal and P the spatial filters, Z the filtered window and
A the normalised features, for a state s:

    E(f, t)   = U[s, f] A(f, t)                                     evidence
    r(p)      = P[⌊f/d⌋, p] Σ_τ X[p, t+τ] V[f, τ]                   shares of the electrodes in Z
    p*        = argmax_p r(p) sign Z(f, t),   q = t + k/2           the marked point

of the 99 greatest values of E where A and Z have one sign. Heat is a bell of 32 samples' width,
unless another is given, along time around each marked point, Cui et al. 2022.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from smallfry.kits.eeg.models import InterpretableCNN
from smallfry.transforms.modes import evaluating

__all__ = ["Explanation", "Hits", "explain", "pointing_game"]

Floats = NDArray[np.float64]
MOST = 100  # the value of this rank is the threshold of evidence
WIDTH = 32  # samples


class Explanation(NamedTuple):
    """Evidence for one state in one window."""

    heat: Floats  # (electrodes, samples), of mean 0
    points: NDArray[np.int64]  # (marked points, 2): electrode and sample, greatest evidence first


class Hits(NamedTuple):
    """Outcome of a pointing game: the greatest evidence against the marked truth."""

    windows: int  # with a truth
    hits: int  # whose first point is in it
    share: float  # of electrodes and samples in the truth: the chance of a random point

    @property
    def rate(self) -> float:
        """Hits over windows."""
        return self.hits / max(1, self.windows)


@torch.inference_mode()
def explain(
    model: InterpretableCNN, windows: Tensor, states: Tensor, width: int = WIDTH
) -> list[Explanation]:
    """Explain the evidence for a state in each window.

    With norm ``batch``, all windows are one batch.

    Args:
        model: The network.
        windows: (windows, electrodes, samples), normalised.
        states: (windows,), the state to explain of each.
        width: Samples of the bells' width; the paper's 32 are a quarter of a second at 128 a
            second.
    """
    windows = windows.reshape(-1, *model.img_size)
    with evaluating(model):
        found = model.features(windows)
    spatial, temporal = model.spatial.weight[:, 0, :, 0], model.temporal.weight[:, 0, 0]
    head = model.fc.weight
    assert isinstance(head, Tensor)
    explanations = []
    for window, z, normed, state in zip(windows, *found, states.tolist(), strict=True):
        evidence = head[state][:, None] * normed
        threshold = evidence.flatten().sort().values[-min(MOST, evidence.numel())]
        kept = (evidence > threshold) & (normed * z >= 0)
        f, t = kept.nonzero(as_tuple=True)
        order = evidence[f, t].argsort(descending=True, stable=True)
        f, t = f[order], t[order]
        pieces = window.unfold(1, model.kernel, 1)[:, t]  # (electrodes, points, kernel)
        shares = spatial[f // model.multiplier].T * (pieces * temporal[f]).sum(dim=-1)
        electrodes = (shares * z[f, t].sign()).argmax(dim=0)
        points = torch.stack([electrodes, t + model.kernel // 2], dim=1).cpu().numpy()
        unique = np.array([*dict.fromkeys(map(tuple, points.tolist()))], np.int64).reshape(-1, 2)
        explanations.append(Explanation(_heat(unique, model.img_size, width), unique))
    return explanations


def _heat(points: NDArray[np.int64], size: tuple[int, int], width: int) -> Floats:
    """Sum the bells of marked points, and normalise the sum."""
    marks = torch.zeros(size[0], 1, size[1] + 2 * width, dtype=torch.float64)
    marks[points[:, 0], 0, points[:, 1] + width] = 1
    offsets = torch.arange(-width, width, dtype=torch.float64)
    bell = torch.exp(-(offsets**2) / (2 * width**2)) / (width * np.sqrt(2 * np.pi))
    # value at q' is the sum over q of bell(q' - q): a correlation with the mirrored bell
    summed = F.conv1d(marks, bell.flip(0)[None, None])[:, 0, 1 : size[1] + 1]
    heat = np.asarray(summed)
    scale = np.sqrt((heat**2).mean())
    result: Floats = (heat - heat.mean()) / (scale if scale else 1.0)
    return result


def pointing_game(explanations: list[Explanation], masks: NDArray[np.bool_]) -> Hits:
    """Count the explanations whose point of the greatest evidence lies in the truth.

    Args:
        explanations: One for each window.
        masks: (windows, electrodes, samples); windows without any truth are left out.
    """
    chosen = np.flatnonzero(masks.any(axis=(1, 2)))
    hits = 0
    for i in chosen:
        points = explanations[i].points
        hits += bool(len(points) and masks[i][tuple(points[0])])
    return Hits(len(chosen), hits, float(masks[chosen].mean()) if len(chosen) else 0.0)
