"""LoopNet: small convolutional networks with layers that can be applied repeatedly.

    h ← act(conv2×2(image))                            patches whitened; this convolution is frozen
    h ← act(norm(maxpool(conv3×3(h))))                 at the start of each stage
    h ← h + act(norm_i(conv3×3(h))),  i = 1 ... loops  in each further layer of the stage

The weights of a layer are the same in all of its loops, its norms are not. The named sizes use each
layer once: at equal parameters and more arithmetic, shared layers were less accurate on CIFAR-10
(docs/results.md). Whitening, and layers without residual that start as the identity, follow Jordan
2024 (arXiv 2404.00498), for fast training.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.pooling import largest
from smallfry.models.sources import Source, register_sizes

__all__ = ["LoopNet"]

SOURCE = Source("after Jordan 2024, arXiv 2404.00498")

SMALLEST_VARIANCE = 5e-4  # added to those of patches: directions without variance stay small
PATCH = 2  # pixels


class LoopNet(nn.Module):
    """Convolutional network of stages, each at half the resolution of the previous one.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        widths: Channels of the stages.
        depths: Layers of each stage after its first, each with weights of its own.
        loops: Uses of each of these layers in a row.
        residual: Add the input of a layer to its output.
        whiten: Freeze the first convolution; ``initialize`` makes it whiten patches. Otherwise it
            is trained like the others.
        act_layer: Activation, by timm's name.
        logit_scale: Factor of the logits.
        drop_rate: Dropout before the classifier.

    Raises:
        UsageError: Stages without a depth or loops, or an impossible size.

    Example:
        >>> import torch
        >>> from smallfry.models import LoopNet
        >>> LoopNet(widths=(8, 16), depths=(1, 1), loops=(1, 2))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        widths: Sequence[int] = (64, 256, 256),
        depths: Sequence[int] = (1, 1, 1),
        loops: Sequence[int] = (1, 1, 1),
        residual: bool = False,
        whiten: bool = True,
        act_layer: str = "gelu",
        logit_scale: float = 0.125,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _require_sizes(widths, depths, loops)
        self.num_classes, self.num_features = num_classes, widths[-1]
        self.head_hidden_size, self.logit_scale = widths[-1], logit_scale
        self.grad_checkpointing = False
        act = cast(type[nn.Module], get_act_layer(act_layer))
        patches = 2 * in_chans * PATCH**2  # each direction with both signs
        self.stem = nn.Conv2d(in_chans, patches, PATCH)
        if whiten:
            nn.init.orthogonal_(self.stem.weight)
            self.stem.weight.requires_grad_(False)
        self.stem_act = act()
        ends = list(zip([patches, *widths], widths, strict=False))
        self.stages = nn.Sequential(
            *(
                Stage(before, width, depth, count, residual, act)
                for (before, width), depth, count in zip(ends, depths, loops, strict=True)
            )
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_classifier(widths[-1], num_classes, bias=False)
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (i + 1), "module": f"stages.{i}"}
            for i, width in enumerate(widths)
        ]

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Set the frozen first convolution to whiten patches of such images.

        Args:
            images: (images, channels, height, width), normalised, a few thousand of the training
                set.
        """
        if self.stem.weight.requires_grad:
            return
        patches = images.double().unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (n, c, h, w, 2, 2)
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, self.stem.weight[0].numel())
        variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
        filters = (directions / (variances.clamp(min=0) + SMALLEST_VARIANCE).sqrt()).T
        weight = torch.cat([filters, -filters]).view_as(self.stem.weight)
        self.stem.weight.copy_(weight)
        assert self.stem.bias is not None
        self.stem.bias.zero_()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations inside stages in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; pooling stays the maximum."""
        self.num_classes = num_classes
        self.head = linear_classifier(self.num_features, num_classes, bias=False).to(
            self.stem.weight
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, side, side) to (batch, widths[-1], height, width)."""
        features = self.stem_act(self.stem(images))
        for stage in self.stages:
            if self.grad_checkpointing and self.training:
                features = checkpoint(stage, features)
            else:
                features = stage(features)
        return cast(Tensor, features)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or pooled features (batch, widths[-1])."""
        pooled: Tensor = self.head_drop(largest(features))
        if pre_logits or not self.num_classes:
            return pooled
        logits: Tensor = self.head(pooled) * self.logit_scale
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, channels, side, side)."""
        return self.forward_head(self.forward_features(images))


class Stage(nn.Module):
    """One layer that halves the resolution, and layers that keep it."""

    def __init__(
        self,
        before: int,
        width: int,
        depth: int,
        loops: int,
        residual: bool,
        act: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        convolution = _conv3(before, width, identity=True)
        self.enter = nn.Sequential(convolution, nn.MaxPool2d(2), nn.BatchNorm2d(width), act())
        self.layers = nn.Sequential(*(Layer(width, loops, residual, act) for _ in range(depth)))

    def forward(self, features: Tensor) -> Tensor:
        """Compute features (batch, width, height / 2, width / 2)."""
        return cast(Tensor, self.layers(self.enter(features)))


class Layer(nn.Module):
    """3×3 convolution applied in several loops, with a separate norm for each."""

    def __init__(
        self, width: int, loops: int, residual: bool, act: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.residual = residual
        self.conv = _conv3(width, width, identity=not residual)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(loops))
        self.act = act()

    def forward(self, features: Tensor) -> Tensor:
        """Compute features of the same shape."""
        for norm in self.norms:
            change = self.act(norm(self.conv(features)))
            features = features + change if self.residual else change
        return features


def _conv3(before: int, width: int, identity: bool) -> nn.Conv2d:
    """Build a 3×3 convolution without bias, with first channels optionally set to the identity."""
    convolution = nn.Conv2d(before, width, 3, padding=1, bias=False)
    if identity:
        nn.init.dirac_(convolution.weight.data[:before])
    return convolution


def _require_sizes(
    widths: Sequence[int],
    depths: Sequence[int],
    loops: Sequence[int],
) -> None:
    if not len(widths) == len(depths) == len(loops) or not widths:
        raise UsageError(
            f"widths, depths and loops need a number for each stage, not {len(widths)}, "
            f"{len(depths)} and {len(loops)} numbers"
        )
    if min(widths) < 1 or min(loops) < 1 or min(depths) < 0:
        raise UsageError("widths and loops are at least 1, depths at least 0")


def _cfg() -> dict[str, Any]:
    return {
        "input_size": (3, 32, 32),
        "num_classes": 10,
        "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's
        "std": (0.2470, 0.2435, 0.2616),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "stem",
        "classifier": "head",
    }


SIZES: dict[str, dict[str, Any]] = {  # parameters and MMAC for 10 classes of 32×32 images
    # 68,616 and 12.0
    "loopnet_70k": {"widths": (24, 48), "depths": (2, 2), "loops": (1, 1), "residual": True},
    # 286,648 and 38.0
    "loopnet_300k": {"widths": (48, 64, 64), "depths": (3, 3, 1), "residual": True},
    "loopnet_1m": {"widths": (64, 160, 192)},  # 985,400 and 70.4
    "loopnet_2m": {"widths": (64, 256, 256)},  # 1,972,792 and 118.1
}
default_cfgs = generate_default_cfgs({name: _cfg() for name in SIZES})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    settings = SIZES[name] | kwargs
    stages = tuple(range(len(settings["widths"])))
    features = {"out_indices": stages, "feature_cls": "hook"}
    return build(LoopNet, name, pretrained, feature_cfg=features, **settings)


register_sizes(__name__, SIZES, _create)
