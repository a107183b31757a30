"""TRM, the Tiny Recursive Model: one block that rewrites an answer and a scratchpad, cell by cell.

A grid of symbols becomes vectors ``e``, one per cell, behind a learned prefix. An answer ``y`` and
a scratchpad ``z`` of the same shape start from fixed random vectors. With one shared block ``f``,
one *improvement step* is

    T times:  n times  z <- f(z + y + e)     and then    y <- f(y + z)

and two heads read symbols off each cell of y, and a halting logit off its first prefix row. Only
the last of the T rounds is differentiated in training, in full; y and z then carry over, detached.

The block is post-norm: rms(h) = h / sqrt(mean(h^2) + 1e-5), without a learned scale, follows every
residual, so that y and z stay at length 1 however often they are rewritten. Its tokens are mixed by
attention with rotary positions or, in the attention-free form, by a SwiGLU across the sequence.

Source: Jolicoeur-Martineau, "Less is More: Recursive Reasoning with Tiny Networks", arXiv
2510.04871.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smallfry.models.contract import RecursionStep
from smallfry.models.linear import Linear
from smallfry.models.sources import Source, register_sizes
from smallfry.models.trm_layers import Attention, GatedMLP, Layer, TokenMLP, truncated_normal
from smallfry.models.vitrm import MOST_STEPS, State

__all__ = ["TRM", "checkpoint_filter_fn"]

SOURCE = Source(
    "Jolicoeur-Martineau 2025, arXiv 2510.04871", "SamsungSAILMontreal/TinyRecursiveModels", "MIT"
)
HALT_BIAS = -5.0  # first value of the halting logits
LEARNED_SCALE = 0.707106781  # of cells and their learned positions


class TRM(nn.Module):
    """Tiny Recursive Model on square grids of symbols, with timm's model interface.

    Args:
        img_size: Side of the grid in cells.
        in_chans: 1: each cell holds the number of its symbol.
        num_classes: Symbols (V), of the input as of the answer; 0 gives a model that returns y.
        embed_dim: Width of every row (D).
        depth: Layers of the shared block.
        num_heads: Attention heads; they divide ``embed_dim``.
        token_mlp: Mix the rows by a SwiGLU across the sequence in place of attention.
        latent_steps: Rewritings of z in one round (n).
        rounds: Rounds in an improvement step (T), of which the last one is differentiated.
        recursion_steps: Improvement steps at inference.
        prefix: Rows in front of the cells (P); the halting logit is read off the first.
        puzzles: Puzzle identities, each with an embedding in the first prefix row.
        positions: "rotary", "learned" or "none"; default rotary, and none with ``token_mlp``.
        expansion: Hidden width of a SwiGLU over its width, before the factor 2/3 and the rounding.
        mlp_multiple: Hidden widths are rounded up to a multiple of this.
        mlp_hidden_dim: Hidden width of the SwiGLU over features; default from ``expansion``.
        token_hidden_dim: Hidden width of the one across the sequence; default from ``expansion``.
        symbols: Symbols of the input; default ``num_classes``.
        drop_rate: 0; there is no dropout.

    Raises:
        ValueError: Sizes that do not fit each other, named.

    Example:
        >>> import timm, torch, smallfry
        >>> model = timm.create_model("trm_sudoku4_micro").eval()
        >>> model(torch.ones(1, 1, 4, 4)).shape  # an empty grid: 16 cells, 6 symbols
        torch.Size([1, 16, 6])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 9,
        in_chans: int = 1,
        num_classes: int = 11,
        embed_dim: int = 512,
        depth: int = 2,
        num_heads: int = 8,
        token_mlp: bool = False,
        latent_steps: int = 6,
        rounds: int = 3,
        recursion_steps: int = 16,
        prefix: int = 16,
        puzzles: int = 1,
        positions: Literal["rotary", "learned", "none"] | None = None,
        expansion: float = 4.0,
        mlp_multiple: int = 256,
        mlp_hidden_dim: int | None = None,
        token_hidden_dim: int | None = None,
        symbols: int | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        side = _side(img_size)
        positions = positions or ("none" if token_mlp else "rotary")
        _check(in_chans == 1, f"a grid of symbols has one channel, not {in_chans}")
        _check(drop_rate == 0.0, "TRM has no dropout: leave out drop_rate")
        _check(positions in ("rotary", "learned", "none"), f"unknown positions {positions!r}")
        _check(
            positions != "rotary" or not token_mlp,
            "rotary positions turn queries and keys, which token_mlp has none of",
        )
        heads_fit = token_mlp or embed_dim % num_heads == 0
        _check(heads_fit, f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        even = positions != "rotary" or embed_dim // num_heads % 2 == 0
        _check(even, f"rotary positions need heads of even width, not {embed_dim / num_heads:g}")
        counts = {"depth": depth, "latent_steps": latent_steps, "rounds": rounds}
        counts |= {"recursion_steps": recursion_steps, "prefix": prefix, "puzzles": puzzles}
        for name, count in counts.items():
            _check(count >= 1, f"{name} must be at least 1, got {count}")
        symbols = num_classes if symbols is None else symbols
        _check(symbols >= 1, "a model without classes needs symbols, the number of the input's")
        total = latent_steps * rounds * recursion_steps
        _check(total <= MOST_STEPS, f"{total:,} latent steps are too many: at most {MOST_STEPS:,}")

        cells = side * side
        rows = prefix + cells
        self.input_shape = (1, side, side)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.latent_steps, self.rounds = latent_steps, rounds
        self.recursion_steps = recursion_steps
        self.prefix = prefix
        self.grad_checkpointing = False

        self.embed_cells = nn.Embedding(symbols, embed_dim)
        self.embed_puzzle = nn.Parameter(torch.zeros(puzzles, embed_dim))
        self.pos_embed: nn.Parameter | None = None
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(rows, embed_dim))
        head_dim = embed_dim // num_heads if positions == "rotary" else 0
        mlp = mlp_hidden_dim or _hidden(embed_dim, expansion, mlp_multiple)
        across = token_hidden_dim or _hidden(rows, expansion, mlp_multiple)
        self.blocks = nn.ModuleList(
            Layer(
                TokenMLP(rows, across) if token_mlp else Attention(embed_dim, num_heads, head_dim),
                GatedMLP(embed_dim, mlp),
            )
            for _ in range(depth)
        )
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = Linear(embed_dim, num_classes, bias=False)
        self.halt_head = Linear(embed_dim, 2)  # the second output is never trained
        self.y_init: Tensor
        self.z_init: Tensor
        self.register_buffer("y_init", torch.empty(embed_dim))
        self.register_buffer("z_init", torch.empty(embed_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as in the paper: truncated normals of standard deviation 1/sqrt(fan in)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                truncated_normal(module.weight, module.in_features**-0.5)
        truncated_normal(self.embed_cells.weight, self.embed_dim**-0.5)
        if self.pos_embed is not None:
            truncated_normal(self.pos_embed, self.embed_dim**-0.5)
        for start in (self.y_init, self.z_init):
            truncated_normal(start, 1.0)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.constant_(self.halt_head.bias, HALT_BIAS)

    # The recursion, from the outside in

    def forward(self, grids: Tensor) -> Tensor:
        """Compute logits (batch, cells, symbols) of grids (batch, 1, side, side)."""
        return self.forward_head(self.forward_features(grids))

    def recurse(self, grids: Tensor, steps: int | None = None) -> list[RecursionStep]:
        """Return state, logits and halting logits after every improvement step.

        Args:
            grids: (batch, 1, side, side).
            steps: Number of steps; default ``recursion_steps``.
        """
        x, state = self.embed(grids), self.initial_state(grids.shape[0])
        trace = []
        for _ in range(self.recursion_steps if steps is None else steps):
            trace.append(self.step(x, state))
            state = trace[-1].state
        return trace

    def advance(self, grids: Tensor, state: State | None = None) -> RecursionStep:
        """Run one improvement step from a state (default the initial one), as in training."""
        return self.step(
            self.embed(grids), self.initial_state(grids.shape[0]) if state is None else state
        )

    def embed(self, grids: Tensor, puzzles: Tensor | None = None) -> Tensor:
        """Compute the input rows e, (batch, prefix + cells, dim), the same in every step.

        Args:
            grids: Numbers of symbols, (batch, 1, side, side).
            puzzles: Puzzle identities (batch,), int64; default 0.
        """
        if grids.shape[1:] != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"expected grids of shape (batch, {expected}), got {tuple(grids.shape)}; img_size "
                "of create_model() chooses the shape"
            )
        cells = self.embed_cells(grids.flatten(1).round().long())
        first = self.embed_puzzle[:1] if puzzles is None else self.embed_puzzle[puzzles]
        rows = F.pad(first[:, None], (0, 0, 0, self.prefix - 1)).expand(grids.shape[0], -1, -1)
        e = torch.cat([rows, cells], dim=1)
        if self.pos_embed is not None:
            e = LEARNED_SCALE * (e + self.pos_embed)
        return cast(Tensor, self.embed_dim**0.5 * e)

    def initial_state(self, batch_size: int) -> State:
        """Return the fixed initial state, the same in every cell of every grid."""
        rows = self.prefix + self.input_shape[1] ** 2
        return State(
            self.y_init.expand(batch_size, rows, -1), self.z_init.expand(batch_size, rows, -1)
        )

    def step(self, x: Tensor, state: State) -> RecursionStep:
        """Run one improvement step: ``rounds`` times ``latent_steps`` times z and once y."""
        with torch.no_grad() if self.training else nullcontext():
            for _ in range(self.rounds - 1):
                state = self._round(x, state)
        return self.read_out(self._round(x, state))

    def read_out(self, state: State) -> RecursionStep:
        """Compute both heads' outputs of y."""
        logits = self.head(state.y[:, self.prefix :])
        return RecursionStep(state, logits, self.halt_head(state.y[:, 0])[:, 0])

    def _round(self, x: Tensor, state: State) -> State:
        y, z = state
        for _ in range(self.latent_steps):
            z = self._block(z + (y + x))
        return State(self._block(y + z), z)

    def _block(self, rows: Tensor) -> Tensor:
        """Apply the shared block to rows (batch, prefix + cells, dim)."""
        for layer in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                rows = checkpoint(layer, rows, use_reentrant=False)
            else:
                rows = layer(rows)
        return rows

    # timm's contract

    def forward_features(self, grids: Tensor) -> Tensor:
        """Compute the final answer y, (batch, prefix + cells, dim)."""
        x, state = self.embed(grids), self.initial_state(grids.shape[0])
        for _ in range(self.recursion_steps):
            state = self.step(x, state).state
        return state.y

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits of ``forward_features``' rows; ``pre_logits`` gives those of the cells."""
        cells = features[:, self.prefix :]
        return cells if pre_logits else cast(Tensor, self.head(cells))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head of the symbols by a new one; 0 symbols remove it."""
        if global_pool not in (None, ""):
            raise ValueError(f"a TRM answers in every cell and pools nothing, not {global_pool!r}")
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes > 0:
            head = Linear(self.embed_dim, num_classes, bias=False)
            truncated_normal(head.weight, self.embed_dim**-0.5)
        self.head = head.to(self.y_init)

    def get_classifier(self) -> nn.Module:
        """Return the head of the symbols."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the block in the backward pass: less memory, a third more arithmetic."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, besides biases."""
        return {"pos_embed", "embed_puzzle", "embed_cells.weight"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for timm's layer-wise learning rates."""
        return {
            "stem": r"^pos_embed|^embed_cells|^embed_puzzle|^y_init|^z_init",
            "blocks": [(r"^blocks\.(\d+)", None)],
        }


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Map weights from the authors' names to ours; ours pass unchanged."""
    renamed = {
        "inner.H_init": "y_init",
        "inner.L_init": "z_init",
        "inner.puzzle_emb.weights": "embed_puzzle",
        "inner.embed_tokens.embedding_weight": "embed_cells.weight",
        "inner.embed_pos.embedding_weight": "pos_embed",
        "inner.lm_head.": "head.",
        "inner.q_head.": "halt_head.",
        "inner.L_level.layers.": "blocks.",
    }
    parts = {
        ".self_attn.qkv_proj.": ".mixer.qkv.",
        ".self_attn.o_proj.": ".mixer.proj.",
        ".mlp_t.gate_up_proj.": ".mixer.mlp.fc1.",
        ".mlp_t.down_proj.": ".mixer.mlp.fc2.",
        ".mlp.gate_up_proj.": ".mlp.fc1.",
        ".mlp.down_proj.": ".mlp.fc2.",
    }

    def ours(name: str) -> str:
        for theirs, mine in renamed.items():
            if name.startswith(theirs):
                name = mine + name.removeprefix(theirs)
        for theirs, mine in parts.items():
            name = name.replace(theirs, mine)
        return name

    return {ours(name): weight for name, weight in weights.items()}


def _side(img_size: int | tuple[int, int]) -> int:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    _check(len(sides) == 2 and sides[0] == sides[1], f"a TRM takes square grids, not {img_size}")
    return sides[0]


def _hidden(width: int, expansion: float, multiple: int) -> int:
    """Return two thirds of the expanded width, rounded up to a multiple."""
    return -(-round(expansion * width * 2 / 3) // multiple) * multiple


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


# The named sizes

MICRO: dict[str, Any] = {
    **{"embed_dim": 64, "num_heads": 2, "token_mlp": True, "prefix": 1, "mlp_hidden_dim": 128},
    **{"latent_steps": 2, "rounds": 2, "recursion_steps": 4},
}
SIZES: dict[str, dict[str, Any]] = {  # the larger ones are the paper's, with a prefix row
    "trm_sudoku4_micro": {"img_size": 4, "num_classes": 6, "token_hidden_dim": 32} | MICRO,
    "trm_sudoku6_micro": {"img_size": 6, "num_classes": 8, "token_hidden_dim": 64} | MICRO,
    "trm_sudoku9_mlp": {"token_mlp": True},  # 5,028,866 parameters
    "trm_sudoku9_attention": {},  # 6,828,034
    "trm_maze30": {"img_size": 30, "num_classes": 6, "latent_steps": 4},  # 6,822,914
}


def grid_cfg(side: int, symbols: int) -> dict[str, Any]:
    """Build timm's configuration of a model for square grids of symbols."""
    return {
        "url": "",
        "num_classes": symbols,
        "input_size": (1, side, side),
        "fixed_input_size": True,
        "interpolation": "nearest",
        "mean": (0.0,),
        "std": (1 / 255,),
        "first_conv": "embed_cells",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {
        name: grid_cfg(sizes.get("img_size", 9), sizes.get("num_classes", 11))
        for name, sizes in SIZES.items()
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> TRM:
    build = cast(Callable[..., TRM], build_model_with_cfg)
    sizes = SIZES[variant] | kwargs
    if sizes.get("num_classes") == 0:
        sizes.setdefault("symbols", SIZES[variant].get("num_classes", 11))
    return build(TRM, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **sizes)


register_sizes(__name__, SIZES, _create)
