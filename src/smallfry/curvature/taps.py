"""Taps: inputs and output gradients of each covered layer, call by call.

While taps are open, a forward hook on each covered layer notes, for every call, the input tensor
and the place in the autograd graph where the output was made. Gradients are asked for at that
place, so an activation that later overwrites the output changes nothing, a layer that is called
many times gives many pairs, and no second forward pass is needed. Closed taps leave no hooks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from smallfry.curvature.coverage import Block
from smallfry.curvature.embedding_rows import (
    given_to_first,
    is_tied,
    levelled,
    numbers_of,
    one_hot,
    padding_of,
)
from smallfry.curvature.identity import belongs, padded, real_rows
from smallfry.curvature.layers import (
    canonical_gradients,
    canonical_inputs,
    input_of,
    ones_column,
    outputs_of,
)
from smallfry.curvature.likelihoods import Likelihood
from smallfry.curvature.passes import Passes, versions_of
from smallfry.curvature.row_weights import RowWeights
from smallfry.curvature.rows import Rows
from smallfry.errors import UsageError


@dataclass(eq=False)
class Call:
    """One call of one layer."""

    block: Block
    layer: str
    inputs: Tensor
    version: int
    shape: torch.Size  # of the output
    edge: GradientEdge | None  # until the Fisher's gradients are taken: it keeps the graph alive
    passes: "Passes" = field(default_factory=lambda: Passes())
    second: bool = False  # the samples are in the second dimension, where they may be in the first
    astray: bool = False  # rows were found not to be where their samples are expected
    together: bool = False  # an embedding's rows that all samples use: their gradients come summed


@dataclass(eq=False)
class Observation:
    """One forward pass: its calls, and gradients at their outputs.

    Args:
        samples: Samples that the network saw.
        calls: In the order they were made.
        draws: For each draw, a gradient per call; None where none arrives.
        size: Rows in the first dimension of the outputs: the samples, unless the model has put
            these together with tokens.
    """

    samples: int
    calls: list[Call]
    draws: list[Sequence[Tensor | None]] = field(default_factory=list)
    size: int = 0
    likelihood: Likelihood | None = None  # of its outputs
    parts: dict[int, list[list[Tensor | None]]] = field(default_factory=dict)  # draws by output
    weights: dict[int, RowWeights | None] = field(default_factory=dict)  # by output
    shares: dict[int, float] = field(default_factory=dict)  # that weights are to be multiplied by
    weighted: dict[int, bool] = field(default_factory=dict)  # rows differ, here or from others
    grouping: float = 1.0  # samples over size
    number: int = -1  # among the observations of a step, once gradients came to it
    foreign: list[str] = field(default_factory=list)  # layers that had another weight
    outputs: tuple[Tensor, ...] = ()  # what the likelihood is a function of, detached
    passes: tuple[Passes, ...] = ()  # gradients at the outputs, of the scaled loss
    scale: float = 1.0  # of the loss, by a GradScaler
    sizes_only: bool = False  # nothing but sizes and shapes is to be noted
    training: set[int] = field(default_factory=set)  # backward passes that ended in ``.grad``
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    random_state: dict[str, Tensor] = field(default_factory=dict)
    autocast: tuple[str, torch.dtype] | None = None  # device and precision, where it was on
    versions: tuple[int, ...] = ()  # of the arguments, before the forward pass

    @property
    def output_gradients(self) -> list[Tensor | None]:
        """Gradients of the training loss at the outputs, in float32 or higher."""
        found = [noted.total(self.training) for noted in self.passes]
        # only then divided: in float16 it might be nothing
        precise = [g if g is None or g.dtype == torch.float64 else g.float() for g in found]
        return [g if g is None or self.scale == 1 else g / self.scale for g in precise]

    @property
    def unchanged(self) -> bool:
        """True if the recorded arguments have not been overwritten since the forward pass."""
        return versions_of(self.arguments, self.keywords) == self.versions

    def tensors(self) -> Iterator[Tensor]:
        """Return the floating-point inputs of all calls, and the gradients drawn for them."""
        for tensor in [*(c.inputs for c in self.calls), *(g for draw in self.draws for g in draw)]:
            if tensor is not None and tensor.is_floating_point():
                yield tensor

    def training_gradient(self, call: Call) -> Tensor | None:
        """Return the training-loss gradient at a call's output; None if none arrived."""
        return call.passes.total(self.training)

    def put_together(self) -> None:
        """Add up the draws of all outputs, each by its share."""
        if not self.parts:
            return
        scales = {i: (self.shares.get(i, 1.0) * self.grouping) ** 0.5 for i in self.parts}
        draws = [[_scaled(g, scales[i]) for g in draw] for i, part in self.parts.items()
                 for draw in part]  # fmt: skip
        count = max((len(part) for part in self.parts.values()), default=0)
        self.draws = [
            [_added(own) for own in zip(*draws[first::count], strict=True)]
            for first in range(count)
        ]

    @property
    def row_shares(self) -> list[Tensor | None]:
        """Row weights in the batch's Fisher, for each output; None for ones."""
        found: list[Tensor | None] = []
        for index, z in enumerate(self.outputs):
            one, share = self.weights.get(index), self.shares.get(index, 1.0)
            if one is None and self.weights:
                found.append(z.new_zeros((1,) * z.ndim))  # the loss counts no row
            elif one is None or one.values is None:
                found.append(None if share == 1 else z.new_full((1,) * z.ndim, share))
            else:
                found.append(one.values * share)
        return found

    def hessian_product(self, tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiply the weighted Hessian of −log p by tangents."""
        assert self.likelihood is not None
        product = self.likelihood.hessian_product(self.outputs, tangents)
        pairs = zip(product, self.row_shares, strict=True)
        return tuple(u if w is None else u * w.to(u) for u, w in pairs)

    @property
    def sample_weights(self) -> Tensor | None:
        """Mean weight of each sample over its counted rows and the outputs; None for ones."""
        found = []
        for index, one in self.weights.items():
            z = self.outputs[index]
            rows = None if one is None else one.of_samples(z.shape[:1].numel())
            if one is not None and rows is None and self.weighted.get(index):
                rows = z.new_ones(len(z), dtype=torch.float64)  # other parts may weigh more
            if one is not None and rows is not None:
                found.append(rows * (1.0 if one.unit is None else one.unit))
        if not found:
            return None
        mean = torch.stack(found).mean(0)
        rows = mean.reshape(self.samples, -1)
        return rows.sum(1) / (rows > 0).sum(1).clamp_min(1)

    def clear(self) -> None:
        """Release all tensors, even if the observation is still referenced."""
        self.calls, self.draws, self.outputs, self.passes = [], [], (), ()
        self.parts, self.weights = {}, {}
        self.arguments, self.keywords, self.random_state = (), {}, {}

    def rows(
        self,
        block: Block,
        dtype: torch.dtype,
        uses: Callable[[int], Tensor | None] | None = None,
        numbered: bool = False,
    ) -> Rows | None:
        """Return the rows of a block in canonical form; None if it was not called.

        Args:
            block: The block.
            dtype: Precision of the result.
            uses: Given the number of uses, an index of those to keep, or None for all. The
                gradients kept are scaled by √(all / kept), so that sums over uses of g gᵀ keep
                their expectation.
            numbered: One-hot inputs by their number alone, (1, samples, uses, 1), −1 for zeros.
        """
        mine = [
            index
            for index, call in enumerate(self.calls)
            if call.block is block and call.inputs.numel()
        ]
        if not mine:
            return None
        counts = [self._uses(self.calls[index]) for index in mine]
        total = sum(counts)
        kept = None if uses is None else uses(total)
        inputs, gradients, weights, start = [], [], [], 0
        for index, count in zip(mine, counts, strict=True):
            call = self.calls[index]
            some = None
            if kept is not None:
                some = kept[(kept >= start) & (kept < start + count)] - start
                start += count
            drawn = [draw[index] for draw in self.draws]
            a, per_draw = self._pair(call, drawn, dtype, some, numbered)
            inputs.append(a)
            if kept is not None and some is not None:
                scale = (total / len(kept)) ** 0.5
                per_draw = [g.index_select(2, some) * scale for g in per_draw]
            if per_draw:
                gradients.append(torch.stack(per_draw, dim=1))
            else:
                gradients.append(inputs[-1].new_zeros(*_no_draws(inputs[-1], block)))
            weights.append(self._row_weights(call, inputs[-1], gradients[-1], some))
        tied = [is_tied(self.calls[index]) for index in mine]
        if any(tied):
            inputs, gradients = levelled(tied, inputs, gradients)
        a = inputs[0] if len(mine) == 1 else torch.cat(inputs, dim=2)
        g = gradients[0] if len(mine) == 1 else torch.cat(gradients, dim=3)
        return Rows(a, g, _joined_weights(weights, inputs))

    def anonymous(self, block: Block) -> str | None:
        """Return a layer of a block called on rows that position can't assign to samples."""
        return next(
            (
                c.layer
                for c in self.calls
                if c.block is block and not c.together and not self._belongs(c)
            ),
            None,
        )

    def _leaves_out(self) -> bool:
        """Return whether the loss counts only some rows of a sample."""
        for one in self.weights.values():
            if one is not None and one.values is not None:
                rows = one.values.reshape(self.samples, -1) > 0
                if bool((rows.any(1) & ~rows.all(1)).any()):
                    return True
        return False

    def astray(self, block: Block) -> str | None:
        """Return a layer of a block whose rows belong to other samples than by position."""
        return next((c.layer for c in self.calls if c.block is block and c.astray), None)

    def canonical(self, call: Call, gradient: Tensor) -> Tensor:
        """Reshape a gradient at a call's output to (groups, samples, uses, outputs)."""
        return self._gradients(call, gradient, gradient.dtype)

    def _belongs(self, call: Call) -> bool:
        module = call.block.layers[call.layer]
        return not call.together and belongs(module, call.inputs.shape, self.samples)

    def _uses(self, call: Call) -> int:
        """Count the uses of the weight by each sample in a call."""
        rows = call.shape.numel() // outputs_of(call.block.layers[call.layer])
        if call.together:
            return rows
        if self._belongs(call):
            return rows // self.samples
        real = real_rows(call.block.layers[call.layer], call.shape, self.samples, call.inputs)
        return real.shape[1]

    def _row_weights(
        self, call: Call, inputs: Tensor, gradients: Tensor, kept: Tensor | None
    ) -> Tensor | None:
        """Return row weights in means over inputs, 0 for rows left out."""
        weights, own = self.sample_weights, self._belongs(call)
        module = call.block.layers[call.layer]
        padding = padding_of(module)
        if weights is None and own and padding is None:
            return None
        if call.together:
            found = inputs.new_zeros(inputs.shape[1:3])
            found[:1] = 1
        elif weights is None and own:
            found = inputs.new_ones(inputs.shape[1:3])
        elif weights is None or not own:
            found = real_rows(module, call.shape, self.samples, inputs)
            found = found if kept is None else found.index_select(1, kept)
        else:
            found = weights.to(inputs)[:, None].expand(inputs.shape[1:3])
        if padding is not None:
            numbers = numbers_of(module, call.inputs, self.samples, self._place(call), kept)
            found = found * (numbers[0, :, :, 0] >= 0)
        if is_tied(call):
            return found * (inputs != 0).any(3)[0]
        if gradients.shape[1] and self._leaves_out():
            found = found * (gradients != 0).any(4).any(1).any(0)
        return found

    def training_matrix(self, block: Block, dtype: torch.dtype) -> tuple[Tensor, float] | None:
        """Compute the training-loss gradient covered by the taps; None before backward.

        Returns:
            The matrix (groups, outputs, inputs), and the size of the terms that it is a sum of.
        """
        total, terms = None, 0.0
        for call in self.calls:
            gradient = self.training_gradient(call) if call.block is block else None
            if gradient is not None and gradient.numel():
                a, (g,) = self._pair(call, [gradient], dtype)
                matrix = torch.einsum("hnto,hnti->hoi", g, a)
                total = matrix if total is None else total + matrix
                terms += float((g.norm(dim=3) * a.norm(dim=3)).sum())
        return None if total is None else (total, terms)

    def _pair(
        self,
        call: Call,
        gradients: Sequence[Tensor | None],
        dtype: torch.dtype,
        kept: Tensor | None = None,
        numbered: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Gather the inputs of some uses, and the gradients of all, one per draw."""
        if not is_tied(call):
            found = [self._gradients(call, gradient, dtype) for gradient in gradients]
            return self._inputs(call, dtype, kept, numbered), found
        module = call.block.layers[call.layer]
        numbers = numbers_of(module, call.inputs, self.samples, self._place(call))[..., 0]
        deltas = self._gradients(call, gradients[0] if gradients else None, dtype)
        deltas = deltas if kept is None else deltas.index_select(2, kept)
        codes = one_hot(numbers, call.block.shape[1], dtype)
        return ones_column(deltas, len(call.block.biases), None), [codes] * len(gradients)

    def _place(self, call: Call) -> str:
        if call.together or not self._belongs(call):
            return "together" if call.together else "none"
        return "second" if call.second else "first"

    def _inputs(
        self, call: Call, dtype: torch.dtype, kept: Tensor | None, numbered: bool = False
    ) -> Tensor:
        module, block = call.block.layers[call.layer], call.block
        chosen, columns = block.bias_column(module), len(block.biases)
        inputs, output = call.inputs, call.inputs.new_empty(()).expand(call.shape)
        if block.one_hot:
            if inputs._version != call.version:
                raise UsageError(_OVERWRITTEN.format(layer=call.layer))
            numbers = numbers_of(module, inputs, self.samples, self._place(call), kept)
            return (
                numbers.to(dtype) if numbered else one_hot(numbers[..., 0], block.shape[2], dtype)
            )
        if not self._belongs(call):
            inputs, output = (padded(module, t, self.samples) for t in (inputs, output))
        elif call.second:
            inputs, output = inputs.transpose(0, 1), output.transpose(0, 1)
        rows = canonical_inputs(module, inputs, output, self.samples, kept).to(dtype)
        if not block.has_weight:
            return ones_column(rows[..., :0], columns, chosen)
        if call.inputs._version != call.version:
            raise UsageError(_OVERWRITTEN.format(layer=call.layer))
        return ones_column(rows, columns, chosen)

    def _gradients(self, call: Call, gradient: Tensor | None, dtype: torch.dtype) -> Tensor:
        if gradient is None:
            gradient = call.inputs.new_zeros(call.shape)
        module = call.block.layers[call.layer]
        padding = padding_of(module)
        if padding is not None:
            gradient = gradient.masked_fill(call.inputs == padding, 0)
        if call.together:
            return given_to_first(gradient, self.samples).to(dtype)
        if not self._belongs(call):
            gradient = padded(module, gradient, self.samples)
        elif call.second:
            gradient = gradient.transpose(0, 1)
        return canonical_gradients(module, gradient, self.samples).to(dtype)


_OVERWRITTEN = (
    "the input of layer '{layer}' was overwritten after the call, so its curvature can't be taken: "
    "make that operation not in-place, or exclude the layer"
)


def _scaled(tensor: Tensor | None, scale: float) -> Tensor | None:
    return tensor if tensor is None or scale == 1 else tensor * scale


def _added(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [t for t in tensors if t is not None]
    return sum(there[1:], start=there[0]) if there else None


def _joined_weights(found: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
    if all(one is None for one in found):
        return None
    pairs = zip(found, inputs, strict=True)
    return torch.cat([a.new_ones(a.shape[1:3]) if w is None else w for w, a in pairs], 1)


def _no_draws(inputs: Tensor, block: Block) -> tuple[int, ...]:
    groups, samples, uses, _ = inputs.shape
    return groups, 0, samples, uses, block.shape[1]


class Taps:
    """Forward hooks on the layers of blocks, present only while open."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.blocks = tuple(blocks)
        self._handles: list[RemovableHandle] = []
        self._hosts = tuple(dict.fromkeys(h for block in self.blocks for h in block.hosts))
        self._calls: list[Call] = []
        self.second: dict[str, bool] = {}  # where a layer's samples were, if that was clear
        self.together: dict[str, bool] = {}  # of embeddings that were tried
        self.foreign: list[str] = []  # layers that were called with another weight

    @property
    def is_open(self) -> bool:
        """True while calls are recorded."""
        return bool(self._handles)

    def open(self, watch_backward: bool = False) -> None:
        """Record calls from now on.

        Args:
            watch_backward: Also note the training loss's gradients, when they come.
        """
        self.close()
        self.foreign = []
        self.spell_out()
        for block in self.blocks:
            for layer, module in block.layers.items():
                hook = _tap(self._calls, self.foreign, block, layer, watch_backward)
                # in front: the layer may be the whole model, whose own hook closes the taps
                handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                self._handles.append(handle)

    def close(self) -> list[Call]:
        """Stop recording, and return the calls since ``open``."""
        for handle in self._handles:
            handle.remove()
        self.restore()
        calls = list(self._calls)
        self._handles, self._calls = [], []
        return calls

    def spell_out(self) -> None:
        """Decompose the forward of modules that don't call their layers."""
        for host in self._hosts:
            host.spell_out()

    def restore(self) -> None:
        """Restore their own forward."""
        for host in self._hosts:
            host.restore()


def _tap(
    calls: list[Call], foreign: list[str], block: Block, layer: str, watch_backward: bool
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor | None]:
    def note(
        module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> Tensor | None:
        if module._parameters.get("weight") is not block.weight:
            foreign.append(layer)
            return None
        if not output.requires_grad:  # under no_grad: nothing comes back from here
            return None
        is_view = output._is_view()  # as of PyTorch 2.11's Linear on more than two dimensions
        if is_view:
            # what overwrites a view in place sends gradients past it, to what it is a view of
            output = torch.ops.aten._unsafe_view(output, output.shape)
        inputs = input_of(arguments, keywords).detach()
        if isinstance(module, nn.Embedding):
            inputs = inputs.unsqueeze(-1)  # features last, as of all layers
        edge = get_gradient_edge(output)
        call = Call(block, layer, inputs, inputs._version, output.shape, edge)
        if watch_backward:
            # a hook on the tensor before anything overwrites it gets the gradient of this value
            output.register_hook(call.passes.note)
        calls.append(call)
        return output if is_view else None

    return note
