"""Networks of relational layers for the nodes of packed graphs.

    h = relu(lift(x));  h = relu(layer(h)) a few times;  logits = head(h)

A batch is one graph of as many parts; its plan is made once, for all layers. Logits are
(graphs, classes, nodes).
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry._torch import is_fake
from smallfry.errors import UsageError
from smallfry.kits.graphs.attention import HGTConv, RGATConv
from smallfry.kits.graphs.layers import GINEConv, RGCNConv
from smallfry.kits.graphs.packing import EDGE_CHANNELS, Graphs, unpack
from smallfry.kits.graphs.pairs import AnyPlan, Plan, StaticPlan
from smallfry.kits.graphs.relational import require_parts
from smallfry.models.sources import Source, register_sizes

__all__ = ["RelationalNetwork"]

PYG = ("pyg-team/pytorch_geometric", "MIT")
SOURCE = {
    "rgcn_*": Source("Schlichtkrull et al. 2018, ESWC, arXiv 1703.06103", *PYG),
    "rgat_*": Source("Busbridge et al. 2019, arXiv 1904.05811", *PYG),
    "hgt_*": Source("Hu et al. 2020, WWW, arXiv 2003.01332", *PYG),
    "gine_*": Source("Hu et al. 2020, ICLR, arXiv 1905.12265", *PYG),
}
NODES, SLOTS, FEATURES = 60, 8, 4


class RelationalNetwork(nn.Module):
    """Relational network for nodes.

    Args:
        img_size: Nodes and slots, for timm; the network takes any.
        in_chans: Four channels of edges, and the features of nodes.
        num_classes: Classes of a node.
        conv: rgcn, rgat, hgt or gine.
        layers: Relational layers.
        width: Channels.
        heads: Of attention.
        relations: Relations.
        node_types: Types of nodes, for hgt: the first features, one-hot.
        bases: Of rgcn and rgat; None of a matrix for each relation.
        execution: See ``relational``. While a tracer follows, it is ``nodes``.

    Raises:
        UsageError: No such layer, or no features.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = (NODES, SLOTS),
        in_chans: int = EDGE_CHANNELS + FEATURES,
        num_classes: int = 3,
        conv: str = "rgcn",
        layers: int = 2,
        width: int = 32,
        heads: int = 2,
        relations: int = 12,
        node_types: int = 3,
        bases: int | None = None,
        execution: str = "auto",
    ) -> None:
        super().__init__()
        features = in_chans - EDGE_CHANNELS
        if features < 1:
            raise UsageError(f"a graph has 4 channels of edges and features, not {in_chans} in all")
        require_parts(heads=heads)
        if width % heads:
            raise UsageError(f"{width} channels can't be divided among {heads} heads")
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, width, width
        self.relations, self.node_types, self.conv = relations, node_types, conv
        settings: dict[str, Any] = {"relations": relations, "execution": execution}
        types = [f"type{number}" for number in range(node_types)]
        names = [("any", f"relation{number}", "any") for number in range(relations)]
        build: dict[str, Callable[[], nn.Module]] = {
            "rgcn": lambda: RGCNConv(width, width, bases=bases, **settings),
            "rgat": lambda: RGATConv(width, width // heads, heads=heads, bases=bases, **settings),
            "hgt": lambda: HGTConv(width, width, types, names, heads, execution),
            "gine": lambda: GINEConv(
                nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)),
                width,
                **settings,
            ),
        }
        if conv not in build:
            raise UsageError(f"conv is one of {', '.join(build)}, not '{conv}'")
        if conv == "hgt" and node_types > features:
            raise UsageError(f"{features} features can't name {node_types} types of nodes")
        self.execution = execution
        self.lift = nn.Linear(features, width)
        self.layers = nn.ModuleList(build[conv]() for _ in range(layers))
        self.head = nn.Linear(width, num_classes)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Refuse graphs that the network can't read.

        Raises:
            UsageError: Numbers of nodes that were normalised, or a relation that it does not have.
        """
        if not torch.equal(images[:, :EDGE_CHANNELS], images[:, :EDGE_CHANNELS].round()):
            zeros, ones = [0] * images.shape[1], [1] * images.shape[1]
            raise UsageError(
                "numbers of nodes and relations were normalised, and lost: give data.mean "
                f"{zeros} and data.std {ones}, as the recipe does"
            )
        most = int(images[:, 2].max())
        if most >= self.relations:
            raise UsageError(
                f"the data has relation {most}, the network has relations 0 to "
                f"{self.relations - 1}: --model.options '{{relations: {most + 1}}}'"
            )

    def plan(self, graphs: Graphs) -> AnyPlan:
        """Find the pairs of a batch of graphs, for all layers."""
        count = graphs.features.shape[0] * graphs.features.shape[1]
        sizes = (count, count)
        if self.execution == "nodes" or _is_traced(graphs.features):
            index, types = graphs.edge_index, graphs.edge_type
            return StaticPlan(index, types, sizes, self.relations, graphs.present)
        dense = graphs.without_gaps()
        return Plan(dense.edge_index, dense.edge_type, sizes, self.relations)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute (graphs, nodes, width)."""
        graphs = unpack(images, self.relations)
        plan = self.plan(graphs)
        shape = graphs.features.shape[:2]
        kinds = graphs.features[..., : self.node_types].argmax(-1).flatten()
        h = self.lift(graphs.features).relu().flatten(0, 1)
        edges = (graphs.edge_index, graphs.edge_type, plan)
        for layer in self.layers:
            h = (
                layer.flat(h, kinds, *edges) if isinstance(layer, HGTConv) else layer(h, *edges)
            ).relu()
        features: Tensor = h.reshape(*shape, self.num_features)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (graphs, classes, nodes) of features."""
        if pre_logits:
            return features
        logits: Tensor = self.head(features).transpose(1, 2)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (graphs, classes, nodes) of packed graphs."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by one of other classes."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes).to(next(self.parameters()))


def _is_traced(tensor: Tensor) -> bool:
    """Return whether shapes that depend on values can't be computed."""
    return torch.compiler.is_compiling() or tensor.is_meta or is_fake(tensor)


SIZES: Mapping[str, Mapping[str, Any]] = {
    "rgcn_tiny": {"conv": "rgcn"},
    "rgat_tiny": {"conv": "rgat"},
    "hgt_tiny": {"conv": "hgt"},
    "gine_tiny": {"conv": "gine"},
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 3,
            "input_size": (EDGE_CHANNELS + FEATURES, NODES, SLOTS),
            "fixed_input_size": True,
            "mean": (0.0,) * (EDGE_CHANNELS + FEATURES),
            "std": (1.0,) * (EDGE_CHANNELS + FEATURES),
            "first_conv": "lift",
            "classifier": "head",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    build = cast(Callable[..., nn.Module], build_model_with_cfg)
    settings = {**SIZES[name], **kwargs}
    return build(RelationalNetwork, name, pretrained, **settings)


register_sizes(__name__, SIZES, _create)
