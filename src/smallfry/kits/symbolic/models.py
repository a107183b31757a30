"""Graph networks whose structure a program wrote, behind an encoder of images.

    encoder   pixel-unshuffle, 1×1 convolution, three blocks, a transformer; the mean: d numbers
    baseline  a linear layer of these
    G-SSNN    each node and edge of the program's graph gets a slice of them; three GINE layers,
              mean over the nodes, a linear layer

GINE is of Hu et al., ICLR 2020, arXiv 1905.12265, after Xu et al., ICLR 2019, arXiv 1810.00826. The
form of slices and codes is our own: the authors' code mixes rows and columns of its table of
positions, and counts each edge four times.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.kits.symbolic.interpreter import ProgramGraph, run
from smallfry.kits.symbolic.programs import parse
from smallfry.layers.classifier import linear_classifier
from smallfry.models.sources import Source, register_sizes

__all__ = ["GSSNN", "GINEConv", "ProgramReader", "position_codes", "slices_of"]

SOURCE = Source("arXiv 2303.03340", "shlomenu/symbolically_synthesized_networks", "MIT")
LAYERS = 3  # of GINE
DROPOUT = 0.3
WAVE = 10000.0  # longest wavelength of codes over 2π
PATH = "(push (add (connect (add (next_port (connect identity))))))"  # three nodes in a row


def position_codes(places: Tensor, count: int) -> Tensor:
    """Compute sines and cosines of places.

    Args:
        places: (elements,).
        count: Numbers of each element, even: ``count / 2`` sines, then as many cosines.

    Returns:
        (elements, count), float64.
    """
    steps = torch.arange(count // 2, dtype=torch.float64) / max(1, count // 2 - 1)
    angles = places.double()[:, None] * WAVE**-steps
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def slices_of(width: int, elements: int) -> Tensor:
    """Assign numbers to elements: consecutive slices, tiled to the whole width and cut.

    Args:
        width: Numbers.
        elements: Nodes and edges; the first one's slice has the remainder, too.

    Returns:
        (elements, width), int64: which number is there.

    Raises:
        UsageError: More elements than numbers.

    Example:
        >>> slices_of(5, 2).tolist()
        [[0, 1, 2, 0, 1], [3, 4, 3, 4, 3]]
    """
    if elements > width:
        raise UsageError(
            f"a graph of {elements} nodes and edges needs as many numbers of the encoder, which "
            f"gives {width}: take a smaller program, or a larger model.options.reader_dim"
        )
    length = width // elements
    first = width - (elements - 1) * length
    starts = torch.tensor([0, *range(first, width, length)][:elements])
    lengths = torch.tensor([first] + [length] * (elements - 1))
    return starts[:, None] + torch.arange(width) % lengths[:, None]


class GINEConv(nn.Module):
    """Graph isomorphism layer with edge features: nn((1 + ε) x_i + Σ_j relu(x_j + e_ij)).

    The graph is fixed, so its sums are a product with a matrix of zeros and ones. Names of weights
    are those of PyTorch Geometric.

    Args:
        in_features: Numbers of a node and of an edge.
        out_features: Numbers of a node behind the layer.
        nodes: Of the graph.
        edges: (edges, 2): source and target of each, in one direction.

    Example:
        >>> layer = GINEConv(4, 8, 2, [(0, 1)])
        >>> layer(torch.zeros(3, 2, 4), torch.zeros(3, 1, 4)).shape
        torch.Size([3, 2, 8])
    """

    sources: Tensor
    sums: Tensor
    eps: Tensor

    def __init__(
        self, in_features: int, out_features: int, nodes: int, edges: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.nn = nn.Linear(in_features, out_features)
        self.register_buffer("eps", torch.zeros(1))
        pairs = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
        sums = torch.zeros(nodes, len(pairs))
        sums[pairs[:, 1], torch.arange(len(pairs))] = 1
        self.register_buffer("sources", pairs[:, 0].clone(), persistent=False)
        self.register_buffer("sums", sums, persistent=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Compute (batch, nodes, out_features).

        Args:
            x: (batch, nodes, in_features).
            edges: (batch, edges, in_features).
        """
        messages = torch.relu(x[:, self.sources] + edges)
        found: Tensor = self.nn((1 + self.eps) * x + self.sums @ messages)
        return found


class ProgramReader(nn.Module):
    """Graph network of a program: numbers (batch, width) to numbers of the whole graph, the same.

    Args:
        graph: What the program wrote.
        width: Numbers, a multiple of 4.

    Raises:
        UsageError: A graph with more elements than numbers, or another width.
    """

    slices: Tensor
    codes: Tensor

    def __init__(self, graph: ProgramGraph, width: int) -> None:
        super().__init__()
        if width % 4:
            raise UsageError(f"model.options.reader_dim is a multiple of 4, not {width}")
        numbers = [*graph.nodes, *(edge.number for edge in graph.edges)]
        ports = [*(0 for _ in graph.nodes), *(edge.port + 1 for edge in graph.edges)]
        codes = [position_codes(torch.tensor(each), width // 2) for each in (numbers, ports)]
        self.register_buffer("slices", slices_of(width, len(numbers))[numbers], persistent=False)
        self.register_buffer("codes", torch.cat(codes, dim=1).float(), persistent=False)
        self.nodes = len(graph.nodes)
        place = {node: i for i, node in enumerate(graph.nodes)}
        there = [(place[edge.one], place[edge.other]) for edge in graph.edges]
        both = there + [(target, source) for source, target in there]
        self.drop = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(GINEConv(width, width, self.nodes, both) for _ in range(LAYERS))

    def forward(self, numbers: Tensor) -> Tensor:
        """Compute the mean over the nodes behind the last layer, (batch, width)."""
        features = numbers[:, self.slices] + self.codes
        x, edges = features[:, : self.nodes], features[:, self.nodes :]
        for layer in self.layers:
            dropped = self.drop(edges)
            x = layer(self.drop(x), torch.cat([dropped, dropped], dim=1))
        return x.mean(dim=1)


class Residual(nn.Module):
    """Residual block x + conv1×1(GELU(conv1×1(norm(conv3×3 x)))), without biases.

    Args:
        width: Channels.
        side: Height and width, as the norm is over all numbers of an image.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm([width, side, side])
        self.up = nn.Conv2d(width, width, 1, bias=False)
        self.act = nn.GELU()
        self.down = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (batch, width, side, side)."""
        found: Tensor = x + self.down(self.act(self.up(self.norm(self.local(x)))))
        return found


class Attention(nn.Module):
    """Self-attention of several heads, whose width is not bound to that of the tokens.

    Args:
        width: Numbers of a token.
        heads: Heads.
        head_dim: Numbers of a head.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (batch, tokens, width)."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        found: Tensor = self.proj(seen.transpose(1, 2).reshape(batch, tokens, -1))
        return found


class Block(nn.Module):
    """Layer of a transformer, norms first.

    Args:
        width: Numbers of a token.
        heads: Heads.
        head_dim: Numbers of a head.
        hidden: Numbers between the two layers of the MLP.
    """

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Compute (batch, tokens, width)."""
        x = x + self.attn(self.norm1(x))
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class GSSNN(nn.Module):
    """Encoder of images with a reader that a program gives, or with none: the baseline.

    Args:
        img_size: Side of the images, a multiple of ``patch``.
        in_chans: Channels of the images.
        num_classes: Outputs; 0 leaves the classifier out.
        program: An s-expression whose graph the reader has; none for the baseline.
        embed_dim: Channels of the encoder, a multiple of 4.
        reader_dim: Numbers that the reader is given.
        patch: Side of the squares that become tokens.
        depth: Layers of the transformer.
        heads: Its heads.
        head_dim: Numbers of a head.
        mlp_dim: Numbers between the layers of its MLPs.

    Raises:
        UsageError: Sizes that don't fit, no program, or one whose graph is not accepted.
    """

    positions: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        in_chans: int = 1,
        num_classes: int = 2,
        program: str | None = PATH,
        embed_dim: int = 32,
        reader_dim: int = 64,
        patch: int = 8,
        depth: int = 2,
        heads: int = 2,
        head_dim: int = 16,
        mlp_dim: int = 64,
    ) -> None:
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if size[0] != size[1] or size[0] < 1 or size[0] % patch:
            raise UsageError(
                f"the encoder takes square images of a multiple of {patch} pixels per side, not "
                f"{size[0]}×{size[1]}: see data.image_size and model.options.patch"
            )
        if embed_dim % 4:
            raise UsageError(f"model.options.embed_dim is a multiple of 4, not {embed_dim}")
        self.graph = None if program is None else _graph(program)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dim if program is None else reader_dim
        side = size[0] // patch
        self.unshuffle = nn.PixelUnshuffle(patch)
        self.stem = nn.Conv2d(in_chans * patch**2, embed_dim, 1)
        self.residuals = nn.Sequential(*(Residual(embed_dim, side) for _ in range(3)))
        rows = torch.arange(side).repeat_interleave(side)
        columns = torch.arange(side).repeat(side)
        codes = [position_codes(each, embed_dim // 2) for each in (columns, rows)]
        self.register_buffer("positions", torch.cat(codes, dim=1).float(), persistent=False)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, heads, head_dim, mlp_dim) for _ in range(depth))
        )
        self.to_reader: nn.Module = nn.Identity()
        self.reader: nn.Module = nn.Identity()
        if self.graph is not None:
            self.to_reader = nn.Linear(embed_dim, reader_dim)
            self.reader = ProgramReader(self.graph, reader_dim)
        self.head = linear_classifier(self.num_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute what the classifier reads, (batch, num_features)."""
        x = self.residuals(self.stem(self.unshuffle(images)))
        tokens = x.flatten(2).transpose(1, 2) + self.positions
        found: Tensor = self.reader(self.to_reader(self.blocks(tokens).mean(dim=1)))
        return found

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify features."""
        return features if pre_logits else cast(Tensor, self.head(features))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of images (batch, in_chans, side, side)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 removes it."""
        self.num_classes = num_classes
        self.head = linear_classifier(self.num_features, num_classes).to(next(self.parameters()))


def _graph(program: str) -> ProgramGraph:
    graph = run(parse(program))
    if not graph.is_accepted:
        raise UsageError(
            f"the graph of '{program[:60]}' has {len(graph.nodes)} nodes and "
            f"{len(graph.edges)} edges; expected two nodes at least, all connected"
        )
    return graph


LARGE = {"embed_dim": 256, "patch": 16, "heads": 4, "head_dim": 128, "mlp_dim": 512}
SIZES: dict[str, dict[str, Any]] = {
    "gssnn_tiny": {},
    "gssnn_tiny_baseline": {"program": None},
    "gssnn": {**LARGE, "reader_dim": 512, "img_size": 128},
    "gssnn_baseline": {**LARGE, "program": None, "img_size": 128},
}
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 2,
            "input_size": (1, sizes.get("img_size", 64), sizes.get("img_size", 64)),
            "fixed_input_size": True,
            "mean": (0.5,),
            "std": (0.25,),
            "first_conv": "stem",
            "classifier": "head",
        }
        for name, sizes in SIZES.items()
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return cast(
        nn.Module, build_model_with_cfg(GSSNN, name, pretrained, **{**SIZES[name], **kwargs})
    )


register_sizes(__name__, tuple(SIZES), _create)
