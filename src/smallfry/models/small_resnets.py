"""ResNets of three stages for 32×32 images: MLPerf Tiny's ResNet-8, and He et al.'s ResNet-20.

    h ← relu(norm(conv3×3(image)))
    h ← relu(shortcut(h) + norm(conv3×3(relu(norm(conv3×3(h))))))      in each block
    logits = linear(mean(h))

``resnet8_mlperf_tiny`` is the network of MLPerf Tiny's image classification (arXiv 2106.07597):
convolutions have biases, and a convolution in the shortcut where the width changes. ``resnet20_he``
is that of section 4.2 of arXiv 1512.03385, with option A: the shortcut is subsampled and padded
with zero channels, so that it has no parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes

__all__ = ["SmallResNet"]

SOURCE = {
    "resnet8*": Source("Banbury et al. 2021, arXiv 2106.07597"),
    "resnet20*": Source("He et al. 2016, arXiv 1512.03385"),
}
Shortcut = Literal["convolution", "zeros"]


class SmallResNet(nn.Module):
    """ResNet of stages of basic blocks, all but the first at half the previous resolution.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        widths: Channels of the stages.
        depth: Blocks of each stage.
        shortcut: Shortcut of blocks that change the width: a 1×1 convolution, or zeros in the new
            channels.
        bias: Give convolutions a bias, although norms follow.
        drop_rate: Dropout before the classifier.

    Raises:
        UsageError: No stage or no block, an unknown shortcut, or widths that get smaller with
            shortcuts of zeros.

    Example:
        >>> import torch
        >>> from smallfry.models.small_resnets import SmallResNet
        >>> SmallResNet(widths=(8, 16), depth=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        depth: int = 3,
        shortcut: Shortcut = "zeros",
        bias: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _require_sizes(widths, depth, shortcut)
        self.num_classes, self.num_features = num_classes, widths[-1]
        self.head_hidden_size = widths[-1]
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, before = [], widths[0]
        for stage, width in enumerate(widths):
            blocks = []
            for number in range(depth):
                stride = 2 if stage and not number else 1
                blocks.append(Block(before, width, stride, shortcut, bias))
                before = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_classifier(widths[-1], num_classes)
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(widths)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations inside stages in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; pooling stays the mean."""
        self.num_classes = num_classes
        self.head = linear_classifier(self.num_features, num_classes).to(self.conv1.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, side, side) to (batch, widths[-1], height, width)."""
        features = F.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            if self.grad_checkpointing and self.training:
                features = checkpoint(stage, features)
            else:
                features = stage(features)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or pooled features (batch, widths[-1])."""
        pooled: Tensor = self.head_drop(features.mean(dim=(2, 3)))
        return pooled if pre_logits else cast(Tensor, self.head(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, channels, side, side)."""
        return self.forward_head(self.forward_features(images))


class Block(nn.Module):
    """Two 3×3 convolutions with norms, and a shortcut."""

    def __init__(self, before: int, width: int, stride: int, shortcut: str, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            convolution = shortcut == "convolution"
            self.shortcut = (
                nn.Conv2d(before, width, 1, stride, bias=bias)
                if convolution
                else PaddedShortcut(width - before, stride)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Compute features (batch, width, height / stride, width / stride)."""
        change = F.relu(self.bn1(self.conv1(features)))
        return F.relu(self.shortcut(features) + self.bn2(self.conv2(change)))


class PaddedShortcut(nn.Module):
    """Subsampling with zeros in new channels, half of them before the others."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.before, self.stride = channels // 2, stride
        self.after = channels - self.before

    def forward(self, features: Tensor) -> Tensor:
        """Compute features (batch, channels + new, height / stride, width / stride)."""
        thinned = features[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, self.before, self.after))


def _require_sizes(widths: Sequence[int], depth: int, shortcut: str) -> None:
    if not widths or min(widths) < 1 or depth < 1:
        raise UsageError(
            f"a ResNet needs stages of at least one channel and one block, got widths "
            f"{tuple(widths)} and depth {depth}"
        )
    if shortcut not in ("convolution", "zeros"):
        raise UsageError(f"shortcut must be convolution or zeros, not '{shortcut}'")
    if shortcut == "zeros" and list(widths) != sorted(widths):
        raise UsageError(
            f"shortcuts of zeros can't remove channels: widths {tuple(widths)} must not get "
            "smaller, or take shortcut convolution"
        )


SIZES: dict[str, dict[str, Any]] = {
    # 78,186 parameters and 12.5 MMAC for 10 classes
    "resnet8_mlperf_tiny": {"depth": 1, "shortcut": "convolution", "bias": True},
    # option A: 269,722 parameters and 40.6 MMAC
    "resnet20_he": {"depth": 3, "shortcut": "zeros", "bias": False},
}
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's
            "std": (0.2470, 0.2435, 0.2616),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "conv1",
            "classifier": "head",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    settings = {"widths": (16, 32, 64)} | SIZES[name] | kwargs
    stages = tuple(range(len(settings["widths"])))
    features = {"out_indices": stages, "feature_cls": "hook"}
    return build(SmallResNet, name, pretrained, feature_cfg=features, **settings)


register_sizes(__name__, SIZES, _create)
