"""RTS2Net: disparity and classes at 1/16, 1/8 and 1/4 of two views' size, each an exit.

Dovesi et al., ICRA 2020, arXiv 1910.00541. What the paper leaves open is completed here: where the
encoder's first stride is, the width of embeddings and refinement, and how the context enters.

    rts2net_c1, c4, c8, c16, c32    by the width c of the encoder
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.kits.stereo.volume import difference_volume, enlarge, soft_argmin
from smallfry.models.sources import Source, register_sizes

__all__ = ["EXITS", "FACTORS", "RTS2Net", "StereoOutput"]

SOURCE = Source("Dovesi et al. 2020, ICRA, arXiv 1910.00541")
EXITS = 3
FACTORS = (16, 8, 4)  # between the views' size and that of an exit
SIZES: Mapping[str, Mapping[str, Any]] = {f"rts2net_c{c}": {"width": c} for c in (1, 4, 8, 16, 32)}
LEAST = 32  # pixels, of which height and width are multiples
AROUND = 2  # candidates on each side of the disparity before
HIDDEN = 32  # channels of the refinement


class FirstExit(NamedTuple):
    """Outputs of one exit; disparities are in pixels of the map."""

    disparity16: Tensor  # (batch, height / 16, width / 16), from the views alone
    refined16: Tensor  # the same with the classes' help
    semantics16: Tensor  # (batch, classes, height / 16, width / 16), logits


class SecondExit(NamedTuple):
    """Outputs of two exits; see ``FirstExit``."""

    disparity16: Tensor
    refined16: Tensor
    semantics16: Tensor
    disparity8: Tensor
    refined8: Tensor
    semantics8: Tensor


class StereoOutput(NamedTuple):
    """Outputs of all three exits; see ``FirstExit``."""

    disparity16: Tensor
    refined16: Tensor
    semantics16: Tensor
    disparity8: Tensor
    refined8: Tensor
    semantics8: Tensor
    disparity4: Tensor
    refined4: Tensor
    semantics4: Tensor


OUTPUTS: tuple[Any, ...] = (FirstExit, SecondExit, StereoOutput)


class Refinement(nn.Module):
    """Correction of a stage's costs by its classes: the synergy of the paper.

    Args:
        classes: Of the semantics.
        candidates: Disparities of the stage.
        before: A refined disparity comes from the stage before.
        blind: Zeros take the place of the classes: a control with the same parameters.
    """

    def __init__(self, classes: int, candidates: int, before: bool, blind: bool) -> None:
        super().__init__()
        self.blind = blind
        self.compress = nn.Sequential(
            nn.Conv2d(classes, candidates, 1, bias=False), nn.BatchNorm2d(candidates), nn.ReLU()
        )
        self.layers = nn.Sequential(
            _block(2 * candidates + before, HIDDEN),
            _block(HIDDEN, HIDDEN),
            nn.Conv2d(HIDDEN, candidates, 3, padding=1),
        )

    def forward(self, cost: Tensor, semantics: Tensor, before: Tensor | None) -> Tensor:
        """Return corrected costs (batch, candidates, height, width).

        Args:
            cost: The same shape.
            semantics: Logits (batch, classes, height, width).
            before: Refined disparity of the stage before at this size, or None.
        """
        compressed = self.compress(semantics.softmax(dim=1))
        if self.blind:
            compressed = compressed * 0
        parts = [compressed, cost] if before is None else [compressed, cost, before[:, None]]
        return cost + cast(Tensor, self.layers(torch.cat(parts, dim=1)))


class Stage(nn.Module):
    """One exit: classes, costs of candidate disparities, and both disparities.

    Args:
        channels: Of the encoder's map.
        context: Channels of the map half as large that joins the classes; 0 for none.
        classes: Of the semantics.
        candidates: Disparities.
        hidden: Channels of the 3-D convolutions.
        blind: See ``Refinement``.
    """

    def __init__(
        self, channels: int, context: int, classes: int, candidates: int, hidden: int, blind: bool
    ) -> None:
        super().__init__()
        self.candidates, self.is_first = candidates, bool(context)
        self.embed = _block(channels, channels)
        self.costs = nn.Sequential(
            *_block3d(channels, hidden),
            *_block3d(hidden, hidden),
            nn.Conv3d(hidden, 1, 3, padding=1),
        )
        self.embed_classes = _block(channels, channels)
        self.context = _block(context, channels) if context else None
        self.head = nn.Conv2d(channels, classes, 1)
        self.refine = Refinement(classes, candidates, not context, blind)

    def forward(
        self, views: Tensor, context: Tensor, before: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the disparity, the refined one, and logits of classes.

        Args:
            views: Features of all left views, then of all right ones, (2 batch, channels, …).
            context: The left views' features half as large, which the first stage takes.
            before: What the stage before returned.
        """
        left, right = _divide(self.embed(views))
        classes = self.embed_classes(_divide(views)[0])
        if self.context is not None:
            classes = classes + enlarge(self.context(context), 2)
        logits = self.head(classes)
        deltas = torch.arange(self.candidates, dtype=left.dtype, device=left.device)
        if before is None:
            volume = difference_volume(left, right, self.candidates)
            base, refined = torch.zeros_like(left[:, 0]), None
        else:
            disparity, refined, others = before
            logits = logits + enlarge(others, 2)
            base = 2 * enlarge(disparity[:, None], 2)[:, 0]
            refined = 2 * enlarge(refined[:, None], 2)[:, 0]
            deltas = deltas - AROUND
            volume = difference_volume(left, right, base[:, None] + deltas[:, None, None])
        cost = self.costs(volume)[:, 0]
        better = self.refine(cost, logits, refined)
        return base + soft_argmin(cost, deltas), base + soft_argmin(better, deltas), logits


class RTS2Net(nn.Module):
    """Semantic stereo network with three exits.

    Args:
        in_chans: Channels of both views together, 6.
        num_classes: Classes of pixels.
        img_size: Height and width, multiples of 32.
        width: Channels c of the encoder at half size; 16 c at 1/32.
        max_disparity: Pixels, a multiple of 16: the coarsest candidates are 0, 16, … below it.
        exits: Stages to build, 1 to 3; later ones need neither weights nor time.
        synergy: ``semantic``; or ``blind``, the control whose refinement sees no classes.

    Raises:
        UsageError: A value out of range.
    """

    def __init__(
        self,
        in_chans: int = 6,
        num_classes: int = 6,
        img_size: int | tuple[int, int] = (64, 128),
        width: int = 8,
        max_disparity: int = 192,
        exits: int = EXITS,
        synergy: Literal["semantic", "blind"] = "semantic",
    ) -> None:
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if in_chans != 6:
            raise UsageError(
                f"a stereo network reads two colour views, 6 channels, not {in_chans}: name stereo "
                "data, such as --data stereo-planes"
            )
        if any(side % LEAST or side < LEAST for side in size):
            raise UsageError(
                f"stereo views have multiples of {LEAST} pixels per side, not {size[0]}×{size[1]}: "
                "set data.image_size"
            )
        if max_disparity % 16 or not 32 <= max_disparity <= 1024:
            raise UsageError(f"max_disparity is 32, 48, … 1024, got {max_disparity}")
        if exits not in (1, 2, 3) or synergy not in ("semantic", "blind"):
            raise UsageError("exits is 1, 2 or 3, and synergy is semantic or blind")
        self.num_classes, self.in_chans, self.img_size = num_classes, in_chans, size
        self.exits = exits
        c = width
        self.stem = nn.Sequential(_block(3, c, 2), _block(c, c))
        widths = (c, 2 * c, 4 * c, 8 * c, 16 * c)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), _block(before, after), _block(after, after))
            for before, after in pairwise(widths)
        )
        blind = synergy == "blind"
        self.stages = nn.ModuleList(
            Stage(
                8 * c >> i,
                0 if i else 16 * c,
                num_classes,
                2 * AROUND + 1 if i else max_disparity // 16,
                4 if i else 16,
                blind,
            )
            for i in range(exits)
        )

    def forward(self, views: Tensor) -> Any:
        """Compute the outputs of all exits for views (batch, 6, height, width), left ones first."""
        features = self.stem(torch.cat(views.chunk(2, dim=1)))
        maps = []
        for block in self.blocks:
            features = block(features)
            maps.append(features)
        context = _divide(maps[3])[0]
        found: list[Tensor] = []
        before = None
        for i, stage in enumerate(self.stages):
            before = stage(maps[2 - i], context, before)
            found += before
        return OUTPUTS[self.exits - 1](*found)


def _divide(views: Tensor) -> tuple[Tensor, Tensor]:
    """Divide features (2 batch, …) into those of the left and of the right views."""
    both = views.view(2, -1, *views.shape[1:])
    return both[0], both[1]


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _block3d(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
    return conv, nn.BatchNorm3d(outputs), nn.ReLU()


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 6,
        "input_size": (6, 64, 128),
        "fixed_input_size": True,
        "mean": (0.5,) * 6,
        "std": (0.25,) * 6,
        "first_conv": "stem.0.0",
        "classifier": "stages.2.head",
    }


default_cfgs = generate_default_cfgs(dict.fromkeys(SIZES, _cfg()))


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    settings = {**SIZES[name], **kwargs}
    return cast(nn.Module, build_model_with_cfg(RTS2Net, name, pretrained, **settings))


register_sizes(__name__, SIZES, _create)
