"""ViTRM-plus: ViTRM with independent switches.

With all of them off it is ViTRM. What each one is, where it comes from and what it costs is a table
in ``docs/vitrm.md``; which of them the named models take follows evidence from other models, until
an ablation of this one has been measured (``benchmarks/gpu_queue.md``).
"""

from functools import partial
from math import isqrt
from typing import Any, Literal, cast

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.models.grid import ConvSwiGLU, GridLayer, Grids, Rotary, conv_tokenizer, grid_of
from smallfry.models.layers import EVERY, Tokens, end_to_end
from smallfry.models.sources import Source, register_sizes
from smallfry.models.vitrm import (
    FIRST,
    LAST,
    ImageTokens,
    ViTRM,
    image_cfg,
)
from smallfry.models.vitrm_sizes import build_vitrm
from smallfry_runtime.frames import ImageSize

__all__ = ["ViTRMPlus"]

SOURCE = Source("after Akazan et al. 2026, arXiv 2603.19503")

CHOICES = {  # none is a word: timm takes a None for an argument that was not given
    "tokenizer": ("patch", "conv"),
    "positions": ("learned", "rotary", "both"),
    "injection": ("concat", "add"),
    "pool": ("y", "z", "both"),
    "state_norm": ("none", "layer", "rms"),
}
POOLED = {"y": FIRST, "z": LAST, "both": EVERY}


class ViTRMPlus(ViTRM):
    """ViTRM with switches; the defaults are ViTRM itself.

    Args:
        tokenizer: "patch" as ViTRM, or "conv": two 3×3 convolutions.
        depthwise: A 3×3 depthwise convolution in the gate of the SwiGLU, over the grids of x and of
            z; y passes by.
        positions: Of x: "learned" as ViTRM, "rotary" (2-D, of x and z in every layer), or "both".
        injection: How z reads the image and the answer: "concat" as ViTRM, z <- f([x; y; z]), or
            "add" as TRM, z <- f(x + y + z): half the rows.
        pool: What the answer step keeps of f([y; z]) as y: the row of "y" as ViTRM, the rows of "z"
            or of "both" averaged with learned weights (sequence pooling of CCT).
        state_norm: Norm of what f writes into y and z, "layer" or "rms"; with "none" they grow.
        layer_scale: First value of learned factors on both residual branches; 0 for none.
        drop_path: In training, the chance that an image skips a latent step and keeps its z.
        random_depth: In training, take 1 to 2n − 1 latent steps, all equally likely and n on
            average, drawn for each batch and recursion step.
        kwargs: All arguments of ViTRM.

    Raises:
        UsageError: A setting that is none, or that does not go with another.
        ValueError: Sizes that do not fit each other, as ViTRM.

    Example:
        >>> import torch
        >>> from smallfry.models import ViTRMPlus
        >>> model = ViTRMPlus(
        ...     img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=1, num_heads=2,
        ...     mlp_hidden_dim=16, injection="add", pool="z",
        ... )
        >>> model(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        *args: Any,
        tokenizer: Literal["patch", "conv"] = "patch",
        depthwise: bool = False,
        positions: Literal["learned", "rotary", "both"] = "learned",
        injection: Literal["concat", "add"] = "concat",
        pool: Literal["y", "z", "both"] = "y",
        state_norm: Literal["none", "layer", "rms"] = "none",
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
        random_depth: bool = False,
        **kwargs: Any,
    ) -> None:
        chosen = (tokenizer, positions, injection, pool, state_norm)
        for (name, choices), choice in zip(CHOICES.items(), chosen, strict=True):
            if choice not in choices:
                raise UsageError(f"{name} is one of {choices}, not {choice!r}")
        if layer_scale < 0:
            raise UsageError(f"layer_scale must be above 0, or 0 for none, not {layer_scale}")
        if not 0 <= drop_path < 1:
            raise UsageError(f"drop_path is 0 to below 1, not {drop_path}")
        layer = partial(GridLayer, depthwise=depthwise, layer_scale=layer_scale)
        super().__init__(*args, **kwargs | {"layer": layer})
        latents, dim = self.z_init.shape[1:]
        patches = self.grid_size[0] * self.grid_size[1]
        rotary = positions != "learned"
        is_grid = latents == patches or isqrt(latents) ** 2 == latents
        if (rotary or depthwise) and not is_grid:
            raise UsageError(
                "depthwise and rotary positions need a square number of latents, or one per "
                f"patch, not {latents}"
            )
        if injection == "add" and latents != patches:
            raise UsageError(
                f"injection 'add' adds each patch to its own latent: {patches} latents, not "
                f"{latents}; take injection 'concat'"
            )
        if injection == "add" and self.cross_attention:
            raise UsageError(
                "injection 'add' works without cross_attention only: leave one of them out"
            )

        if self.dynamic_img_size and (rotary or depthwise or injection == "add"):
            raise UsageError(
                "dynamic_img_size works with learned positions, injection 'concat' and without "
                "depthwise only: take set_input_size"
            )

        self.injection, self.pool = injection, pool
        self.drop_path, self.random_depth = drop_path, random_depth
        self.why_no_rollout = _why_no_rollout(injection, depthwise, pool)
        if tokenizer == "conv":
            self.patch_embed = conv_tokenizer(self.input_shape[0], dim, self.patch_size)
        if positions == "rotary":
            self.register_parameter("pos_embed", None)
        self.rotary: Rotary | None = None
        if rotary:
            self.rotary = self._make_rotary()
        self._lay_grids()
        self.pool_weights = None if pool == "y" else nn.Linear(dim, 1, bias=False)
        if self.pool_weights is not None:
            nn.init.zeros_(self.pool_weights.weight)  # starts as the mean
        self.y_norm, self.z_norm = _norm(state_norm, dim), _norm(state_norm, dim)

    def set_input_size(self, img_size: ImageSize | None = None, patch_size: None = None) -> None:
        """Take images of another size, as ``ViTRM``; rotary positions are those of the new grid."""
        super().set_input_size(img_size, patch_size)
        if self.rotary is not None:
            self.rotary = self._make_rotary().to(self.y_init.device)
        self._lay_grids()

    def _make_rotary(self) -> Rotary:
        head_dim = self.embed_dim // cast(GridLayer, self.blocks[0]).attn.heads
        latents = grid_of(self.z_init.shape[1], self._grids())
        return Rotary(head_dim, self.grid_size, [self.grid_size, latents])

    def _lay_grids(self) -> None:
        for module in self.blocks.modules():
            if isinstance(module, ConvSwiGLU):
                module.grids = self._grids()

    def _grids(self) -> Grids:
        rows, columns = self.grid_size
        return {rows * columns: self.grid_size}

    # What differs from ViTRM's recursion

    def _thoughts(self) -> int:
        most = 2 * self.latent_steps - 1
        return _draw(most) if self.random_depth and self.training else self.latent_steps

    def _think(self, x: ImageTokens, y: Tokens, z: Tensor) -> Tensor:
        if self.injection == "add":
            thought = self._block([self._project(x.rows[0].rows + y.rows + z)], keep=EVERY)
        else:
            thought = super()._think(x, y, z)
        thought = cast(Tensor, self.z_norm(thought))
        if self.training and self.drop_path:
            skipped = torch.rand(len(thought), 1, 1, device=z.device) < self.drop_path
            thought = torch.where(skipped, z, thought)
        return thought

    def _answer(self, y: Tokens, z: Tensor) -> Tensor:
        rows = self._block([y, self._project(z)], keep=POOLED[self.pool])
        if self.pool_weights is not None:
            weights = self.pool_weights(F.layer_norm(rows, rows.shape[-1:])).softmax(dim=1)
            rows = (weights * rows).sum(dim=1, keepdim=True)
        return cast(Tensor, self.y_norm(rows))

    def _image_tokens(self, x: Tensor) -> ImageTokens:
        if self.injection == "add":  # x is never a part of its own, so nothing is projected
            return ImageTokens([Tokens(x, x[..., :0])], [])
        rows, context = super()._image_tokens(x)
        return ImageTokens(rows, [c if c is None else self._turn(c, [c.shape[1]]) for c in context])

    def _project(self, rows: Tensor) -> Tokens:
        rows, qkv = super()._project(rows)
        return Tokens(rows, self._turn(qkv, [rows.shape[1]]))

    def _turn(self, qkv: Tensor, sizes: list[int]) -> Tensor:
        return qkv if self.rotary is None else cast(Tensor, self.rotary(qkv, sizes))

    def _run_block(self, parts: list[Tokens], keep: slice, context: list[Tensor | None]) -> Tensor:
        rows, qkv, kept = end_to_end(parts, keep, context)
        sizes = [part.rows.shape[1] for part in parts]
        for number, layer in enumerate(self.blocks, start=1):
            if number > 1:
                qkv = self._turn(cast(GridLayer, layer).project(rows), sizes)
            if number < len(self.blocks):
                rows = layer(rows, qkv, EVERY, context[number - 1], sizes)
            else:  # whole grids are kept, so that convolution sees all of their rows
                rows = layer(rows, qkv, kept, context[number - 1], sizes[keep])
        return rows


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a number, which no graph can hold
def _draw(most: int) -> int:
    """Draw from 1 to ``most`` with torch's random state on the CPU, so that resuming is exact."""
    return int(torch.randint(1, most + 1, ()))


def _why_no_rollout(injection: str, depthwise: bool, pool: str) -> str:
    if injection == "add":
        return "it adds the image to its memory, so attention can't separate them"
    if depthwise:
        return "its tokens also meet in convolutions, which attention does not show"
    if pool != "y":
        return "its answer is an average of the memory, not what one token attends to"
    return ""


def _norm(kind: str, dim: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.LayerNorm(dim) if kind == "layer" else nn.RMSNorm(dim)


# The named sizes

CHOSEN: dict[str, Any] = {
    "tokenizer": "conv",
    "depthwise": True,
    "positions": "rotary",
    "injection": "add",
    "pool": "z",
    "state_norm": "rms",
    "layer_scale": 0.1,
}

SIZES: dict[str, dict[str, Any]] = {  # parameters for 10 classes
    "vitrm_plus_small_32": {"mlp_hidden_dim": 480},  # the paper's width: 3,654,779
    # half the paper's width: 957,011
    "vitrm_plus_tiny_32": {"embed_dim": 192, "num_heads": 3, "mlp_hidden_dim": 256},
    "vitrm_plus_micro_8": {  # for 8×8 grey images such as scikit-learn's digits: 116,467
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 64,
        "num_heads": 4,
        "mlp_hidden_dim": 96,
    },
}
default_cfgs = generate_default_cfgs(
    {
        name: image_cfg(sizes.get("img_size", 32), sizes.get("in_chans", 3))
        | {"first_conv": "patch_embed.0"}
        for name, sizes in SIZES.items()
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    return build_vitrm(ViTRMPlus, variant, pretrained, CHOSEN | SIZES[variant] | kwargs)


register_sizes(__name__, SIZES, _create)
