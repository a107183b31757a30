"""ViTRM as the paper writes it down: the whole block on all rows, every time.

What ``smallfry.models.vitrm`` must equal, and what ``benchmarks/vitrm.py`` measures it against.
Parameters have the names of the authors' implementation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainViTRM(nn.Module):
    """Class logits and halting logit of an image, for the default sizes those of the paper."""

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 384,
        depth: int = 3,
        num_heads: int = 6,
        mlp_hidden_dim: int = 512,
        latent_steps: int = 3,
        drop_rate: float = 0.1,
        attn_drop_rate: float | None = None,
    ) -> None:
        super().__init__()
        patches = (img_size // patch_size) ** 2
        self.latent_steps = latent_steps
        self.patch_embed = PlainPatches(in_chans, embed_dim, patch_size, patches)
        self.y_init = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.z_init = nn.Parameter(torch.empty(1, patches, embed_dim))
        attn_drop_rate = drop_rate if attn_drop_rate is None else attn_drop_rate
        self.block = nn.Sequential(
            *(
                PlainLayer(embed_dim, num_heads, mlp_hidden_dim, drop_rate, attn_drop_rate)
                for _ in range(depth)
            )
        )
        self.cls_head = nn.Linear(embed_dim, num_classes)
        self.halt_head = nn.Linear(embed_dim, 1)
        nn.init.xavier_normal_(self.y_init)
        nn.init.xavier_normal_(self.z_init)

    def forward(self, images: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
        """Class logits (batch, classes) and halting logits (batch,) after some recursion steps."""
        y = self.y_init.expand(len(images), -1, -1)
        z = self.z_init.expand(len(images), -1, -1)
        for _ in range(steps):
            y, z = self.step(images, y, z)
        return self.cls_head(y[:, 0]), self.halt_head(y[:, 0])[:, 0]

    def step(self, images: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One recursion step."""
        x = self.patch_embed(images)
        for _ in range(self.latent_steps):
            z = self.block(torch.cat([x, y, z], dim=1))[:, -z.shape[1] :]
        return self.block(torch.cat([y, z], dim=1))[:, :1], z


class PlainPatches(nn.Module):
    def __init__(self, channels: int, dim: int, size: int, patches: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, stride=size)
        self.pos_embed = nn.Parameter(torch.empty(1, patches, dim))
        nn.init.xavier_normal_(self.pos_embed)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2) + self.pos_embed


class PlainLayer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, drop: float, attn_drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, dropout=attn_drop, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * hidden), SwiGLU(), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(drop)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.drop(self.attn(normed, normed, normed, need_weights=False)[0])
        return tokens + self.drop(self.mlp(self.norm2(tokens)))


class SwiGLU(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        value, gate = features.chunk(2, dim=-1)
        return value * F.silu(gate)
