"""Residual networks of group convolutions (GResNet), and an ordinary network of the same form.

    h ← act(norm(lifting(images)))
    h ← act(h + act(norm(group(act(norm(group(h)))))))
    h ← act(pool(norm(h)));   h ← act(norm(group(h)))
    logits = linear(dropout(act(layernorm(linear(max over elements and places of h)))))

Norms are over channels, elements and places, without weights. The pool takes the maximum of 2×2
places, of three along an odd side. Samples of the group are drawn in
every forward pass, two sets: one for the lifting and the block, one for the last convolution. Or
they are fixed, and the network is an ordinary one whose kernels come from small networks.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.kits.equivariant.group import GL, SL, rotations
from smallfry.layers.group_conv import Geometry, GroupConv2d, LiftingConv2d, Samples
from smallfry.models.pooling import largest
from smallfry.models.sources import Source, register_sizes

__all__ = ["GResNet", "PlainResNet"]

SOURCE = {
    "gl2_resnet*": (
        MIRONENCO := Source(
            "Mironenco and Forré 2024, ICLR, arXiv 2310.11366", "mirceamironenco/rgenn", "MIT"
        )
    ),
    "sl2_resnet*": MIRONENCO,
    "plain_gresnet*": Source("Mironenco & Forré 2024, ICLR, arXiv 2310.11366, without the group"),
}
GROUPS = {"gl2": GL, "sl2": SL}
PARTS = ("lift", "block", "last")  # where samples are used
HIDDEN = 256  # features of the head
Sampling = Literal["fresh", "frozen", "turns"]
SAMPLINGS = ("fresh", "frozen", "turns")


class ResNet(nn.Module):
    """Base: the form of the network, whatever its convolutions.

    Args:
        width: Channels.
        num_classes: Classes; 0 leaves the classifier out.
        kernel_size: Side of all kernels.
        drop_rate: Dropout before the classifier.

    Raises:
        UsageError: No channels, or kernels without a middle.
    """

    def __init__(self, width: int, num_classes: int, kernel_size: int, drop_rate: float) -> None:
        super().__init__()
        if width < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(
                f"width is at least 1 and kernel_size odd, got {width} and {kernel_size}"
            )
        self.kernel_size = kernel_size
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, width, HIDDEN
        self.grad_checkpointing = False
        self.neck = nn.Sequential(
            nn.Linear(width, HIDDEN, bias=False), nn.LayerNorm(HIDDEN), nn.GELU()
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of the residual block in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; pooling stays the maximum."""
        self.num_classes = num_classes
        self.head = _classifier(num_classes).to(next(self.parameters()))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (batch, classes) of features (batch, width, elements, height, width)."""
        pooled: Tensor = self.head_drop(self.neck(largest(features, dims=(2, 3, 4))))
        return pooled if pre_logits else cast(Tensor, self.head(pooled))

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute features (batch, width, elements, height, width)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(images))

    def _run(
        self,
        images: Tensor,
        lift: Callable[[Tensor], Tensor],
        block: Callable[[Tensor], Tensor],
        last: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run the network with the given convolutions, the block's as a whole.

        Raises:
            UsageError: Images smaller than the kernels together.
        """
        least = 3 * self.kernel_size - 1  # of the lifting, and twice that of the last
        if min(images.shape[-2:]) < least:
            raise UsageError(
                f"the network needs images of at least {least}×{least} pixels, not "
                f"{images.shape[-2]}×{images.shape[-1]}: see data.options.size"
            )
        h = F.gelu(_norm(lift(images)))
        again = self.grad_checkpointing and self.training
        change = cast(Tensor, checkpoint(block, h)) if again else block(h)
        h = F.gelu(h + change)
        h = F.gelu(_halve(_norm(h)))
        return F.gelu(_norm(last(h)))


class GResNet(ResNet):
    """Residual network over plane and group.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        group: ``gl2`` or ``sl2``.
        width: Channels for each element.
        samples: Elements.
        variance: Of the samples' shears and scales; see ``GL``.
        sampling: ``fresh``: new samples in every forward pass, when evaluated too; ``frozen``:
            those of ``seed``; ``turns``: rotations by 360° / samples; images have the same logits
            after the quarter turns among them.
        seed: Of the samples.
        kernel_size: Side of all kernels.
        psi_width: Features of the hidden layers of kernel networks.
        psi_hidden: Their hidden layers after the first.
        drop_rate: Dropout before the classifier.

    Raises:
        UsageError: An unknown group or sampling, or no samples.

    Example:
        >>> import torch
        >>> from smallfry.kits.equivariant.models import GResNet
        >>> model = GResNet(width=4, samples=4, sampling="turns").eval()
        >>> images = torch.rand(2, 1, 20, 20)
        >>> with torch.no_grad():
        ...     change = model(images.rot90(1, (2, 3))) - model(images)
        >>> bool(change.abs().max() < 1e-4)
        True
    """

    elements: Tensor
    inverses: Tensor
    draws: Tensor

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 10,
        group: str = "gl2",
        width: int = 40,
        samples: int = 10,
        variance: float = 0.1,
        sampling: Sampling = "fresh",
        seed: int = 0,
        kernel_size: int = 5,
        psi_width: int = 60,
        psi_hidden: int = 2,
        drop_rate: float = 0.3,
    ) -> None:
        super().__init__(width, num_classes, kernel_size, drop_rate)
        if group not in GROUPS:
            raise UsageError(f"group is {' or '.join(GROUPS)}, not '{group}'")
        if sampling not in SAMPLINGS:
            raise UsageError(f"sampling is {', '.join(SAMPLINGS)}, not '{sampling}'")
        if samples < 1:
            raise UsageError(f"samples is at least 1, got {samples}")
        if seed < 0:
            raise UsageError(f"the seed of samples is 0 or more, not {seed}")
        self.group = GROUPS[group](variance=variance)
        self.samples, self.sampling, self.seed = samples, sampling, seed
        psi = {"kernel_size": kernel_size, "width": psi_width, "hidden": psi_hidden}
        self.lift = LiftingConv2d(self.group, in_chans, width, **psi)
        self.conv1 = GroupConv2d(self.group, width, width, **psi)
        self.conv2 = GroupConv2d(self.group, width, width, **psi)
        self.last = GroupConv2d(self.group, width, width, padding=0, **psi)
        places = torch.zeros(2, samples, 2, 2, dtype=torch.float64)
        self.register_buffer("elements", places)  # of the first and the second set
        self.register_buffer("inverses", places.clone())
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))  # so far
        self._draw()
        if sampling != "fresh":
            self._fix()

    def freeze_samples(self, seed: int = 0) -> "GResNet":
        """Fix the samples, so that the network is an ordinary one; returns it.

        Args:
            seed: Of the samples.

        Example:
            >>> model = GResNet(width=4, samples=3).freeze_samples(seed=1).eval()
            >>> bool((model(torch.ones(1, 1, 16, 16)) == model(torch.ones(1, 1, 16, 16))).all())
            True
        """
        self.sampling, self.seed = "frozen", seed
        self.draws.zero_()
        self._draw()
        self._fix()
        return self

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw both sets of samples, a function of the seed and the number of draws so far."""
        if self.sampling == "turns":
            sets = [rotations(self.samples)] * 2
        else:
            words = np.random.SeedSequence([self.seed, int(self.draws)]).generate_state(1)
            generator = torch.Generator().manual_seed(int(words[0]))
            sets = [self.group.sample(self.samples, generator) for _ in range(2)]
            self.draws += 1
        self.elements = torch.stack([each.elements for each in sets]).to(self.elements)
        self.inverses = torch.stack([each.inverses for each in sets]).to(self.inverses)

    def _geometries(self) -> list[Geometry]:
        """Compute the geometry of each part, of the current samples."""
        first, second = (Samples(*each) for each in zip(self.elements, self.inverses, strict=True))
        return [
            self.lift.geometry(first),
            self.conv1.geometry(first, first),
            self.last.geometry(first, second),
        ]

    @torch.no_grad()
    def _fix(self) -> None:
        """Keep the geometry of the current samples; it isn't saved, as the samples are."""
        for part, geometry in zip(PARTS, self._geometries(), strict=True):
            self.register_buffer(f"{part}_coordinates", geometry.coordinates, persistent=False)
            self.register_buffer(f"{part}_factors", geometry.factors, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.sampling != "fresh":
            self._fix()

    def geometries(self) -> list[Geometry]:
        """Return the geometry of the lifting, the block and the last convolution.

        Raises:
            UsageError: Samples are drawn anew each time, and the network is being exported.
        """
        if self.sampling == "fresh":
            if torch.compiler.is_exporting():
                raise UsageError(
                    "the network draws samples of its group in every pass, which no graph can: "
                    "call model.freeze_samples(seed) first, or train with --model.options "
                    "'{sampling: frozen}'"
                )
            self._draw()
            return self._geometries()
        return [
            Geometry(self.get_buffer(f"{part}_coordinates"), self.get_buffer(f"{part}_factors"))
            for part in PARTS
        ]

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute features (batch, width, samples, height, width)."""
        lift, block, last = self.geometries()

        def change(h: Tensor) -> Tensor:
            h = F.gelu(_norm(self.conv1.convolve(h, block)))
            return F.gelu(_norm(self.conv2.convolve(h, block)))

        return self._run(
            images,
            lambda given: self.lift.convolve(given, lift),
            change,
            lambda h: self.last.convolve(h, last),
        )


class PlainResNet(ResNet):
    """Counterpart of ``GResNet`` with ordinary convolutions, over the plane alone.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        width: Channels.
        kernel_size: Side of all kernels.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 10,
        width: int = 22,
        kernel_size: int = 5,
        drop_rate: float = 0.3,
    ) -> None:
        super().__init__(width, num_classes, kernel_size, drop_rate)
        half = kernel_size // 2
        self.lift = nn.Conv2d(in_chans, width, kernel_size, bias=False)
        self.conv1 = nn.Conv2d(width, width, kernel_size, padding=half, bias=False)
        self.conv2 = nn.Conv2d(width, width, kernel_size, padding=half, bias=False)
        self.last = nn.Conv2d(width, width, kernel_size, bias=False)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute features (batch, width, 1, height, width)."""

        def change(h: Tensor) -> Tensor:
            h = F.gelu(_norm(self.conv1(h.flatten(1, 2)).unsqueeze(2)))
            return F.gelu(_norm(self.conv2(h.flatten(1, 2)).unsqueeze(2)))

        return self._run(
            images,
            lambda given: self.lift(given).unsqueeze(2),
            change,
            lambda h: self.last(h.flatten(1, 2)).unsqueeze(2),
        )


def _norm(features: Tensor) -> Tensor:
    """Normalise (batch, channels, samples, height, width) for each image."""
    return F.layer_norm(features, features.shape[1:])


def _halve(features: Tensor) -> Tensor:
    """Take the maximum of each two places along a side, of three where the side is odd.

    Windows that lie symmetrically on the side move with the image when it is turned.
    """
    kernel = tuple(2 + side % 2 for side in features.shape[-2:])
    return F.max_pool3d(features, (1, *kernel), stride=(1, 2, 2))


def _classifier(num_classes: int) -> nn.Module:
    return nn.Linear(HIDDEN, num_classes) if num_classes > 0 else nn.Identity()


TURNS = {"width": 12, "samples": 4, "sampling": "turns", "psi_width": 24}
SIZES: Mapping[str, Mapping[str, Any]] = {  # parameters for ten classes
    "gl2_resnet": {"group": "gl2"},  # 339,282
    "sl2_resnet": {"group": "sl2"},  # 339,102
    "gl2_resnet_turns": {"group": "gl2", **TURNS},
    "plain_gresnet": {"width": 22},
}
SIDES = {"gl2_resnet": 40, "sl2_resnet": 40}


def _cfg(name: str) -> dict[str, Any]:
    side = SIDES.get(name, 16)
    return {
        "num_classes": 10,
        "input_size": (1, side, side),
        "mean": (0.5,),
        "std": (0.5,),
        "first_conv": "lift",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in SIZES})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    kind: type[ResNet] = PlainResNet if name.startswith("plain") else GResNet
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    return build(kind, name, pretrained, **{**SIZES[name], **kwargs})


register_sizes(__name__, SIZES, _create)
