"""Students: U-Nets for masks of 48×64 pixels and more, and a policy network.

    unet_s      1,562,275 parameters for three classes, the size of the paper's
    unet_xs     98,347
    pilot_net   63,796: four actions from a picture and the last action

A U-Net has two convolutions a level, halves the sides by max-pooling, and doubles them again by
transposed convolutions with skips (Ronneberger et al. 2015, arXiv 1505.04597).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes

__all__ = ["PilotNet", "UNet"]

SOURCE = {
    "unet_*": Source("Ronneberger et al. 2015, arXiv 1505.04597"),
    "pilot_net": Source("our own design, after the problem of arXiv 2510.16624"),
}
SIZES: Mapping[str, tuple[int, ...]] = {"unet_s": (32, 64, 128, 192), "unet_xs": (8, 16, 32, 48)}
ACTIONS = 4
PILOT_WIDTHS = (16, 32, 48, 64)


class UNet(nn.Module):
    """U-Net: logits (batch, classes, height, width) of images.

    Args:
        img_size: Height and width; multiples of 2 to the number of levels but one.
        in_chans: Channels.
        num_classes: Classes; 0 leaves the classifier out.
        widths: Channels of each level.

    Raises:
        UsageError: A side that can't be halved so often.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = (48, 64),
        in_chans: int = 3,
        num_classes: int = 3,
        widths: tuple[int, ...] = SIZES["unet_xs"],
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        part = 2 ** (len(widths) - 1)
        if height % part or width % part:
            raise UsageError(
                f"a U-Net of {len(widths)} levels takes sides that are multiples of {part}, not "
                f"{height}×{width}: set data.image_size"
            )
        self.img_size, self.in_chans, self.num_classes = (height, width), in_chans, num_classes
        self.num_features = self.head_hidden_size = widths[0]
        before = (in_chans, *widths[:-1])
        self.down = nn.ModuleList(map(_double, before, widths))
        self.pool = nn.MaxPool2d(2)
        upwards = widths[::-1]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(deep, high, 2, stride=2) for deep, high in pairwise(upwards)
        )
        self.join = nn.ModuleList(_double(2 * high, high) for high in upwards[1:])
        self.head = _classifier(widths[0], num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute features of each pixel, (batch, features, height, width)."""
        skips: list[Tensor] = []
        features = images
        for level in self.down:
            features = level(self.pool(features) if skips else features)
            skips.append(features)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            features = join(torch.cat([skip, up(features)], dim=1))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify each pixel."""
        return features if pre_logits else cast(Tensor, self.head(features))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes, height, width) of (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the classifier of a pixel."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 removes it."""
        self.num_classes = num_classes
        self.head = _classifier(self.num_features, num_classes).to(next(self.parameters()))


class PilotNet(nn.Module):
    """Policy network: logits (batch, actions) of a picture and the last action.

    The last action is in the input as one constant channel for each action, positive for the one
    that was taken and not for the others, as normalisation of a channel of 0 and 255 leaves it.
    Features are averaged over rows only: columns keep the side on which something is.

    Args:
        img_size: Height and width, 17 pixels at least.
        in_chans: Channels: the picture's, and one for each action.
        num_classes: Actions; 0 leaves the classifier out.

    Raises:
        UsageError: Too few channels, or images that are too small.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = (48, 64),
        in_chans: int = 3 + ACTIONS,
        num_classes: int = ACTIONS,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.colours = in_chans - ACTIONS
        if self.colours < 1:
            raise UsageError(
                f"pilot_net takes a picture's channels and one for each of {ACTIONS} last actions, "
                f"such as 7, not {in_chans}: train it on uav-flights"
            )
        if min(height, width) < 2 ** len(PILOT_WIDTHS) + 1:
            raise UsageError(f"pilot_net takes images of 17 pixels and more, not {height}×{width}")
        self.img_size, self.in_chans, self.num_classes = (height, width), in_chans, num_classes
        before = (self.colours, *PILOT_WIDTHS[:-1])
        layers = [_halving(a, b) for a, b in zip(before, PILOT_WIDTHS, strict=True)]
        self.features = nn.Sequential(*(each for layer in layers for each in layer))
        columns = width
        for _ in PILOT_WIDTHS:
            columns = (columns + 1) // 2
        self.hidden = nn.Linear(PILOT_WIDTHS[-1] * columns + ACTIONS, 64)
        self.act = nn.ReLU()
        self.num_features = self.head_hidden_size = 64
        self.head = linear_classifier(self.num_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute features (batch, 64) of the picture and the last action."""
        pictures, last = images[:, : self.colours], images[:, self.colours :]
        columns = self.features(pictures).mean(dim=2).flatten(1)
        taken = (last[:, :, 0, 0] > 0).to(columns.dtype)
        return cast(Tensor, self.act(self.hidden(torch.cat([columns, taken], dim=1))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits of actions."""
        return features if pre_logits else cast(Tensor, self.head(features))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, actions) of inputs (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 removes it."""
        self.num_classes = num_classes
        self.head = linear_classifier(self.num_features, num_classes).to(next(self.parameters()))


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _halving(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def _classifier(features: int, classes: int) -> nn.Module:
    return nn.Conv2d(features, classes, 1) if classes else nn.Identity()


def _cfg(first: str, channels: int, outputs: int) -> dict[str, Any]:
    return {
        "num_classes": outputs,
        "input_size": (channels, 48, 64),
        "fixed_input_size": True,
        "mean": (0.5,) * channels,
        "std": (0.25,) * channels,
        "first_conv": first,
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {
        **dict.fromkeys(SIZES, _cfg("down.0.0", 3, 3)),
        "pilot_net": _cfg("features.0", 3 + ACTIONS, ACTIONS),
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if name == "pilot_net":
        return cast(nn.Module, build_model_with_cfg(PilotNet, name, pretrained, **kwargs))
    sizes = {"widths": SIZES[name], **kwargs}
    return cast(nn.Module, build_model_with_cfg(UNet, name, pretrained, **sizes))


register_sizes(__name__, (*SIZES, "pilot_net"), _create)
