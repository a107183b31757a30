"""Larger models of ViTRM's paper, and ResNets with the CIFAR stem, a fairer baseline.

``paper_vit_*`` and ``paper_resnet*`` have exactly the paper's sizes (arXiv 2603.19503). Its ResNets
have the ImageNet stem, whose stride and pool leave a 1×1 map of a 32×32 image; ``resnet*_cifar``
have the 3×3 stem of He et al. for small images, and are far stronger.
"""

from collections.abc import Callable
from typing import Any, cast

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry.errors import UsageError
from smallfry.models.sources import Source, register_sizes

SOURCE = {
    "paper_*": Source("Akazan et al. 2026, arXiv 2603.19503"),
    "resnet*": Source("He et al. 2016, arXiv 1512.03385"),
}
STEM = 64  # channels


class NormedPatches(nn.Module):
    """Patches to tokens with a norm on both sides, as the paper's ViTs have it.

    Args:
        img_size: Side of the images, or height and width.
        patch_size: Side of a patch, or height and width.
        in_chans: Channels.
        embed_dim: Features of a token.
        unused: Further arguments that timm passes.

    Raises:
        UsageError: Patches leave a rest of the images.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        embed_dim: int = 512,
        **unused: object,
    ) -> None:
        super().__init__()
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        (height, width), (rows, columns) = self.img_size, self.patch_size
        if height % rows or width % columns:
            raise UsageError(
                f"patches of {rows}×{columns} don't divide images of {height}×{width}: choose "
                "another patch_size or img_size"
            )
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        features = in_chans * rows * columns
        self.norm_in = nn.LayerNorm(features)
        self.proj = nn.Linear(features, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Compute tokens (batch, patches, embed_dim) of images (batch, channels, side, side)."""
        if images.shape[2:] != self.img_size:
            expected, got = (f"{h}×{w}" for h, w in (self.img_size, images.shape[2:]))
            raise ValueError(
                f"expected images of {expected}, got {got}; img_size of create_model() chooses that"
            )
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        tokens: Tensor = self.norm(self.proj(self.norm_in(patches)))
        return tokens

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of patches, under timm's name."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]


class CifarResNet(ResNet):  # type: ignore[misc]  # timm has no types
    """ResNet of timm with a 3×3 stem of stride 1 and no pooling.

    Args:
        block: BasicBlock or Bottleneck.
        layers: Blocks of each stage.
        in_chans: Channels.
        of_timm: Those of timm's ResNet.
    """

    def __init__(self, block: Any, layers: tuple[int, ...], in_chans: int = 3, **of_timm: Any):
        super().__init__(block, layers, in_chans=in_chans, **of_timm)
        self.conv1 = nn.Conv2d(in_chans, STEM, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info["reduction"] //= 2 if info["module"] == "act1" else 4


def _cfg(first: str, head: str) -> dict[str, Any]:
    return {
        "input_size": (3, 32, 32),
        "num_classes": 10,
        "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's
        "std": (0.2470, 0.2435, 0.2616),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": first,
        "classifier": head,
    }


VITS = {  # dim, depth, heads, hidden features; parameters for 10 classes
    "paper_vit_small_patch4_32": (512, 8, 8, 1024),  # 16,876,138
    "paper_vit_base_patch4_32": (768, 12, 12, 3072),  # 85,125,994
    "paper_vit_large_patch4_32": (1024, 24, 16, 4096),  # 302,367,850
}
RESNETS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "paper_resnet18_32": (ResNet, BasicBlock, (2, 2, 2, 2)),  # 11,181,642
    "paper_resnet34_32": (ResNet, BasicBlock, (3, 4, 6, 3)),  # 21,289,802
    "paper_resnet50_32": (ResNet, Bottleneck, (3, 4, 6, 3)),  # 23,528,522
    "resnet18_cifar": (CifarResNet, BasicBlock, (2, 2, 2, 2)),  # 11,173,962
    "resnet34_cifar": (CifarResNet, BasicBlock, (3, 4, 6, 3)),  # 21,282,122
    "resnet50_cifar": (CifarResNet, Bottleneck, (3, 4, 6, 3)),  # 23,520,842
}

default_cfgs = generate_default_cfgs(
    {name: _cfg("patch_embed.proj", "head") | {"fixed_input_size": True} for name in VITS}
    | {name: _cfg("conv1", "fc") for name in RESNETS}
)


def _vit(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    dim, depth, heads, hidden = VITS[name]
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": hidden / dim}
    form = {"img_size": 32, "patch_size": 4, "qkv_bias": False, "embed_layer": NormedPatches}
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    features = {"out_indices": 3, "feature_cls": "getter"}  # as timm's own ViTs
    settings = sizes | form | kwargs
    return build(VisionTransformer, name, pretrained, feature_cfg=features, **settings)


def _resnet(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    kind, block, layers = RESNETS[name]
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    return build(kind, name, pretrained, **({"block": block, "layers": layers} | kwargs))


register_sizes(__name__, VITS, _vit)
register_sizes(__name__, RESNETS, _resnet)
