"""LoopNet whose last stage recurs, with a classifier and an exit after each recursion step.

    x ← the last stage's first layer, of all others' output
    c ← c + act(norm_i(conv3×3(x + c)))     for each further layer of the stage, in step i
    logits, halting logit ← linear(max over places of x + c)

c begins at 0. All steps have the same convolutions, and each its own norms, as the loops of
``LoopNet``. An image may leave after any step (``Recursive``): ``smallfry export --form anytime``.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.models.contract import RecursionStep
from smallfry.models.loopnet import SOURCE as SOURCE
from smallfry.models.loopnet import Layer, LoopNet, Stage
from smallfry.models.pooling import largest
from smallfry.models.sources import register_sizes
from smallfry_runtime.frames import ImageSize, frame_of

__all__ = ["AnytimeLoopNet", "Change"]


class Change(NamedTuple):
    """State between two recursion steps."""

    change: Tensor  # (batch, widths[-1], height, width), c
    done: Tensor  # (batch,), int64, steps taken


class AnytimeLoopNet(LoopNet):
    """LoopNet with early exit between the loops of its last stage.

    Args:
        img_size: Side of images in pixels, or height and width.
        recursion_steps: Loops of the last stage.
        widths: Channels of the stages.
        depths: Layers of each stage after its first, which are residual; at least one in the last.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        whiten: As ``LoopNet``.
        act_layer: Activation, by timm's name.
        logit_scale: Factor of the logits.
        drop_rate: Dropout before the classifier.

    Raises:
        UsageError: No layer that could recur, no steps, or images too small for the stages.

    Example:
        >>> import torch
        >>> model = AnytimeLoopNet(widths=(8, 16), depths=(1, 1), recursion_steps=3)
        >>> [step.logits.shape[1] for step in model.recurse(torch.zeros(2, 3, 32, 32))]
        [10, 10, 10]
    """

    def __init__(
        self,
        img_size: ImageSize = 32,
        recursion_steps: int = 3,
        widths: Sequence[int] = (48, 96),
        depths: Sequence[int] = (1, 2),
        in_chans: int = 3,
        num_classes: int = 10,
        whiten: bool = True,
        act_layer: str = "gelu",
        logit_scale: float = 0.125,
        drop_rate: float = 0.0,
    ) -> None:
        if recursion_steps < 1 or not depths or depths[-1] < 1:
            raise UsageError(
                f"{recursion_steps} recursion steps of {list(depths)[-1:]} layers: the last stage "
                "needs a layer, and there is at least one step"
            )
        loops = (*(1 for _ in depths[1:]), recursion_steps)
        super().__init__(
            *(in_chans, num_classes, widths, depths, loops),
            residual=True,
            whiten=whiten,
            act_layer=act_layer,
            logit_scale=logit_scale,
            drop_rate=drop_rate,
        )
        self.recursion_steps = recursion_steps
        self.img_size = frame_of(img_size)[:2]
        self._places = tuple((side - 1) // 2 ** len(widths) for side in self.img_size)
        if min(self._places) < 1:
            raise UsageError(f"images of {frame_of(img_size)} are too small for the stages")
        self.halt_head = nn.Linear(widths[-1], 1)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.zeros_(self.halt_head.bias)

    def embed(self, inputs: Tensor) -> Tensor:
        """Compute x, (batch, widths[-1], height, width)."""
        features = self.stem_act(self.stem(inputs))
        for stage in self.stages[:-1]:
            features = self._run(stage, features)
        return self._run(self._last.enter, features)

    def initial_state(self, batch_size: int) -> Change:
        """Return no change, after no steps."""
        weight = self.halt_head.weight
        zeros = weight.new_zeros(batch_size, self.num_features, *self._places)
        return Change(zeros, torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def step(self, x: Tensor, state: Change) -> RecursionStep:
        """Apply every layer of the last stage once, and read out the heads.

        Raises:
            UsageError: In training mode, images after different numbers of steps in one batch,
                whose norms have statistics of their own.
        """
        change = state.change
        for layer in cast(Iterable[Layer], self._last.layers):
            change = self._run(partial(self._changed, layer), x, change, state.done)
        pooled = self.head_drop(largest(x + change))
        logits = self.head(pooled) * self.logit_scale if self.num_classes else pooled
        halting = self.halt_head(pooled).squeeze(-1)
        return RecursionStep(Change(change, state.done + 1), logits, halting)

    def recurse(self, inputs: Tensor, steps: int | None = None) -> list[RecursionStep]:
        """Run all recursion steps; beyond the trained ones, norms are those of the last."""
        x = self.embed(inputs)
        found: list[RecursionStep] = []
        state = self.initial_state(len(inputs))
        for _ in range(self.recursion_steps if steps is None else steps):
            found.append(self.step(x, state))
            state = found[-1].state
        return found

    def advance(self, inputs: Tensor, state: Change | None = None) -> RecursionStep:
        """Run one recursion step on images, by default the first."""
        begun = self.initial_state(len(inputs)) if state is None else state
        return self.step(self.embed(inputs), begun)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute x + c after all recursion steps."""
        return self._refined(self.embed(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the maps of the stages, of the last one after all recursion steps.

        Args:
            x: Images (batch, channels, height, width).
            indices: Of the stages; the last so many if an int, all if None.
            norm: Has no effect, as there is no final norm.
            stop_early: Leave out the stages behind the last of these.
            output_fmt: NCHW.
            intermediates_only: Leave out the features.

        Returns:
            ``forward_features`` and the maps, or these alone.

        Raises:
            ValueError: Another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is NCHW, not {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        found: list[Tensor] = []
        features = self.stem_act(self.stem(x))
        for number, stage in enumerate(self.stages):
            if stop_early and intermediates_only and number > last:
                return found
            if stage is self._last:
                features = self._refined(self._run(stage.enter, features))
            else:
                features = self._run(stage, features)
            found += [features] if number in taken else []
        return found if intermediates_only else (features, found)

    def modules_of_steps(self, steps: int) -> list[str]:
        """Return the names of modules that only the steps after the first ``steps`` call."""
        last = f"stages.{len(self.stages) - 1}.layers"
        counts = [len(layer.norms) for layer in cast(Iterable[Layer], self._last.layers)]
        return [
            f"{last}.{layer}.norms.{number}"
            for layer, count in enumerate(counts)
            for number in range(steps, count)
        ]

    @property
    def _last(self) -> Stage:
        return cast(Stage, self.stages[-1])

    def _refined(self, x: Tensor) -> Tensor:
        state = self.initial_state(len(x))
        for _ in range(self.recursion_steps):
            state = self.step(x, state).state
        return x + state.change

    def _run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Apply a part of the network, recomputed in the backward pass where that is set."""
        if self.grad_checkpointing and self.training:
            return cast(Tensor, checkpoint(part, *inputs))
        return part(*inputs)

    def _changed(self, layer: Layer, x: Tensor, change: Tensor, done: Tensor) -> Tensor:
        features = layer.conv(x + change)
        applied: Tensor = layer.act(self._normed(layer, features, done))
        return change + applied

    def _normed(self, layer: Layer, features: Tensor, done: Tensor) -> Tensor:
        """Normalise by the norm of each image's step."""
        norms = [cast(nn.BatchNorm2d, norm) for norm in layer.norms]
        if self.training:
            known = len(done) and not done.is_meta  # on "meta" there are no values: as at first
            number = int(done[0]) if known else 0
            if known and not bool((done == number).all()):
                raise UsageError(
                    "images after different numbers of steps can't be trained on in one batch: "
                    "take the objective every_step or deep_supervision"
                )
            return cast(Tensor, norms[min(number, len(norms) - 1)](features))
        scales, shifts = zip(*map(_affine, norms), strict=True)
        chosen = done.clamp(max=len(norms) - 1)
        scale, shift = (torch.stack(each)[chosen][:, :, None, None] for each in (scales, shifts))
        return features * scale + shift


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift (channels,) of a batch norm in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


SIZES: dict[str, dict[str, Any]] = {
    # 241,369 parameters for 10 classes; 32.4, 40.5 and 48.6 MMAC to the exits, 32×32 images
    "loopnet_anytime_240k": {"widths": (48, 96), "depths": (1, 2), "recursion_steps": 3},
}
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "num_classes": 10,
            "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's
            "std": (0.2470, 0.2435, 0.2616),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "stem",
            "classifier": "head",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    settings = SIZES[name] | kwargs
    stages = tuple(range(len(settings["widths"])))
    features = {"out_indices": stages, "feature_cls": "getter"}
    return build(AnytimeLoopNet, name, pretrained, feature_cfg=features, **settings)


register_sizes(__name__, SIZES, _create)
