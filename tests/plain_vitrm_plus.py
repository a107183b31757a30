"""ViTRM-plus as its switches are defined: every row of every layer, rotations as complex numbers.

What ``smallfry.models.vitrm_plus`` must equal, for patches of 2 pixels, without dropout.
"""

from itertools import product

import torch
from torch.nn import functional as F


def by_definition(model, images):
    """Logits (batch, classes) of a ViTRMPlus with its own weights; its tokenizer is taken as is."""
    side, heads = model.input_shape[1] // 2, model.blocks[0].attn.heads
    pairs = model.embed_dim // heads // 2

    def angles(rows):
        count = rows.shape[1]
        if count == 1 or model.rotary is None:
            return torch.zeros(count, pairs, dtype=torch.float64)
        own = int(count**0.5)
        at = [(float(i // own), float(i % own)) for i in range(count)]
        at = [((r + 0.5) * side / own - 0.5, (c + 0.5) * side / own - 0.5) for r, c in at]
        frequencies = 100.0 ** -(torch.arange(pairs // 2).double() / (pairs // 2))
        return torch.stack([torch.cat([r * frequencies, c * frequencies]) for r, c in at])

    def turned(t, angles):  # (batch, tokens, heads, head_dim)
        a, b = t.chunk(2, dim=-1)
        t = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([t.real, t.imag], dim=-1)

    def mixed(mlp, rows, sizes):
        value, gate = mlp.fc1(rows).chunk(2, dim=-1)
        done, start = [], 0
        for count in sizes:
            part = gate[:, start : start + count]
            start += count
            if count > 1 and hasattr(mlp, "depthwise"):
                own = int(count**0.5)
                image = F.pad(part.reshape(len(part), own, own, -1), (0, 0, 1, 1, 1, 1))
                kernel = mlp.depthwise.weight[:, 0]
                part = sum(
                    kernel[:, i, j] * image[:, i : i + own, j : j + own]
                    for i, j in product(range(3), range(3))
                ).flatten(1, 2)
            done.append(part)
        return mlp.fc2(value * F.silu(torch.cat(done, dim=1)))

    def block(*parts, across=()):
        rows, sizes = torch.cat(parts, dim=1), [part.shape[1] for part in parts]
        turn = torch.cat([angles(part) for part in (*across, *parts)])
        for layer in model.blocks:
            seen = torch.cat([*across, rows], dim=1)
            qkv = layer.attn.qkv(layer.norm1(seen)).unflatten(-1, (3, heads, -1))
            q, k, v = qkv.unbind(2)
            scores = torch.einsum("bihd,bjhd->bhij", turned(q, turn), turned(k, turn))
            scores = scores[:, :, seen.shape[1] - rows.shape[1] :]
            shares = (scores / q.shape[-1] ** 0.5).softmax(dim=-1)
            read = torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2)
            rows = rows + layer.scale1(layer.attn.proj(read))
            rows = rows + layer.scale2(mixed(layer.mlp, layer.norm2(rows), sizes))
        return rows.split(sizes, dim=1)

    x, (y, z) = model.embed(images), model.initial_state(len(images))
    for _ in range(model.recursion_steps):
        for _ in range(model.latent_steps):
            if model.injection == "add":
                (z,) = block(x + y + z)
            elif model.cross_attention:
                z = block(y, z, across=[x])[1]
            else:
                z = block(x, y, z)[2]
            z = model.z_norm(z)
        answer, read = block(y, z)
        pooled = {"y": answer, "z": read, "both": torch.cat([answer, read], dim=1)}[model.pool]
        if model.pool != "y":
            normed = F.layer_norm(pooled, pooled.shape[-1:])
            pooled = model.pool_weights(normed).softmax(1).transpose(1, 2) @ pooled
        y = model.y_norm(pooled)
    return model.head(y[:, 0])
