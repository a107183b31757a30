"""Exact rescaling of channels between layers, for smaller rounding errors of weights.

Equalisation (Nagel et al. 2019, arXiv 1906.04721): between y = W₂ φ(W₁ x + b₁), with φ(c x) =
c φ(x) for c > 0 channel by channel, row i of W₁ and b₁ is divided by sᵢ and column i of W₂
multiplied, sᵢ = √(r₁ / r₂), r the largest magnitudes: both become √(r₁ r₂). A channel with r = 0
stays. Pairs of our own blocks besides convolutions and MLPs with ReLU: values of a gated MLP
(outputs are linear in them) and of attention, channel by channel within a head.

Smoothing (SmoothQuant, arXiv 2211.10438): column j of a linear layer behind a LayerNorm is
multiplied by tⱼ, and the norm's weight and bias divided, tⱼ = max|xⱼ|^α / max|W_:j|^(1−α), which
evens out the inputs.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smallfry.compress.quantize.calls import count_calls, visit
from smallfry.compress.select import DENSE, is_dense
from smallfry.models.layers import Attention, Layer, SwiGLU
from smallfry.transforms.replace import tied_layers

HOMOGENEOUS = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)  # of the channels of images, and so not between linear layers
SWEEPS = 3
SETTLED = 0.01  # largest change of a scale


class Pair(NamedTuple):
    """Two layers, and the scalable channels between them."""

    first: str
    second: str
    rows: slice  # of the first layer's outputs; they are all inputs of the second


def pairs(model: nn.Module, example: Tensor | None = None) -> list[Pair]:
    """Find pairs of layers whose channels can be rescaled exactly.

    Args:
        model: In evaluation mode, left as it is; layers whose weight has other uses are left out.
        example: A batch of inputs, which shows that an ``nn.Sequential`` inside the model is called
            as a whole, as its parts may be called one by one; without it those are left out.
    """
    calls: dict[str, int] = {}
    if example is not None and example.numel():
        calls = count_calls(model, [name for name, _ in model.named_modules()], example).calls
    single = {name for name, names in tied_layers(model).items() if len(names) == 1}
    modules = dict(model.named_modules())
    found = [
        Pair(f"{name}.{pair.first}".lstrip("."), f"{name}.{pair.second}".lstrip("."), pair.rows)
        for name, module in modules.items()
        if type(module) is not nn.Sequential or not name or _is_whole(name, module, calls)
        for pair in _pairs_of(module)
    ]
    return [
        pair
        for pair in found
        if {pair.first, pair.second} <= single
        and all(is_dense(modules[name]) for name in pair[:2])
        and _ungrouped(modules[pair.first]) and _ungrouped(modules[pair.second])
    ]  # fmt: skip


def _is_whole(name: str, chain: nn.Sequential, calls: Mapping[str, int]) -> bool:
    """Return whether all parts of a chain are called as often as the chain itself."""
    parts = [name, *(f"{name}.{child}" for child in chain._modules)]
    return name in calls and len({calls.get(each) for each in parts}) == 1


@torch.no_grad()
def equalize(model: nn.Module, sweeps: int = SWEEPS, example: Tensor | None = None) -> list[Pair]:
    """Equalise all pairs of layers in place; the function of the model stays.

    Args:
        model: Changed in place; in evaluation mode.
        sweeps: Most passes over the pairs; they end when scales change by less than 1 %.
        example: See ``pairs``.

    Returns:
        The pairs.
    """
    found = pairs(model, example)
    for _ in range(sweeps):
        changes = [_equalize(model, pair) for pair in found]
        if max(changes, default=0.0) < SETTLED:
            break
    return found


def _equalize(model: nn.Module, pair: Pair) -> float:
    first, second = (cast(Any, model.get_submodule(name)) for name in pair[:2])
    rows = first.weight[pair.rows]
    before = rows.flatten(1).abs().amax(1).double()
    after = second.weight.transpose(0, 1).flatten(1).abs().amax(1).double()
    scale = torch.where((before > 0) & (after > 0), (before / after).sqrt(), 1.0).to(rows)
    rows.div_(scale.view(-1, *[1] * (rows.ndim - 1)))
    if first.bias is not None:
        first.bias[pair.rows].div_(scale)
    second.weight.mul_(scale.view(1, -1, *[1] * (second.weight.ndim - 2)))
    return float((scale - 1).abs().max())


@torch.no_grad()
def smooth(model: nn.Module, batches: Iterable[Tensor], alpha: float = 0.5) -> list[str]:
    """Divide the outputs of LayerNorms, and multiply the next layers' columns, in place.

    Args:
        model: Changed in place, in evaluation mode.
        batches: Batches of images, for the largest inputs over all calls.
        alpha: Share of the inputs' range that goes to the weights, 0 to 1.

    Returns:
        The names of the linear layers.
    """
    single = {name for name, names in tied_layers(model).items() if len(names) == 1}
    modules = dict(model.named_modules())
    found = {
        second: first
        for first, second in _normed(modules)
        if second in single and isinstance(modules[second], nn.Linear) and is_dense(modules[second])
        and cast(nn.LayerNorm, modules[first]).elementwise_affine
    }  # fmt: skip
    largest: dict[str, Tensor] = {}

    def note(name: str, call: int, inputs: Tensor, output: Tensor) -> None:
        most = inputs.detach().abs().flatten(0, -2).amax(0)
        largest[name] = torch.maximum(largest[name], most) if name in largest else most

    visit(model, found, batches, note)
    for name, most in largest.items():
        layer, norm = cast(nn.Linear, modules[name]), cast(nn.LayerNorm, modules[found[name]])
        columns = layer.weight.abs().amax(0)
        scale = most.double() ** alpha / columns.double() ** (1 - alpha)
        scale = torch.where((most > 0) & (columns > 0), scale, 1.0).to(layer.weight)
        layer.weight.mul_(scale)
        norm.weight.div_(scale)
        if norm.bias is not None:
            norm.bias.div_(scale)
    return list(largest)


def _pairs_of(module: Any) -> Iterator[Pair]:
    """Yield the pairs inside one module, with names relative to it."""
    every = slice(None)
    if isinstance(module, SwiGLU):
        yield Pair("fc1", "fc2", slice(0, module.fc1.out_features // 2))
    elif isinstance(module, Attention) or _is_plain_attention(module):
        width = module.qkv.out_features // 3
        yield Pair("qkv", "proj", slice(2 * width, 3 * width))
    elif isinstance(module, Mlp):
        if isinstance(module.norm, nn.Identity) and isinstance(module.act, HOMOGENEOUS):
            yield Pair("fc1", "fc2", every)
    elif type(module) is nn.Sequential:
        last: str | None = None
        kind: type[nn.Module] = nn.Linear  # of the last; channels of another one are elsewhere
        for name, child in module._modules.items():  # also one that stands there twice
            if isinstance(child, DENSE):
                if last is not None and isinstance(child, kind):
                    yield Pair(last, name, every)
                last = name
                kind = nn.Linear if isinstance(child, nn.Linear) else nn.Conv2d
            elif not isinstance(child, (*HOMOGENEOUS, nn.Dropout)) and not (
                isinstance(child, POOLS) and kind is nn.Conv2d
            ):
                last = None


def _is_plain_attention(module: Any) -> bool:
    return (
        type(module) is TimmAttention
        and isinstance(module.norm, nn.Identity)
        and getattr(module, "gate", None) is None
    )


def _normed(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield LayerNorms with the only layer that reads them, in pre-norm transformer blocks."""
    for name, module in modules.items():
        if type(module) not in (Layer, Block):  # of others the norm may have more readers
            continue
        for norm, reader in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            paths = [f"{name}.{each}".lstrip(".") for each in (norm, reader)]
            part, parent = modules.get(paths[0]), modules.get(paths[1].rpartition(".")[0])
            known = type(parent) in (Attention, SwiGLU, TimmAttention, Mlp)
            if known and isinstance(part, nn.LayerNorm):
                yield paths[0], paths[1]


def _ungrouped(layer: Any) -> bool:
    return getattr(layer, "groups", 1) == 1
