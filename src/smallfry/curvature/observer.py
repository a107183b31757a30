"""Watches a model's own forward and backward passes, and takes the Fisher's gradients from them.

A hook before and one behind the model's forward do nothing unless an observation is due. When it
is, taps are open during the forward, and the Fisher's gradients are asked for right behind it on
the graph that the caller's own backward will use. An observation counts once a backward pass goes
through its outputs and into ``.grad``: a forward for logging, or the gradient of an adversarial
image, does not. Evaluation mode and ``no_grad`` are left alone.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from smallfry.curvature.likelihoods import Likelihood
from smallfry.curvature.taps import (
    Call,
    Observation,
    Passes,
    Taps,
    backward_pass,
    versions_of,
)
from smallfry.errors import UsageError

MOST_DRAWN = 2**26  # numbers that are drawn for other processes' samples too
FISHERS = ("mc", "exact", "empirical", "none")


class Observer:
    """Hooks on a model, and the observations they made since they were last taken.

    Args:
        root: The module whose call is a training forward pass; a compiled one runs
            uncompiled while it is observed.
        taps: The layers to tap.
        likelihood: What the model's output says of targets.
        fisher: "mc", "exact" or "empirical"; "none" takes inputs alone.
        draws: Sampled targets per sample, for "mc".
        generator: Where they are drawn from.
        wanted: Asked at each forward pass: "taps", "outputs" or "" for nothing; a method, held
            weakly: an owner that is gone wants nothing.
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
    ) -> None:
        if fisher not in FISHERS:
            raise UsageError(f"fisher is one of {', '.join(FISHERS)}, not '{fisher}'")
        if draws < 1:
            raise UsageError(f"draws is at least 1, not {draws}")
        self.root, self.taps, self.likelihood = root, taps, likelihood
        self.fisher, self.draws, self.generator = fisher, draws, generator
        self._wanted = weakref.WeakMethod(wanted)
        self.process = (0, 1)  # which of the processes that share a batch this is, and of how many
        self.watch_backward = False  # note the training gradients at the taps too
        self.keep_arguments = False  # what a second pass over the same batch needs
        self.grad_scale: Callable[[], float] = lambda: 1.0
        self.pending: list[Observation] = []  # that count, not yet taken
        self.seen = 0  # observations since they were last taken, whether they count or not
        self._touched: dict[int, list[Observation]] = {}  # by backward pass
        self._accumulated: set[int] = set()  # backward passes that reached ``.grad``
        self._receiver: Tensor | None = None  # a parameter that they reached,
        self._received: Tensor | None = None  # and its ``.grad`` then
        self._current: Observation | None = None
        self._eager = False
        self._paused = False
        self._parameters = [next(iter(b.parameters.values())) for b in taps.blocks]
        self._grad_handles: list[Any] = []
        self._handles = [
            root.register_forward_pre_hook(_Hook(self._before), with_kwargs=True),
            root.register_forward_hook(_Hook(self._behind), always_call=True),
        ]

    def take(self) -> list[Observation]:
        """The observations that count, and forget them."""
        taken, self.pending, self.seen = self.pending, [], 0
        self._touched, self._accumulated = {}, set()
        self._receiver = self._received = None
        return taken

    def drop(self) -> None:
        """Forget the observations that count: the caller has thrown their gradients away."""
        self.pending = []

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles + self._grad_handles:
            handle.remove()
        self.taps.close()
        self.drop()

    def use_training_gradients(self, observations: Sequence[Observation], factor: float) -> None:
        """Take the empirical Fisher's gradients from the caller's own backward pass.

        Args:
            observations: Of all micro-batches.
            factor: The sum over samples of the negative log-likelihood, over the training loss.
        """
        unit = factor / self.grad_scale()
        for seen in observations:
            found = [seen.training_gradient(call) for call in seen.calls]
            precise = [
                None if g is None else g if g.dtype == torch.float64 else g.float() for g in found
            ]
            seen.draws = [[None if g is None else g * unit for g in precise]]

    def rerun(self, seen: Observation, function: Callable[[], Any]) -> Any:
        """Call a function that runs the model again, unobserved, with that pass's randomness."""
        devices = [torch.device(d) for d in seen.random_state if d != "cpu"]
        self._paused = True
        try:
            with torch.random.fork_rng(devices=devices):
                for device, state in seen.random_state.items():
                    if device == "cpu":
                        torch.set_rng_state(state)
                    else:
                        torch.cuda.set_rng_state(state, device)
                return function()
        finally:
            self._paused = False

    # The two hooks

    def _before(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        self._finish()
        if self._paused or not module.training or not torch.is_grad_enabled():
            return
        owner = self._wanted()
        wanted = owner() if owner is not None else ""
        if not wanted:
            while self._grad_handles:
                self._grad_handles.pop().remove()
            return
        if self.pending and all(p.grad is None for p in self._parameters):
            self.drop()  # gradients cleared by another than this optimizer
        self.seen += 1
        self._current = Observation(0, [])
        if self.keep_arguments:
            self._current.arguments, self._current.keywords = arguments, keywords
            self._current.versions = versions_of(arguments, keywords)
            self._current.random_state = _random_state(module)
            self._current.autocast = _autocast(self._parameters[0].device.type)
        if wanted == "taps":
            # compiled code, here or around us, would not know of the taps
            self._eager = True
            _Eager.begin()
            self.taps.open(self.watch_backward or self.fisher == "empirical")

    def _behind(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen, tapped = self._current, self.taps.is_open
        calls = self._finish()
        if seen is None or output is None:
            return
        outputs = self.likelihood.select(output)
        live = [z for z in outputs if z.requires_grad]
        if not live or any(is_functorch_wrapped_tensor(z) for z in live):
            return  # nothing to train, or inside a transform of torch.func
        seen.calls, seen.samples = calls, outputs[0].shape[0] if outputs[0].ndim else 1
        seen.outputs = tuple(z.detach() for z in outputs)
        seen.passes = tuple(Passes() for _ in outputs)
        seen.foreign = self.taps.foreign
        if tapped and not seen.foreign and self.fisher in ("mc", "exact"):
            self._take_gradients(seen, outputs)
        for call in calls:
            call.edge = None  # it would keep the graph alive, and the graph this observation
            call.passes.clear()  # the hooks on outputs saw the Fisher's gradients too
        for z, noted in zip(outputs, seen.passes, strict=True):
            if z.requires_grad:
                z.register_hook(_note(weakref.ref(self), seen, noted))  # type: ignore[no-untyped-call]
        if not self._grad_handles:
            for p in self._parameters:
                handle = p.register_post_accumulate_grad_hook(_Hook(self._reached))  # type: ignore[no-untyped-call]
                self._grad_handles.append(handle)

    def _reached(self, parameter: Tensor) -> None:
        number = backward_pass()
        if self._receiver is parameter and parameter.grad is not self._received:
            self.pending = []  # what they added up to was cleared by another than the optimizer
        if self._receiver is None or self._receiver is parameter:
            self._receiver, self._received = parameter, parameter.grad
        self._accumulated.add(number)
        for seen in self._touched.pop(number, ()):
            self._count(seen, number)

    def touch(self, seen: Observation) -> None:
        """A backward pass went through an observation's outputs."""
        number = backward_pass()
        if number in self._accumulated:
            self._count(seen, number)
        else:
            self._touched.setdefault(number, []).append(seen)

    def _count(self, seen: Observation, number: int) -> None:
        if not seen.training:
            self.pending.append(seen)
        seen.training.add(number)

    def _finish(self) -> list[Call]:
        if self._eager:
            _Eager.end()
        self._current, self._eager = None, False
        return self.taps.close()

    def _take_gradients(self, seen: Observation, outputs: tuple[Tensor, ...]) -> None:
        edges = [call.edge for call in seen.calls if call.edge is not None]
        if not edges or not self.likelihood.is_density(seen.outputs):
            return  # nothing can be sampled from such a density: no draws, no statistics
        with torch.autocast(outputs[0].device.type, enabled=False), torch.no_grad():
            if self.fisher == "exact":
                columns, weight = self.likelihood.columns(seen.outputs), 1.0
            else:
                columns = (self._sampled(seen.outputs) for _ in range(self.draws))
                weight = self.draws**-0.5
            for column in columns:
                live = [(z, g) for z, g in zip(outputs, column, strict=True) if z.requires_grad]
                draw = torch.autograd.grad(
                    [z for z, _ in live],
                    edges,
                    [g.to(z.dtype) * weight for z, g in live],
                    retain_graph=True,
                    allow_unused=True,
                )
                seen.draws.append(draw)

    def _sampled(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients for sampled targets: those that one process would draw for the whole batch.

        Each process draws for as many samples as all have, and keeps its own: apart from each
        other, the same however many share the batch, and without a message. Where shares are
        uneven, or batches come in parts, samples get other draws than in one process; so they do
        where drawing for all would take too much memory.
        """
        sample = self.likelihood.sample_gradients
        rank, count = self.process
        if count == 1:
            return sample(outputs, self.generator)
        mine = len(outputs[0])
        if count * sum(z.numel() for z in outputs) > MOST_DRAWN:
            seed = torch.randint(2**62, (), generator=self.generator, device=self.generator.device)
            own = torch.Generator(self.generator.device).manual_seed(int(seed) + rank)
            return sample(outputs, own)
        rows = (torch.arange(mine * count, device=outputs[0].device) - mine * rank) % mine
        drawn = sample(tuple(z[rows] for z in outputs), self.generator)
        return tuple(g[mine * rank : mine * (rank + 1)] for g in drawn)


class _Eager:
    """The compiler's stance, for as long as some observer wants eager execution.

    Observers of one model begin and end in the same order, so that each can't restore what it
    found.
    """

    depth = 0
    stance: Any = None

    @classmethod
    def begin(cls) -> None:
        if cls.depth == 0:
            cls.stance = torch.compiler.set_stance("force_eager")
        cls.depth += 1

    @classmethod
    def end(cls) -> None:
        cls.depth -= 1
        if cls.depth == 0:
            cls.stance.__exit__(None, None, None)


class _Hook:
    """A weakly held method, so that a copied or pickled model has no part in the optimizer."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self.method = None if method is None else weakref.WeakMethod(method)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, *arguments: Any) -> None:
        method = None if self.method is None else self.method()
        if method is not None:
            method(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()


def _note(
    observer: "weakref.ref[Observer]", seen: Observation, noted: Passes
) -> Callable[[Tensor], None]:
    def note(gradient: Tensor) -> None:
        owner = observer()
        if owner is not None:
            noted.note(gradient / owner.grad_scale())
            owner.touch(seen)

    return note


def _autocast(device: str) -> tuple[str, torch.dtype] | None:
    if not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device)


def _random_state(module: nn.Module) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    for device in {p.device for p in module.parameters() if p.is_cuda}:
        states[str(device)] = torch.cuda.get_rng_state(device)
    return states
