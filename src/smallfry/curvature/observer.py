"""Observer of a model's forward and backward passes, the source of Fisher gradients.

A hook before and one behind the model's forward do nothing unless an observation is due. When it
is, taps are open during the forward. When the caller's own backward pass arrives at the outputs,
its gradient there shows which rows the loss counts, and the Fisher's gradients are taken on the
same graph, before that pass goes on. An observation counts once a backward pass goes through its
outputs and into ``.grad``: a forward for logging, or the gradient of an adversarial image, does
not. Evaluation mode and ``no_grad`` are left alone.
"""

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from smallfry._torch import (
    after_backward,
    current_autograd_node,
    is_functorch_wrapped_tensor,
    tree_leaves,
    tree_map,
)
from smallfry.curvature.hooks import EagerStance, Root, WeakHook, upstream
from smallfry.curvature.identity import (
    belongs,
    is_ambiguous,
    mixes_samples,
    own_share,
    position_first,
    samples_of,
)
from smallfry.curvature.layers import is_linear
from smallfry.curvature.likelihoods import Likelihood
from smallfry.curvature.passes import Passes, backward_pass, versions_of
from smallfry.curvature.replay import autocast_of, random_state, restored
from smallfry.curvature.row_weights import RowWeights
from smallfry.curvature.taps import Call, Observation, Taps
from smallfry.errors import UsageError

MOST_DRAWN = 2**26  # numbers that are drawn for other processes' samples too
_thread = threading.local()
FISHERS = ("mc", "exact", "empirical", "none")


class Observer:
    """Hooks on a model, and the observations since they were last taken.

    Args:
        root: The module whose call is a training forward pass; a compiled one runs
            uncompiled while it is observed.
        taps: The layers to tap.
        likelihood: Density of the targets given the model's output.
        fisher: "mc", "exact" or "empirical"; "none" takes inputs alone.
        draws: Sampled targets per sample, for "mc".
        generator: Generator of the sampled targets.
        wanted: Called at each forward pass: "taps", "outputs", "sizes" of these alone, or "" for
            nothing; a method, held weakly: without its owner, nothing.
        begin_draw: Called with the number of an observation in its step before targets are drawn,
            to set the generator; held weakly.
    """

    def __init__(
        self,
        root: nn.Module,
        taps: Taps,
        likelihood: Likelihood,
        fisher: str,
        draws: int,
        generator: torch.Generator,
        wanted: Callable[[], str],
        begin_draw: Callable[[int], None],
    ) -> None:
        if fisher not in FISHERS:
            raise UsageError(f"fisher must be one of {', '.join(FISHERS)}, not '{fisher}'")
        if draws < 1:
            raise UsageError(f"draws must be at least 1, not {draws}")
        self.root, self.taps, self.likelihood = root, taps, likelihood
        self.fisher, self.draws, self.generator = fisher, draws, generator
        self._wanted, self._begin_draw = weakref.WeakMethod(wanted), weakref.WeakMethod(begin_draw)
        self.process = (0, 1)  # which of the processes that share a batch this is, and of how many
        self.watch_backward = False  # note the training gradients at the taps too
        self.needs_identity = False  # of rows: which sample they belong to
        self.probing = False  # make sure of it
        self.keep_arguments = False  # what a second pass over the same batch needs
        self.grad_scale: Callable[[], float] = lambda: 1.0
        self.pending: list[Observation] = []  # that count, not yet taken
        self.given_weights: Any = None  # of the rows of the outputs, as the user stated them
        self.rescaled = False  # the last backward pass was that of a GradScaler's loss
        self._touched: dict[int, list[Observation]] = {}  # by backward pass
        self._accumulated: set[int] = set()  # backward passes that reached ``.grad``
        self._receiver: Tensor | None = None  # a parameter that they reached,
        self._received: Tensor | None = None  # its ``.grad`` then,
        self._received_norm: Tensor | None = None  # and the norm of that
        self._current: Observation | None = None
        self._depth = 0  # calls of the root that are running: a model may call itself
        self._eager: weakref.finalize[..., Any] | None = None
        self._paused = False
        self._busy = False
        self._grad_handles: list[Any] = []
        self._handles = [
            root.register_forward_pre_hook(WeakHook(self._before), with_kwargs=True),
            root.register_forward_hook(WeakHook(self._behind), with_kwargs=True, always_call=True),
        ]

    def watch(self, taps: Taps) -> None:
        """Tap other layers from now on."""
        self.taps.close()
        self.taps = taps
        self.drop()
        while self._grad_handles:
            self._grad_handles.pop().remove()

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """One trained parameter of each block; a layer may have been frozen since."""
        firsts = (
            next((p for p in block.parameters.values() if p.requires_grad), None)
            for block in self.taps.blocks
        )
        return [p for p in firsts if p is not None]

    def take(self) -> list[Observation]:
        """Return the valid observations and forget them."""
        taken, self.pending, self.given_weights = self.pending, [], None
        self._touched, self._accumulated = {}, set()
        if self._received is not None and self._received_norm is not None:
            self.rescaled = _was_unscaled(float(self._received_norm), float(self._received.norm()))
        self._receiver = self._received = self._received_norm = None
        self._depth = 0
        return taken

    def drop(self) -> None:
        """Discard the valid observations after the caller has discarded their gradients."""
        self.pending, self._depth = [], 0

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles + self._grad_handles:
            handle.remove()
        self._finish()
        self.drop()

    def use_training_gradients(self, observations: Sequence[Observation], factor: float) -> None:
        """Use the gradients of the caller's own backward pass, for the empirical Fisher.

        Args:
            observations: Observations of all micro-batches.
            factor: The sum over samples of the negative log-likelihood, over the training loss.
        """
        unit = factor / self.grad_scale()
        for seen in observations:
            found = [seen.training_gradient(call) for call in seen.calls]
            precise = [
                None if g is None else g if g.dtype == torch.float64 else g.float() for g in found
            ]
            own = unit * seen.grouping**0.5
            seen.draws = [[None if g is None else g * own for g in precise]]

    def rerun(self, seen: Observation, function: Callable[[], Any]) -> Any:
        """Call a function that reruns the model, unobserved, with that pass's random state."""
        self._paused = True
        try:
            with restored(seen.random_state):
                return function()
        finally:
            self._paused = False

    # The two hooks

    def _before(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        self._depth += 1
        if self._depth > 1:
            return  # part of the pass that is observed
        self._finish()
        if backward_pass() < 0:  # passes that ended without reaching ``.grad`` never will
            self._touched, self._accumulated = {}, set()
        if self._paused or not module.training or not torch.is_grad_enabled():
            return
        owner = self._wanted()
        wanted = owner() if owner is not None else ""
        if not wanted:
            while self._grad_handles:
                self._grad_handles.pop().remove()
            return
        parameters = self._parameters
        if not parameters:
            return  # nothing that a backward pass could bring a gradient to
        if self.pending and all(p.grad is None for p in parameters):
            self.pending = []  # gradients cleared by another than this optimizer
        self._current = Observation(0, [], sizes_only=wanted == "sizes")
        if self.keep_arguments:
            self._current.arguments, self._current.keywords = tree_map(
                lambda leaf: leaf, (arguments, keywords)
            )
            self._current.versions = versions_of(arguments, keywords)
            self._current.random_state = random_state(module)
            self._current.autocast = autocast_of(parameters[0].device.type)
        if wanted == "taps":
            # compiled code, here or around us, would not run the taps
            EagerStance.begin()  # ends with the pass, or with an observer that didn't see its end
            self._eager = weakref.finalize(self, EagerStance.end)
            self.taps.open(self.watch_backward or self.fisher == "empirical")

    def _behind(
        self,
        module: nn.Module,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        output: Any = None,
    ) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        seen, tapped = self._current, self.taps.is_open
        calls = self._finish()
        if seen is None or output is None:
            return
        outputs = self.likelihood.select(output)
        live = [z for z in outputs if z.requires_grad]
        if not live or any(is_functorch_wrapped_tensor(z) for z in live):
            return  # nothing to train, or inside a transform of torch.func
        with torch.no_grad():
            size = self.likelihood.rows(outputs)
        if size == 0:
            return
        called = [(call.block.layers[call.layer], call.inputs.shape) for call in calls]
        # an embedding's rows may be those of positions, whatever the samples
        called = [pair for pair in called if not isinstance(pair[0], nn.Embedding)]
        given = tree_leaves((arguments, keywords))
        seen.calls, seen.size, seen.samples = calls, size, samples_of(called, size, given)
        for call in calls:
            self._place(seen, call)
        seen.outputs = tuple(z.detach() for z in outputs)
        seen.likelihood = self.likelihood.of_last()
        seen.passes = tuple(Passes() for _ in outputs)
        seen.foreign = self.taps.foreign
        sampled = tapped and not seen.foreign and self.fisher in ("mc", "exact")
        for index, z in enumerate(outputs):
            if z.requires_grad:
                own = get_gradient_edge(z)
                places = {n: call.edge for n, call in enumerate(calls) if call.edge is not None}
                root = Root(index, own.output_nr, z._version, *upstream(own, places, sampled))
                z.register_hook(_arrival(weakref.ref(self), seen, root))  # type: ignore[no-untyped-call]
        for call in calls:
            call.edge = None  # it would keep the graph alive, and the graph this observation
        if not self._grad_handles:
            for p in self._parameters:
                handle = p.register_post_accumulate_grad_hook(WeakHook(self._reached))  # type: ignore[no-untyped-call]
                self._grad_handles.append(handle)

    def _reached(self, parameter: Tensor) -> None:
        number = backward_pass()
        if self._receiver is parameter and parameter.grad is not self._received:
            self.pending = []  # what they added up to was cleared by another than the optimizer
        if self._receiver is None or self._receiver is parameter:
            self._receiver, self._received = parameter, parameter.grad
            self._received_norm = None if parameter.grad is None else parameter.grad.norm()
        self._accumulated.add(number)
        for seen in self._touched.pop(number, ()):
            self._count(seen, number)

    def arrive(self, seen: Observation, root: Root, gradient: Tensor) -> None:
        """Handle a backward pass at an output: mark what counts, and draw targets."""
        number = backward_pass()
        if seen.calls:  # checkpoints run again what ran in the forward pass
            self.taps.spell_out()
            after_backward(self.taps.restore)
        if seen.number < 0:
            seen.number = len(self.pending) + len(self._touched.get(number, ()))
        if number in self._accumulated:
            self._count(seen, number)
        elif seen not in self._touched.setdefault(number, []):
            self._touched[number].append(seen)
        if seen.sizes_only:
            return
        gradient, seen.scale = gradient.detach(), self.grad_scale()
        seen.passes[root.which].note(gradient)
        if not bool(gradient.isfinite().all()):
            return
        if root.which in seen.weights:  # an earlier pass showed part of the loss, or none of it
            whole = seen.passes[root.which].total(seen.training | {number})
            assert whole is not None
            gradient = whole
        if seen.outputs[root.which]._version != root.version:
            raise UsageError(
                "the model's output was overwritten in place after the forward pass, so its "
                "curvature can't be computed: avoid that in-place operation"
            )
        with torch.no_grad():
            seen.weights[root.which] = self._weights(seen, root.which, gradient)
            if root.sampled:
                self._busy = _thread.busy = True
                try:
                    self._take_gradients(seen, root)
                finally:
                    self._busy = _thread.busy = False
                for call in seen.calls:
                    call.passes.forget_after(number)  # hooks on outputs saw these passes too

    def _weights(self, seen: Observation, index: int, gradient: Tensor) -> RowWeights | None:
        assert seen.likelihood is not None
        if self.given_weights is None:
            found = seen.likelihood.row_weights(seen.outputs, index, gradient)
            if found is None or found.unit is None:
                return found
            return found._replace(unit=found.unit / seen.scale)
        try:
            return seen.likelihood.given_weights(seen.outputs, index, self.given_weights)
        except ValueError as error:
            raise UsageError(f"weigh(): {error}") from None

    @property
    def busy(self) -> bool:
        """True during the backward pass of any observer."""
        return self._busy or getattr(_thread, "busy", False)

    def _count(self, seen: Observation, number: int) -> None:
        if not seen.training:
            self.pending.append(seen)
        seen.training.add(number)

    def _finish(self) -> list[Call]:
        if self._eager is not None:
            self._eager()  # once
        self._current, self._eager = None, None
        return self.taps.close()

    def _take_gradients(self, seen: Observation, root: Root) -> None:
        """Compute the Fisher's gradients at all calls, for the rows of one output."""
        if seen.likelihood is None or not seen.likelihood.is_density(seen.outputs):
            return  # nothing can be sampled from such a density: no draws, no statistics
        weights = seen.weights[root.which]
        node: Any = current_autograd_node()
        place = GradientEdge(node, root.output)
        if self._unsure(seen):
            self._probe(seen, root, place)
        draws: list[list[Tensor | None]] = []
        for column in self._columns(seen):
            g = column[root.which]
            if weights is None:
                g = torch.zeros_like(g)
            elif weights.values is not None:
                g = g * weights.values.to(g).sqrt()
            found: list[Tensor | None] = [None] * len(seen.calls)
            if self.fisher == "mc" or bool(g.any()):
                g = g.to(root.dtype_of(seen))
                for number in root.here:
                    found[number] = g
                if root.edges:
                    below = torch.autograd.grad(
                        [place], list(root.edges.values()), [g], retain_graph=True,
                        allow_unused=True,
                    )  # fmt: skip
                    for number, part in zip(root.edges, below, strict=True):
                        found[number] = part
            draws.append(found)
        seen.parts[root.which] = draws

    def _signed(self, seen: Observation, column: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give a column a random sign per sample, which leaves its own moments unchanged.

        Where a batch norm brings the gradients of several samples to one row, columns of one sign
        would add up; so do they on average not.
        """
        device = self.generator.device
        bits = torch.randint(2, (seen.samples,), generator=self.generator, device=device)
        signs = (2 * bits - 1).repeat_interleave(seen.size // seen.samples)
        return tuple(
            g * signs.to(g).reshape(-1, *[1] * (g.ndim - 1)) if len(g) == len(signs) else g
            for g in column
        )

    def _place(self, seen: Observation, call: Call) -> None:
        """Find the samples of a call in its first or second dimension."""
        module, shape, known = call.block.layers[call.layer], call.inputs.shape, self.taps.second
        if isinstance(module, nn.Embedding):
            call.together = self.taps.together.get(
                call.layer, not belongs(module, shape, seen.samples)
            )
        if is_ambiguous(module, shape, seen.samples):
            call.second = known.get(call.layer, False)
        elif is_linear(module) and len(shape) > 2:
            known[call.layer] = shape[0] != seen.samples and shape[1] == seen.samples

    def _unsure(self, seen: Observation) -> bool:
        untried = any(
            isinstance(call.block.layers[call.layer], nn.Embedding)
            and not call.together
            and call.layer not in self.taps.together
            for call in seen.calls
        )
        if untried and (self.needs_identity or self.fisher == "exact"):
            return True
        return self.needs_identity and (self.probing or self._ambiguous(seen))

    def _ambiguous(self, seen: Observation) -> bool:
        return any(
            call.layer not in self.taps.second
            and is_ambiguous(call.block.layers[call.layer], call.inputs.shape, seen.samples)
            for call in seen.calls
        )

    def _probe(self, seen: Observation, root: Root, place: GradientEdge) -> None:
        """Backpropagate from one sample's output to find its rows."""
        z = seen.outputs[root.which]
        if seen.samples < 2 or z.shape[:1] != (seen.size,) or not root.edges:
            return
        sample, mixed = seen.samples - 1, mixes_samples(self.root)
        generator = torch.Generator().manual_seed(0)
        g = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        g[: sample * (seen.size // seen.samples)] = 0
        edges = list(root.edges.values())
        back = torch.autograd.grad([place], edges, [g], retain_graph=True, allow_unused=True)
        for number, found in zip(root.edges, back, strict=True):
            call = seen.calls[number]
            own = None if found is None else own_share(seen.canonical(call, found), sample)
            if found is None or own is None:
                continue
            module = call.block.layers[call.layer]
            if is_ambiguous(module, call.inputs.shape, seen.samples):
                call.second = not call.second
                other = own_share(seen.canonical(call, found), sample) or 0.0
                call.second ^= own >= other
                self.taps.second[call.layer] = call.second
                own = max(own, other)
            call.astray = own < 0.95
            if mixed:  # a batch norm sends gradients to the rows of others too: not to one order
                turned = position_first(found, seen.samples)
                other = 0.0 if turned is None else (
                    own_share(seen.canonical(call, turned), sample) or 0.0
                )  # fmt: skip
                call.astray = other > max(0.5, 1.3 * own)
            if isinstance(module, nn.Embedding):  # rows of no sample are rows of all
                call.together = call.together or own < (0.5 if mixed else 0.95)
                self.taps.together[call.layer], call.astray = call.together, False

    def _columns(self, seen: Observation) -> Iterator[tuple[Tensor, ...]]:
        assert seen.likelihood is not None
        begin = self._begin_draw()
        if begin is not None:
            begin(seen.number)
        if self.fisher == "exact":
            apart = seen.size // seen.samples  # rows of one sample
            columns = seen.likelihood.columns(seen.outputs)
            if mixes_samples(self.root) or any(call.together for call in seen.calls):
                columns = (self._signed(seen, column) for column in columns)
            for column in columns:
                for first in range(apart):
                    yield column if apart == 1 else tuple(_only(g, first, apart) for g in column)
            return
        for _ in range(self.draws):
            weight = self.draws**-0.5
            yield tuple(g * weight for g in self._sampled(seen))

    def _sampled(self, seen: Observation) -> tuple[Tensor, ...]:
        """Draw gradients for sampled targets, as one process would for the whole batch.

        Each process draws for as many samples as all have, and keeps its own: apart from each
        other, the same however many share the batch, and without a message. Where shares are
        uneven, or batches come in parts, samples get other draws than in one process; so they do
        where drawing for all would take too much memory.
        """
        assert seen.likelihood is not None
        sample, outputs = seen.likelihood.sample_gradients, seen.outputs
        rank, count = self.process
        if count == 1:
            return sample(outputs, self.generator)
        mine = seen.size
        if count * sum(z.numel() for z in outputs) > MOST_DRAWN:
            seed = torch.randint(2**62, (), generator=self.generator, device=self.generator.device)
            generator = torch.Generator(self.generator.device).manual_seed(int(seed) + rank)
            return sample(outputs, generator)
        rows = (torch.arange(mine * count, device=outputs[0].device) - mine * rank) % mine
        own = [z.shape[:1] == (mine,) for z in outputs]  # others may be losses, or of layers
        drawn = sample(
            tuple(z[rows] if o else z for z, o in zip(outputs, own, strict=True)), self.generator
        )
        kept = slice(mine * rank, mine * (rank + 1))
        return tuple(g[kept] if o else g for g, o in zip(drawn, own, strict=True))


def _was_unscaled(then: float, now: float) -> bool:
    """Return whether a gradient was divided by a GradScaler's power of two, perhaps also clipped.

    Averaging over processes and clipping alone change it by other factors, and by less.
    """
    if not 0 < now < then / 1.5:
        return False
    power = math.log2(then / now)
    return abs(power - round(power)) < 1e-3 or power > 6


def _only(tensor: Tensor, first: int, every: int) -> Tensor:
    """Keep some rows of a tensor, and zero the others."""
    found = torch.zeros_like(tensor)
    found[first::every] = tensor[first::every]
    return found


def _arrival(
    observer: "weakref.ref[Observer]", seen: Observation, root: Root
) -> Callable[[Tensor], None]:
    def arrive(gradient: Tensor) -> None:
        owner = observer()
        if owner is not None and not owner.busy:
            owner.arrive(seen, root, gradient)

    return arrive
