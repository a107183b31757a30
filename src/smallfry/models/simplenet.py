"""SimpleNet: thirteen plain convolutions (Hasanpour et al. 2016, arXiv 1608.06037).

    x ← dropout(relu(batchnorm(conv(x))))        a number: 3×3 with so many channels; n¹: 1×1
    x ← dropout(maxpool(x))                      p: 2×2
    logits ← linear(dropout(max over positions x))

The code of the authors names the network of 385,790 parameters ``460k``; here it is ``390k``. That
code has no dropout by default, while the published training logs have 0.1 after every pool:
``drop_rate=0.1`` is their setting.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import Any, cast

from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.layers.classifier import linear_classifier
from smallfry.models.pooling import largest
from smallfry.models.sources import Source, register_sizes

SOURCE = Source("Hasanpour et al. 2016, arXiv 1608.06037", "Coderx7/SimpleNet_Pytorch", "MIT")
POOL = "p"
STRIDES: dict[int, tuple[int, ...]] = {
    0: (),
    1: (0, 1, 2),
    2: (0, 1, 3),
    3: (0, 1, 4),
    4: (0, 2, 4),
}
PARTS = 4  # modules of a layer: convolution, norm, activation, dropout


class SimpleNet(nn.Module):
    """Plain convolutional network with global max pooling.

    Args:
        layers: Each ``"p"`` (max pooling), ``"64"`` (3×3 convolution with 64 channels) or
            ``"64x1"`` (1×1 convolution), or one text of them, separated by spaces.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        width: Factor of all channels, rounded.
        stride_mode: Convolutions of stride 2 among the first five: 0 has none, 1 the first three,
            2, 3 and 4 numbers 0, 1, 3; 0, 1, 4 and 0, 2, 4.
        drop_rate: Dropout of channels after each pool, and before the classifier.
        drop_rates: In place of ``drop_rate``, rates by position in ``layers``, from 0, and of
            ``head``.

    Raises:
        UsageError: An unknown layer, stride mode or position.

    Example:
        >>> import torch
        >>> from smallfry.models.simplenet import SimpleNet
        >>> SimpleNet("8 8 p 16 16x1")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        layers: str | Sequence[str],
        in_chans: int = 3,
        num_classes: int = 10,
        width: float = 1.0,
        stride_mode: int = 0,
        drop_rate: float = 0.0,
        drop_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        layers = layers.split() if isinstance(layers, str) else list(layers)
        if stride_mode not in STRIDES:
            raise UsageError(f"stride_mode is 0 to {max(STRIDES)}, not {stride_mode}")
        rates, head_rate = _rates(layers, drop_rate, drop_rates)
        modules: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = []
        channels, reduction = in_chans, 1
        for number, (layer, rate) in enumerate(zip(layers, rates, strict=True)):
            if layer == POOL:
                self._end_stage(channels, reduction, len(modules) - 1)
                modules.append(nn.Sequential(nn.MaxPool2d(2), nn.Dropout2d(rate)))
                reduction *= 2
                continue
            out, kernel = _convolution(layer, width)
            stride = 2 if number in STRIDES[stride_mode] else 1
            modules += _layer(channels, out, kernel, stride, rate)
            channels, reduction = out, reduction * stride
        self._end_stage(channels, reduction, len(modules) - 1)
        self.features = nn.Sequential(*modules)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, channels, channels
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(head_rate)
        self.classifier = linear_classifier(channels, num_classes)

    def _end_stage(self, channels: int, reduction: int, last: int) -> None:
        """Describe a stage of one resolution for timm."""
        info = {"num_chs": channels, "reduction": reduction, "module": f"features.{last}"}
        self.feature_info.append(info)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters of each layer, for layer-wise learning rates."""
        return {"stem": r"^features\.[01]\.", "blocks": r"^features\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations inside layers in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; pooling stays the maximum."""
        self.num_classes = num_classes
        first = cast(nn.Conv2d, self.features[0])
        self.classifier = linear_classifier(self.num_features, num_classes).to(first.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, side, side) to (batch, num_features, height, width)."""
        if self.grad_checkpointing and self.training:
            return cast(Tensor, checkpoint_seq(self.features, images, every=PARTS))
        return cast(Tensor, self.features(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes), or pooled features (batch, num_features)."""
        pooled: Tensor = self.head_drop(largest(features))
        return pooled if pre_logits else cast(Tensor, self.classifier(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, channels, side, side)."""
        return self.forward_head(self.forward_features(images))


def _layer(before: int, out: int, kernel: int, stride: int, rate: float) -> list[nn.Module]:
    convolution = nn.Conv2d(before, out, kernel, stride, padding=kernel // 2)
    nn.init.xavier_uniform_(convolution.weight, gain=sqrt(2))
    return [convolution, nn.BatchNorm2d(out, momentum=0.05), nn.ReLU(), nn.Dropout2d(rate)]


def _convolution(layer: str, width: float) -> tuple[int, int]:
    """Parse a layer's channels and kernel."""
    channels, _, kernel = layer.partition("x")
    if not channels.isdecimal() or kernel not in ("", "1"):
        raise UsageError(f"layers are 'p', '64' or '64x1', not '{layer}'")
    return max(1, round(int(channels) * width)), int(kernel or 3)


def _rates(
    layers: Sequence[str], drop_rate: float, drop_rates: Mapping[str, float] | None
) -> tuple[list[float], float]:
    """Return the dropout rate of each layer, and that of the head."""
    if drop_rates is None:
        return [drop_rate if layer == POOL else 0.0 for layer in layers], drop_rate
    by_name = {str(position): rate for position, rate in drop_rates.items()}
    rates = [by_name.pop(str(i), 0.0) for i in range(len(layers))]
    head = by_name.pop("head", 0.0)
    if by_name:
        raise UsageError(
            f"drop_rates has 0 to {len(layers) - 1} and head, not '{next(iter(by_name))}'"
        )
    return rates, head


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map weights of the authors' networks, some of which count a pool as two modules."""

    def numbers(names: Iterable[str]) -> list[int]:
        return sorted({int(name.split(".")[1]) for name in names if name.startswith("features.")})

    ours = dict(zip(numbers(state), numbers(model.state_dict()), strict=False))
    renamed = {}
    for name, weight in state.items():
        part, *rest = name.split(".")
        if part == "features":
            number = int(rest[0])
            rest[0] = str(ours.get(number, number))
        renamed[".".join((part, *rest))] = weight
    return renamed


SMALL = "64 128 128 128 128 128 p 256 256 256 512 p 2048x1 256x1 256"
LARGE = "128 192 192 192 192 192 p 320 320 320 640 p 2560x1 320x1 320"
SIZES: dict[str, dict[str, Any]] = {
    name: {"layers": layers}
    for name, layers in {
        "simplenet_cifar_310k": "64 32 32 32 p 32 32 64 p 64 64 p 128 256x1 64x1 p 64",
        "simplenet_cifar_390k": "32 32 32 64 p 64 64 64 p 64 64 p 96 96x1 96x1 p 100",
        "simplenet_cifar_5m": "64 128 128 128 p 128 128 256 p 256 256 p 512 2048x1 256x1 p 256",
        "simplenet_cifar_5m_extra_pool": (
            "64 128 128 128 p 128 128 256 p 256 256 p 512 p 2048x1 256x1 p 256"
        ),
    }.items()
} | {
    name.format(mode): {"layers": layers, "width": width, "stride_mode": mode}
    for mode in (1, 2)
    for name, layers, width in (
        ("simplenetv1_small_m{}_05", SMALL, 0.5),
        ("simplenetv1_small_m{}_075", SMALL, 0.75),
        ("simplenetv1_5m_m{}", SMALL, 1.0),
        ("simplenetv1_9m_m{}", LARGE, 1.0),
    )
}


def _cfg(name: str) -> dict[str, Any]:
    common = {"crop_pct": 1.0, "first_conv": "features.0", "classifier": "classifier"}
    if "cifar" in name:
        mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # CIFAR-10's
        return common | {
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "mean": tuple(value / 255 for value in mean),
            "std": tuple(value / 255 for value in std),
        }
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return common | imagenet | {"input_size": (3, 224, 224), "num_classes": 1000, "crop_pct": 0.875}


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in SIZES})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    settings = SIZES[name] | kwargs
    layers = settings["layers"]
    stages = (layers.split() if isinstance(layers, str) else list(layers)).count(POOL) + 1
    features = {"out_indices": tuple(range(stages)), "feature_cls": "hook"}
    filters = {"pretrained_filter_fn": checkpoint_filter_fn, "feature_cfg": features}
    return build(SimpleNet, name, pretrained, **filters, **settings)


register_sizes(__name__, SIZES, _create)
