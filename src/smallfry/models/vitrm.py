"""ViTRM, the Vision Tiny Recursion Model: one small block applied repeatedly.

An image becomes tokens ``x``, once. A latent memory ``z`` and a prediction token ``y`` start from
learned tensors, and one shared transformer block ``f`` rewrites them. One *recursion step* is

    n times:  z <- f([x; y; z]), the rows of z     (think)
    once:     y <- f([y; z]),    the row of y      (answer)

and two linear heads read class logits and a halting logit off ``y``. A model of 3.6M parameters
thereby runs 12 transformer layers on an image, and more if it recurs T times.

What is thrown away is not computed. The last layer of ``f`` gives only the rows that are kept. Its
first layer projects x once for all steps, y once in each, and the learned tensors that y and z
start from once for all images. Outputs and gradients are those of the plain form above.

Source: Akazan et al., "Vision Tiny Recursion Model", arXiv 2603.19503, which adapts
Jolicoeur-Martineau, "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smallfry._torch import has_forward_hooks
from smallfry.errors import UsageError
from smallfry.models.contract import RecursionStep
from smallfry.models.layers import EVERY, Layer, Tokens, end_to_end
from smallfry.models.sources import Source, register_sizes
from smallfry.models.vitrm_features import feature_info, intermediates
from smallfry.models.vitrm_sizes import build_vitrm, resample_tokens, resampled, sides_of
from smallfry.models.vitrm_sizes import checkpoint_filter_fn as checkpoint_filter_fn
from smallfry_runtime.frames import ImageSize

__all__ = ["State", "ViTRM"]

SOURCE = Source("Akazan et al. 2026, arXiv 2603.19503")

FIRST, LAST = slice(0, 1), slice(-1, None)

MOST_STEPS = 10_000  # rewritings of the memory for one image


class State(NamedTuple):
    """Recurrent state."""

    y: Tensor  # the prediction token, (batch, 1, dim)
    z: Tensor  # the latent memory, (batch, latents, dim)

    def detach(self) -> "State":
        """Detach the values from the graph (between two steps of deep supervision)."""
        return State(self.y.detach(), self.z.detach())


class ImageTokens(NamedTuple):
    """Image tokens in the form that the block takes: as rows, or for cross-attention."""

    rows: list[Tokens]  # x in joint attention, else empty
    context: list[Tensor | None]  # for each layer its projection of x in cross-attention, else None


@register_notrace_module
class ViTRM(nn.Module):
    """Vision Tiny Recursion Model, with timm's model interface.

    Args:
        img_size: Side of the images in pixels, or height and width.
        patch_size: Side of a patch in pixels (p); it divides both.
        in_chans: Channels of the input images.
        num_classes: Classes of the head; 0 gives a model that returns ``y``.
        embed_dim: Width of every token (D).
        depth: Layers of the shared block.
        num_heads: Attention heads; they divide ``embed_dim``.
        mlp_hidden_dim: Hidden width of the SwiGLU.
        latent_steps: Rewritings of ``z`` in one recursion step (n).
        recursion_steps: Recursion steps that ``forward`` chains (T).
        latents: Tokens of ``z``; default one per patch.
        drop_rate: Dropout on both residual branches (the paper: 0.1).
        attn_drop_rate: Dropout on the attention weights; default ``drop_rate``.
        cross_attention: Let y and z read x, which stays as it is, in place of rewriting the rows of
            x beside theirs. Not the paper's: less arithmetic, the more so with few ``latents``.
        dynamic_img_size: Take images of any size that the patches divide, with positions resampled
            for each; ``latents`` stay as many.
        layer: What builds a layer of the block, from the same sizes as ``Layer``.

    Raises:
        ValueError: Sizes that do not fit each other, named.

    Example:
        >>> import torch
        >>> from smallfry.models import ViTRM
        >>> model = ViTRM(
        ...     img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=1, num_heads=2,
        ...     mlp_hidden_dim=16, recursion_steps=2,
        ... )
        >>> model(torch.zeros(3, 1, 8, 8)).shape, len(model.recurse(torch.zeros(3, 1, 8, 8)))
        (torch.Size([3, 10]), 2)
    """

    def __init__(
        self,
        img_size: ImageSize = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 384,
        depth: int = 3,
        num_heads: int = 6,
        mlp_hidden_dim: int = 512,
        latent_steps: int = 3,
        recursion_steps: int = 1,
        latents: int | None = None,
        drop_rate: float = 0.1,
        attn_drop_rate: float | None = None,
        cross_attention: bool = False,
        dynamic_img_size: bool = False,
        layer: Callable[..., Layer] = Layer,
    ) -> None:
        super().__init__()
        height, width = sides_of(img_size, patch_size)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.patch_size, self.grid_size = patch_size, (height // patch_size, width // patch_size)
        patches = self.grid_size[0] * self.grid_size[1]
        self.latent_per_patch = latents is None
        latents = patches if latents is None else latents
        for name, count in {
            "depth": depth,
            "latent_steps": latent_steps,
            "recursion_steps": recursion_steps,
            "latents": latents,
        }.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if latent_steps * recursion_steps > MOST_STEPS:
            raise ValueError(
                f"{latent_steps} latent steps in {recursion_steps} recursion steps are "
                f"too many; at most {MOST_STEPS:,} together"
            )

        self.input_shape = (in_chans, height, width)
        self.dynamic_img_size = dynamic_img_size
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.latent_steps = latent_steps
        self.recursion_steps = recursion_steps
        self.cross_attention = cross_attention
        self.grad_checkpointing = False
        self.why_no_rollout = ""  # see attention.py
        attn_drop_rate = drop_rate if attn_drop_rate is None else attn_drop_rate

        self.patch_embed: nn.Module = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.pos_embed: nn.Parameter | None = nn.Parameter(torch.empty(1, patches, embed_dim))
        self.y_init = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.z_init = nn.Parameter(torch.empty(1, latents, embed_dim))
        self.blocks = nn.Sequential(
            *(
                layer(embed_dim, num_heads, mlp_hidden_dim, drop_rate, attn_drop_rate)
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.halt_head = nn.Linear(embed_dim, 1)
        self.cues: nn.Module | None = None  # appends tokens to those of the image
        self.feature_info = feature_info(self)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as in the paper: Xavier-normal tokens and heads, else PyTorch's defaults."""
        for token in (self.pos_embed, self.y_init, self.z_init):
            if token is not None:
                nn.init.xavier_normal_(token)
        for layer in self.blocks:
            attention = cast(Layer, layer).attn
            nn.init.xavier_uniform_(attention.qkv.weight)
            nn.init.zeros_(attention.qkv.bias)
            nn.init.zeros_(attention.proj.bias)
        for head in (self.head, self.halt_head):
            _init_head(head)

    # The recursion, from the outside in

    def forward(self, images: Tensor) -> Tensor:
        """Compute class logits (batch, num_classes) of images (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(images))

    def recurse(self, images: Tensor, steps: int | None = None) -> list[RecursionStep]:
        """Yield state, class logits and halting logits after every recursion step.

        Args:
            images: (batch, channels, height, width).
            steps: Number of steps; default ``recursion_steps``.
        """
        x = self._image_tokens(self.embed(images))
        state = self._start(images.shape[0])
        trace = []
        for _ in range(self.recursion_steps if steps is None else steps):
            trace.append(self.read_out(self._recur(x, state)))
            state = trace[-1].state
        return trace

    def advance(self, images: Tensor, state: State | None = None) -> RecursionStep:
        """Run one recursion step from a state (default the initial one), as in training."""
        return self.step(
            self.embed(images), self._start(images.shape[0]) if state is None else state
        )

    def embed(self, images: Tensor) -> Tensor:
        """Compute the image tokens x, (batch, patches, dim), the same in every step.

        With ``cues`` their tokens follow.
        """
        tokens = self._embed(images)
        return tokens if self.cues is None else cast(Tensor, self.cues(tokens))

    def _embed(self, images: Tensor) -> Tensor:
        is_fitting = images.shape[1:] == self.input_shape
        if self.dynamic_img_size and not is_fitting and images.shape[1] == self.input_shape[0]:
            sides_of(tuple(images.shape[2:]), self.patch_size)
        elif not is_fitting:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"expected images of shape (batch, {expected}), got {tuple(images.shape)}; "
                "img_size and in_chans of create_model() choose the shape"
            )
        patches: Tensor = self.patch_embed(images)  # (batch, dim, rows, columns)
        tokens = patches.flatten(2).transpose(1, 2)
        if self.pos_embed is None:
            return tokens
        if is_fitting:
            return tokens + self.pos_embed
        grid = patches.shape[2], patches.shape[3]
        return tokens + resample_tokens(self.pos_embed, self.grid_size, grid)

    def initial_state(self, batch_size: int) -> State:
        """Return the learned initial state, common to all images."""
        return State(self.y_init.expand(batch_size, -1, -1), self.z_init.expand(batch_size, -1, -1))

    def step(self, x: Tensor, state: State) -> RecursionStep:
        """Run one recursion step: ``latent_steps`` times z, once y, and the heads."""
        return self.read_out(self._recur(self._image_tokens(x), state))

    def think(self, x: Tensor, state: State) -> State:
        """Run one latent step, z <- f([x; y; z]), keeping the rows of z."""
        return State(state.y, self._think(self._image_tokens(x), self._project(state.y), state.z))

    def answer(self, state: State) -> State:
        """Run the answer step, y <- f([y; z]), keeping the row of y."""
        return State(self._answer(self._project(state.y), state.z), state.z)

    def read_out(self, state: State) -> RecursionStep:
        """Compute both heads' outputs of y."""
        y = state.y.squeeze(1)
        return RecursionStep(state, self.head(y), self.halt_head(y).squeeze(-1))

    def _recur(self, x: ImageTokens, state: State) -> State:
        """Run ``latent_steps`` latent steps and one answer step, with nothing projected twice."""
        y, z = self._project(state.y), state.z
        for _ in range(self._thoughts()):
            z = self._think(x, y, z)
        return State(self._answer(y, z), z)

    def _thoughts(self) -> int:
        """Return the number of latent steps in this recursion step."""
        return self.latent_steps

    def _think(self, x: ImageTokens, y: Tokens, z: Tensor) -> Tensor:
        return self._block([*x.rows, y, self._project(z)], keep=LAST, context=x.context)

    def _answer(self, y: Tokens, z: Tensor) -> Tensor:
        return self._block([y, self._project(z)], keep=FIRST)

    def _image_tokens(self, x: Tensor) -> ImageTokens:
        layers = cast(Iterable[Layer], self.blocks)
        if self.cross_attention:
            return ImageTokens([], [layer.project(x) for layer in layers])
        return ImageTokens([self._project(x)], [None for _ in layers])

    def _start(self, batch_size: int) -> State:
        """Return the initial state, shared, or per image where a hook needs single images."""
        attention = cast(Layer, self.blocks[0]).attn
        projection = getattr(attention, "qkv", attention)  # none in an erased branch
        return self.initial_state(batch_size if has_forward_hooks(projection) else 1)

    def _project(self, rows: Tensor) -> Tokens:
        return Tokens(rows, cast(Layer, self.blocks[0]).project(rows))

    def _block(
        self, parts: list[Tokens], keep: slice, context: list[Tensor | None] | None = None
    ) -> Tensor:
        """Apply the block f to the concatenated parts, returning the rows of parts ``keep``."""
        context = [None] * len(self.blocks) if context is None else context
        if self.grad_checkpointing and self.training:
            return checkpoint(self._run_block, parts, keep, context, use_reentrant=False)
        return self._run_block(parts, keep, context)

    def _run_block(self, parts: list[Tokens], keep: slice, context: list[Tensor | None]) -> Tensor:
        rows, qkv, kept = end_to_end(parts, keep, context)
        for number, layer in enumerate(cast(Iterable[Layer], self.blocks), start=1):
            if number > 1:
                qkv = layer.project(rows)
            wanted = kept if number == len(self.blocks) else EVERY
            rows = layer(rows, qkv, wanted, context[number - 1])
        return rows

    # timm's contract

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute the final tokens [y; z], (batch, 1 + latents, dim), with one prefix token."""
        x, state = self._image_tokens(self.embed(images)), self._start(images.shape[0])
        for _ in range(self.recursion_steps):
            state = self._recur(x, state)
        return torch.cat(state, dim=1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute class logits of ``forward_features``' tokens; ``pre_logits`` gives y itself."""
        y = features[:, 0]
        return y if pre_logits else cast(Tensor, self.head(y))

    def set_input_size(self, img_size: ImageSize | None = None, patch_size: None = None) -> None:
        """Take images of another size, with positions resampled.

        So are latents, if there is one per patch.

        Args:
            img_size: Side of the images in pixels, or height and width.
            patch_size: None; another size of patches would need other weights.

        Raises:
            ValueError: Patches do not divide the size, or another ``patch_size``.
        """
        if patch_size not in (None, self.patch_size):
            raise ValueError(f"patch_size stays {self.patch_size}: create another model")
        if img_size is None:
            return
        height, width = sides_of(img_size, self.patch_size)
        before, self.grid_size = (
            self.grid_size,
            (height // self.patch_size, width // self.patch_size),
        )
        self.input_shape = (self.input_shape[0], height, width)
        if self.pos_embed is not None:
            self.pos_embed = resampled(self.pos_embed, before, self.grid_size)
        if self.latent_per_patch:
            self.z_init = resampled(self.z_init, before, self.grid_size)
        self.feature_info = feature_info(self)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the memory z after latent steps, as timm's models do after their blocks.

        Args:
            x: Images (batch, channels, height, width).
            indices: Of the steps, counted over all recursion steps; the last so many if an int, all
                if None.
            norm: Has no effect, as there is no final norm.
            stop_early: Leave out the recursion steps behind the last of these.
            output_fmt: NCHW, maps (batch, dim, rows, columns), or NLC, (batch, latents, dim).
            intermediates_only: Leave out the features.

        Returns:
            ``forward_features`` and the memories, or these alone.

        Raises:
            ValueError: Another format, or latents that lie on no grid as NCHW.
        """
        cut = stop_early and intermediates_only
        features, found = intermediates(self, x, indices, output_fmt, cut)
        return found if intermediates_only else (features, found)

    def __prepare_scriptable__(self) -> None:
        """Refuse TorchScript, whose error would be of a line inside."""
        raise UsageError(
            "a ViTRM can't be compiled by torch.jit.script, which has no loops over such states: "
            "take torch.jit.trace, torch.export or smallfry export"
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the class head by a new one; 0 classes remove it."""
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool of a ViTRM is 'token', not {global_pool!r}")
        self.num_classes = num_classes
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        _init_head(head)
        self.head = head.to(self.y_init)

    def get_classifier(self) -> nn.Module:
        """Return the class head."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the block in the backward pass: less memory, a third more arithmetic."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, besides biases and norms."""
        return {"pos_embed", "y_init", "z_init"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for timm's layer-wise learning rates."""
        return {
            "stem": r"^pos_embed|^patch_embed|^y_init|^z_init",
            "blocks": [(r"^blocks\.(\d+)", None)],
        }


def _init_head(head: nn.Module) -> None:
    if isinstance(head, nn.Linear):
        nn.init.xavier_normal_(head.weight)
        nn.init.zeros_(head.bias)


# The named sizes


def image_cfg(side: int, channels: int) -> dict[str, Any]:
    """Build timm's configuration of a model for square images."""
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (channels, side, side),
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "first_conv": "patch_embed",
        "classifier": "head",
    }


SIZES: dict[str, dict[str, Any]] = {  # parameters for 10 classes
    "vitrm_small_patch4_32": {},  # the paper's: 3,624,971
    # the paper's sizes with 16 latents that cross-attend to the image: 321 MMAC
    "vitrm_thrifty_patch4_32": {"cross_attention": True, "latents": 16},
    # half the paper's width: 927,755
    "vitrm_tiny_patch4_32": {"embed_dim": 192, "num_heads": 3, "mlp_hidden_dim": 256},
    "vitrm_micro_patch4_8": {  # for 8×8 grey images such as scikit-learn's digits: 109,131
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 64,
        "num_heads": 4,
        "mlp_hidden_dim": 96,
    },
}
default_cfgs = generate_default_cfgs(
    {
        name: image_cfg(sizes.get("img_size", 32), sizes.get("in_chans", 3))
        for name, sizes in SIZES.items()
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    return build_vitrm(ViTRM, variant, pretrained, SIZES[variant] | kwargs)


register_sizes(__name__, SIZES, _create)
