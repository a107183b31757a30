"""Conversion of torch-geometric's relational layers to those of this kit."""

from copy import deepcopy
from typing import Any

from torch import nn

from smallfry.errors import UsageError
from smallfry.kits.graphs.attention import HGTConv, RGATConv
from smallfry.kits.graphs.layers import RGCNConv
from smallfry.kits.graphs.relational import Relational

__all__ = ["compact"]


def compact(model: nn.Module, execution: str = "auto") -> nn.Module:
    """Replace the relational layers of a torch-geometric model, with the same weights.

    Outputs are the same up to the order of sums. Layers take node features, edges as tensors
    (2, edges), and relations; optionally a ``plan``.

    Args:
        model: Left as it is; a layer itself, or a module that has such.
        execution: Of each layer; see ``relational``.

    Returns:
        A copy.

    Raises:
        UsageError: It has no such layer, or one with a setting that can't be followed equally.
        ModuleNotFoundError: torch-geometric is not installed.
    """
    model = deepcopy(model)
    root = _converted(model, execution)
    if root is not None:
        return root
    found = 0
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            new = _converted(child, execution)
            if new is not None:
                setattr(parent, name, new)
                found += 1
    if not found:
        raise UsageError(
            "the model has no RGCNConv, FastRGCNConv, RGATConv or HGTConv of torch-geometric"
        )
    return model


def _converted(layer: nn.Module, execution: str) -> nn.Module | None:
    from torch_geometric.nn import conv as theirs

    new: Relational
    if isinstance(layer, theirs.HGTConv):
        new = _hgt(layer, execution)
    elif isinstance(layer, theirs.RGATConv):
        new = _rgat(layer, execution)
    elif isinstance(layer, theirs.RGCNConv):
        new = _rgcn(layer, execution)
    else:
        return None
    if layer.flow != "source_to_target":
        raise UsageError(f"{_name(layer)}: messages go from source to target, not {layer.flow}")
    first = next(layer.parameters())
    new.to(device=first.device, dtype=first.dtype).load_state_dict(layer.state_dict())
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    return new.train(layer.training)


def _rgcn(layer: Any, execution: str) -> RGCNConv:
    aggr = {"mean": "mean", "add": "sum", "sum": "sum"}.get(str(layer.aggr))
    if aggr is None:
        raise UsageError(
            f"{_name(layer)}: aggr is mean, add or sum; its {layer.aggr} is of nodes, ours would "
            "be of messages"
        )
    own = layer.in_channels
    return RGCNConv(
        (own, own) if isinstance(own, int) else (own[0], own[1]),
        layer.out_channels,
        layer.num_relations,
        bases=layer.num_bases,
        blocks=layer.num_blocks,
        aggr=aggr,
        root=layer.root is not None,
        bias=layer.bias is not None,
        execution=execution,
    )


def _rgat(layer: Any, execution: str) -> RGATConv:
    settings = {
        "attention_mode": ("additive-self-attention", layer.attention_mode),
        "attention_mechanism": ("across-relation", layer.attention_mechanism),
        "mod": (None, layer.mod),
        "dropout": (0.0, layer.dropout),
        "edge_dim": (None, layer.edge_dim),
        "num_blocks": (None, layer.num_blocks),
        "aggr": (("add", "sum"), layer.aggr),
    }
    for name, (wanted, found) in settings.items():
        if found != wanted and not (isinstance(wanted, tuple) and found in wanted):
            raise UsageError(f"{_name(layer)}: {name} must be {wanted!r}, not {found!r}")
    return RGATConv(
        layer.in_channels,
        layer.out_channels,
        layer.num_relations,
        heads=layer.heads,
        bases=layer.num_bases,
        concat=layer.concat,
        negative_slope=layer.negative_slope,
        bias=layer.bias is not None,
        execution=execution,
    )


def _hgt(layer: Any, execution: str) -> HGTConv:
    if any(width < 1 for width in layer.in_channels.values()):
        raise UsageError(f"{_name(layer)}: run it once, so that its lazy widths are known")
    names = [*layer.node_types], [*layer.edge_types]
    return HGTConv(layer.in_channels, layer.out_channels, *names, layer.heads, execution)


def _name(layer: nn.Module) -> str:
    return f"torch-geometric's {type(layer).__name__}"
