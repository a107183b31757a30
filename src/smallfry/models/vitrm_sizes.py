"""Image sizes of a ViTRM, weights of other sizes, and its memory as maps of features."""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, cast

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from smallfry_runtime.frames import frame_of

__all__ = ["build_vitrm", "resample_tokens", "resampled", "sides_of"]

RENAMED = (  # the authors' names, and ours
    ("patch_embed.proj.", "patch_embed."),
    ("patch_embed.pos_embed", "pos_embed"),
    ("block.", "blocks."),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("mlp.0.", "mlp.fc1."),
    ("mlp.2.", "mlp.fc2."),
    ("cls_head.", "head."),
)


def sides_of(img_size: Any, patch_size: int) -> tuple[int, int]:
    """Return height and width of images, which the patches must divide.

    Raises:
        UsageError: No size of images.
        ValueError: The patches don't divide it.
    """
    height, width = frame_of(img_size, option="img_size")[:2]
    if height % patch_size or width % patch_size:
        size = height if height == width else f"{height}×{width}"
        raise ValueError(
            f"patch_size {patch_size} does not divide img_size {size}: choose an image size "
            f"that is a multiple of {patch_size}, or another patch_size"
        )
    return height, width


def resample_tokens(tokens: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample tokens (1, tokens, dim) of one grid to another, bicubically as timm."""
    return cast(Tensor, resample_abs_pos_embed(tokens, list(new), list(old), num_prefix_tokens=0))


@torch.no_grad()
def resampled(tokens: nn.Parameter, old: tuple[int, int], new: tuple[int, int]) -> nn.Parameter:
    """Return the resampled tokens as a new parameter."""
    return nn.Parameter(resample_tokens(tokens, old, new).clone(), tokens.requires_grad)


def latent_grid(model: Any) -> tuple[int, int]:
    """Return rows and columns of a ViTRM's latents.

    Raises:
        ValueError: They lie on no grid.
    """
    count: int = model.z_init.shape[1]
    rows, columns = model.grid_size
    if count == rows * columns:
        return rows, columns
    side = isqrt(count)
    if side**2 != count:
        raise ValueError(f"{count} latents lie on no grid: take output_fmt NLC")
    return side, side


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """Map weights from the authors' names to ours, and positions of squares to a model's size."""

    def ours(name: str) -> str:
        for theirs, mine in RENAMED:
            if name.startswith(theirs) or f".{theirs}" in name:
                name = name.replace(theirs, mine, 1)
        return name

    found = {ours(name): weight for name, weight in weights.items()}
    if model is None:
        return found
    sized: Any = model  # a ViTRM
    for name in ("pos_embed", *(("z_init",) if sized.latent_per_patch else ())):
        new = getattr(sized, name)
        if name not in found or new is None or found[name].shape[1] == new.shape[1]:
            continue
        side = isqrt(found[name].shape[1])
        if side**2 == found[name].shape[1]:
            found[name] = resample_tokens(found[name], (side, side), sized.grid_size)
    return found


def build_vitrm(
    kind: type[nn.Module], variant: str, pretrained: bool, sizes: Mapping[str, Any]
) -> Any:
    """Build a model with timm, with its weights or as ``features_only`` if asked for."""
    settings = dict(sizes)
    steps = settings.get("latent_steps", 3) * settings.get("recursion_steps", 1)
    taken = settings.pop("out_indices", min(3, steps))
    build = cast(Callable[..., Any], build_model_with_cfg)
    return build(
        *(kind, variant, pretrained),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": taken, "feature_cls": "getter"},
        **settings,
    )
