"""InterpretableCNN: a spatial filter over electrodes, a temporal one along time, and a mean.

    interpretable_cnn    2,706 parameters for 30 electrodes, 384 samples and two states

A window is (electrodes, samples), or an image of one channel with electrodes as rows. The authors'
batch norm keeps no statistics: it normalises by the batch at hand, in evaluation too. Of a batch of
one window, every normalised feature then has the mean β over time, and the answer is the same for
every window. ``norm`` chooses what else to normalise by.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import SmallfryWarning, UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes

__all__ = ["NORMS", "Features", "InterpretableCNN"]

SOURCE = Source("Cui et al. 2022, TNNLS", "cuijiancorbin/EEG-Driver-Drowsiness", "CC0-1.0")
ELECTRODES, SAMPLES = 30, 384
NORMS = ("population", "batch", "running", "subject")


class Features(NamedTuple):
    """Intermediate values of windows, for explanations."""

    temporal: Tensor  # (windows, features, steps), before the ReLU
    normed: Tensor  # (windows, features, steps), behind the batch norm


class InterpretableCNN(nn.Module):
    """Network of the paper; logits (windows, states).

    Args:
        img_size: Electrodes and samples of a window.
        in_chans: 1.
        num_classes: States; 0 leaves the classifier out.
        norm: Statistics in evaluation: ``population``, of all training windows, as the method
            ``eeg-statistics`` sets them; ``subject``, of a subject's own windows, by the same
            method; ``running``, the running averages of training; ``batch``, of the batch at hand,
            as published. Before the method has run, the first two are running averages.
        filters: Spatial filters.
        multiplier: Temporal filters of each.
        kernel: Samples of a temporal filter.
        n_chans: Electrodes, by braindecode's name; ``img_size`` is then not needed.
        n_outputs: States, by braindecode's name.
        n_times: Samples, by braindecode's name.
        sfreq: Samples a second.
        chs_info: Descriptions of the electrodes, of which the number is used.
        input_window_seconds: Length of a window.

    Raises:
        UsageError: Sizes that contradict each other, a window shorter than the kernel, several
            channels, or another norm.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = (ELECTRODES, SAMPLES),
        in_chans: int = 1,
        num_classes: int = 2,
        norm: Literal["population", "batch", "running", "subject"] = "population",
        filters: int = 16,
        multiplier: int = 2,
        kernel: int = 64,
        n_chans: int | None = None,
        n_outputs: int | None = None,
        n_times: int | None = None,
        sfreq: float | None = None,
        chs_info: Sequence[Any] | None = None,
        input_window_seconds: float | None = None,
    ) -> None:
        super().__init__()
        if in_chans != 1:
            raise UsageError(
                f"a window has its electrodes as rows of one channel, not {in_chans} channels"
            )
        if norm not in NORMS:
            raise UsageError(f"norm is {', '.join(NORMS[:-1])} or {NORMS[-1]}, not '{norm}'")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        electrodes = _agreed("electrodes", n_chans, None if chs_info is None else len(chs_info))
        seconds = None
        if sfreq is not None and input_window_seconds is not None:
            seconds = round(sfreq * input_window_seconds)
        samples = _agreed("samples", n_times, seconds)
        self.img_size = (electrodes or height, samples or width)
        if self.img_size[1] < kernel:
            raise UsageError(
                f"a window has {kernel} samples at least, those of a temporal filter, not "
                f"{self.img_size[1]}"
            )
        self.norm_by, self.in_chans = norm, in_chans
        self.multiplier, self.kernel = multiplier, kernel
        self.num_classes = num_classes if n_outputs is None else n_outputs
        self.num_features = self.head_hidden_size = filters * multiplier
        self.spatial = nn.Conv2d(1, filters, (self.img_size[0], 1))
        self.temporal = nn.Conv2d(filters, self.num_features, (1, kernel), groups=filters)
        self.act = nn.ReLU()
        self.norm = nn.BatchNorm2d(self.num_features, track_running_stats=norm != "batch")
        self.fc = linear_classifier(self.num_features, self.num_classes)
        self._has_warned = False

    def features(self, windows: Tensor) -> Features:
        """Compute the features along time of windows (windows, electrodes, samples).

        Raises:
            UsageError: Windows of another shape.
        """
        images = windows[:, None] if windows.ndim == 3 else windows
        if not torch.compiler.is_exporting() and images.shape[1:] != (1, *self.img_size):
            raise UsageError(
                f"a window has {self.img_size[0]} electrodes and {self.img_size[1]} samples, not "
                f"{' × '.join(map(str, images.shape[1:]))}: choose the electrodes that the model "
                "was trained on, in their order, and resample to its rate"
            )
        temporal = self.temporal(self.spatial(images))
        return Features(temporal[:, :, 0], self.norm(self.act(temporal))[:, :, 0])

    def forward_features(self, windows: Tensor) -> Tensor:
        """Compute the means along time, (windows, features).

        Raises:
            UsageError: An export of a network that normalises by the batch at hand.
        """
        if self.norm_by == "batch" and not self.training:
            self._require_batch()
        return self.features(windows).normed.mean(dim=-1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the means, (windows, states)."""
        return features if pre_logits else cast(Tensor, self.fc(features))

    def forward(self, windows: Tensor) -> Tensor:
        """Compute logits of windows (windows, electrodes, samples), or with a channel before."""
        return self.forward_head(self.forward_features(windows))

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 removes it."""
        self.num_classes = num_classes
        self.fc = linear_classifier(self.num_features, num_classes).to(next(self.parameters()))

    def _require_batch(self) -> None:
        if torch.compiler.is_exporting():
            raise UsageError(
                "with norm batch, the answer to a single window is a constant, so it can't be "
                "exported: train with norm population"
            )
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "with norm batch, the answer to a window depends on the others of its batch, and "
                "to a single one it is a constant: scores hold for this batch size and mix of "
                "states alone",
                SmallfryWarning,
                stacklevel=4,
            )


def _agreed(what: str, one: int | None, other: int | None) -> int | None:
    if one is not None and other is not None and one != other:
        raise UsageError(f"the window has {one} {what} by one setting, and {other} by another")
    return other if one is None else one


default_cfgs = generate_default_cfgs(
    {
        "interpretable_cnn": {
            "num_classes": 2,
            "input_size": (1, ELECTRODES, SAMPLES),
            "fixed_input_size": True,
            "mean": (0.0,),
            "std": (1.0,),
            "first_conv": "spatial",
            "classifier": "fc",
        }
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return cast(nn.Module, build_model_with_cfg(InterpretableCNN, name, pretrained, **kwargs))


register_sizes(__name__, ("interpretable_cnn",), _create)
