"""Channel groups of a model, each verified on an example.

The model with channels cut must give the outputs of the model with the channels set to zero.
"""

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smallfry.errors import SmallfryWarning
from smallfry.transforms.declared import declared_groups
from smallfry.transforms.groups import ChannelGroup, cut, mask
from smallfry.transforms.traced import traced_groups

SMALL = 0.1  # deviation of what stands for zeros
TOLERANCE = 1e-4  # between outputs masked and cut, relative to the largest, in float32
OUTPUTS = "its channels are the outputs"
NONE_FOUND = (
    "finds no channels to cut: they are those of linear layers and convolutions that are called "
    "once, and lead to such layers through norms and functions alone; if an earlier method has "
    "replaced them, as quantize does, put this one before it"
)


def find_groups(model: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    """Find and verify a model's channel groups.

    Args:
        model: Left as it is.
        example: A batch of inputs, such as two images.

    Returns:
        The groups that hold; warnings name those that do not, and recurrent layers, whose channels
        all stay.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry.transforms.find import find_groups
        >>> model = timm.create_model("vitrm_micro_patch4_8")
        >>> [(g.name, g.channels) for g in find_groups(model, torch.zeros(2, 1, 8, 8))][:2]
        [('blocks.0.attn.qkv', 4), ('blocks.0.mlp.fc1', 96)]
    """
    if recurrent := recurrent_layers(model):
        warnings.warn(
            f"recurrent layers keep all of their channels ({', '.join(recurrent[:3])})",
            SmallfryWarning,
            stacklevel=2,
        )
    found = declared_groups(model)
    taken = {(each.tensor, each.dim) for group in found for each in group.cut}
    others = [
        group
        for group in traced_groups(model, example, skip={g.name for g in found})
        if not taken & {(each.tensor, each.dim) for each in group.cut}
    ]
    filled = _without_zeros(model)
    reasons = {group.name: _fault(filled, group, example) for group in (*found, *others)}
    wrong = {name: reason for name, reason in reasons.items() if reason not in (None, OUTPUTS)}
    if wrong:
        some = "; ".join(f"{name}: {reason}" for name, reason in [*wrong.items()][:3])
        warnings.warn(
            f"{len(wrong)} groups of channels can't be cut and are kept ({some})",
            SmallfryWarning,
            stacklevel=2,
        )
    return tuple(group for group in (*found, *others) if reasons[group.name] is None)


def recurrent_layers(model: nn.Module) -> list[str]:
    """List the names of recurrent layers, whose channels are in no group."""
    return [name for name, each in model.named_modules() if isinstance(each, nn.RNNBase)]


@torch.no_grad()
def _without_zeros(model: nn.Module) -> nn.Module:
    """Copy a model with random numbers for zeros, behind which any fault would be hidden.

    Residual branches often end in a norm whose weight starts at zero.
    """
    filled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in filled.parameters():
        if parameter.is_floating_point():
            noise = SMALL * torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(torch.where(parameter == 0, noise, parameter))
    return filled


@torch.no_grad()
def _fault(model: nn.Module, group: ChannelGroup, example: Tensor) -> str | None:
    """Compare a group masked and cut, and describe the difference; None if they are equal."""
    if group.channels < 2:
        return "it has one channel"
    channels = torch.arange(0, group.channels, 2)  # every other one, so that positions matter
    keep = torch.arange(1, group.channels, 2)
    masked, smaller = (copy.deepcopy(model).eval() for _ in range(2))
    try:
        mask(masked, group, channels)
        cut(smaller, [group], {group.name: keep})
        distance = distance_of(masked(example), smaller(example))
    except Exception as error:  # of tensors or shapes that do not fit
        return (str(error) or type(error).__name__).splitlines()[0][:100]
    if distance is None:
        return OUTPUTS
    if not group.zero_invariant:
        return None
    return None if distance <= TOLERANCE else f"outputs masked and cut differ by {distance:.0e}"


def distance_of(expected: object, given: object) -> float | None:
    """Return the largest difference of outputs, over the largest of them; None of other sizes."""
    one, other = _flat(expected), _flat(given)
    if one.shape != other.shape:
        return None
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-6))


def _flat(outputs: object) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    assert isinstance(outputs, list | tuple)
    return torch.cat([_flat(each) for each in outputs if each is not None])
