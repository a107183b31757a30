"""MobileNetV1 and V2 with ULSAM (Saini, Jha et al. 2020, arXiv 2006.15102).

Networks of timm in which blocks that keep their shape are replaced by ULSAM, or followed by it.
Blocks are counted from 1 as in the paper: 13 separable blocks of V1, 17 bottlenecks of V2. The
paper's tables determine the shape of a replaced block, and not which of several equal ones it is:
the last of them here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import timm
import torch
from timm.models import PretrainedCfg, generate_default_cfgs
from torch import nn

from smallfry.errors import UsageError
from smallfry.layers.ulsam import insert_ulsam, join_subspaces, replace_with_ulsam
from smallfry.models.sources import Source, register_sizes

__all__ = ["block_name"]

SOURCE = Source("Saini, Jha et al. 2020, arXiv 2006.15102")
SIZES: dict[str, tuple[str, tuple[int, ...]]] = {  # timm's network, blocks to replace
    "mobilenetv1_ulsam": ("mobilenetv1_100", (11,)),
    "mobilenetv2_ulsam": ("mobilenetv2_100", (13, 16)),
}
checkpoint_filter_fn = join_subspaces


def block_name(model: nn.Module, number: int) -> str:
    """Return the name of a block, counted from 1.

    Raises:
        UsageError: There are fewer.
    """
    stages = model.get_submodule("blocks")
    names = [
        f"blocks.{stage}.{block}"
        for stage, blocks in stages.named_children()
        for block, _ in blocks.named_children()
    ]
    if not 1 <= number <= len(names):
        raise UsageError(f"blocks are 1 to {len(names)}, not {number}")
    return names[number - 1]


def _cfg(base: str) -> dict[str, Any]:
    known = timm.get_pretrained_cfg(base)
    kept = ("input_size", "num_classes", "mean", "std", "interpolation", "crop_pct")
    cfg = {key: getattr(known, key) for key in kept}
    return cfg | {"first_conv": "conv_stem", "classifier": "classifier"}


default_cfgs = generate_default_cfgs({name: _cfg(base) for name, (base, _) in SIZES.items()})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Build timm's network, and change its blocks.

    Args:
        name: The model.
        pretrained: Refused: nobody published weights.
        kwargs: Those of timm's network, and ``blocks`` to replace, blocks to insert ``after``,
            ``groups`` and ``bn_momentum``.
    """
    if pretrained:
        raise UsageError(f"there are no pretrained weights of {name}")
    base, replaced = SIZES[name]
    given = dict(kwargs)
    blocks: Sequence[int] = given.pop("blocks", replaced)
    after: Sequence[int] = given.pop("after", ())
    settings = {key: given.pop(key) for key in ("groups", "bn_momentum") if key in given}
    cfg = given.get("pretrained_cfg") or default_cfgs[name].default
    cfg = replace(PretrainedCfg(**cfg) if isinstance(cfg, dict) else cfg, architecture=name)
    given["pretrained_cfg"] = cfg
    model: Any = timm.create_model(base, **given)
    side = cfg.input_size[1:]
    example = torch.empty(2, given.get("in_chans", cfg.input_size[0]), *side, device="meta")
    old, followed = ([block_name(model, number) for number in some] for some in (blocks, after))
    insert_ulsam(model, followed, example=example, **settings)
    replace_with_ulsam(model, old, example=example, **settings)
    return cast(nn.Module, model)


register_sizes(__name__, SIZES, _create)
