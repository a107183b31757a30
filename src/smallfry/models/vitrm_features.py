"""Features of a ViTRM by timm's interface: its memory z after each latent step."""

from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor

from smallfry.models.vitrm_sizes import latent_grid

__all__ = ["feature_info", "intermediates"]


def feature_info(model: Any) -> list[dict[str, Any]]:
    """Return channels and reduction of a ViTRM's memory after each latent step."""
    try:
        rows, _ = latent_grid(model)
    except ValueError:  # features are asked for as rows alone
        rows = model.grid_size[0]
    last = f"blocks.{len(model.blocks) - 1}"
    reduction = max(1, model.input_shape[1] // rows)
    return [
        {"num_chs": model.embed_dim, "reduction": reduction, "module": last}
        for _ in range(model.latent_steps * model.recursion_steps)
    ]


def intermediates(
    model: Any, images: Tensor, indices: int | list[int] | None, output_fmt: str, cut: bool
) -> tuple[Tensor, list[Tensor]]:
    """Compute ``forward_features`` and the memories; see ``ViTRM.forward_intermediates``.

    With ``cut``, the recursion steps behind the last wanted memory are left out.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is NCHW or NLC, not {output_fmt!r}")
    taken, last = feature_take_indices(model.latent_steps * model.recursion_steps, indices)
    x, state = model.embed(images), model.initial_state(images.shape[0])
    found: list[Tensor] = []
    for recursion in range(model.recursion_steps):
        first = recursion * model.latent_steps
        if cut and first > last:
            break
        for step in range(first, first + model.latent_steps):
            state = model.think(x, state)
            if step in taken:
                found.append(state.z)
        state = model.answer(state)
    if output_fmt == "NCHW":
        shape = (images.shape[0], model.embed_dim, *latent_grid(model))
        found = [z.transpose(1, 2).reshape(shape) for z in found]
    return torch.cat(state, dim=1), found
