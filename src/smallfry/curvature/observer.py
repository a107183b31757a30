"""Watches a model's own forward and backward passes, and takes the Fisher's gradients from them.

A hook before and one behind the model's forward do nothing unless an observation is due. When it
is, taps are open during the forward, the Fisher's gradients are asked for right behind it on the
graph that the caller's own backward will use, and a tensor hook on the output tells when that
backward comes: a forward without one, such as for logging, never counts. Evaluation mode and
``no_grad`` are left alone.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from smallfry.curvature.likelihoods import Likelihood
from smallfry.curvature.taps import Call, Observation, Taps
from smallfry.errors import UsageError

FISHERS = ("mc", "exact", "empirical")


class Observer:
    """Hooks on a model, and the observations they made since they were last taken.

    Args:
        root: The module whose call is a training forward pass; a compiled one runs
            uncompiled while it is observed.
        taps: The layers to tap.
        likelihood: What the model's output says of targets.
        fisher: "mc", "exact" or "empirical".
        draws: Sampled targets per sample, for "mc".
        generator: Where they are drawn from.
        wanted: Asked at each forward pass: "taps", "outputs" or "" for nothing.
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
        self.fisher, self.draws, self.generator, self.wanted = fisher, draws, generator, wanted
        self.watch_backward = False  # note the training gradients at the taps too
        self.keep_arguments = False  # what a second pass over the same batch needs
        self.grad_scale: Callable[[], float] = lambda: 1.0
        self.pending: list[Observation] = []
        self._current: Observation | None = None
        self._paused = False
        self._handles = [
            root.register_forward_pre_hook(_Hook(self._before), with_kwargs=True),
            root.register_forward_hook(_Hook(self._behind), always_call=True),
        ]

    def take(self) -> list[Observation]:
        """The observations whose backward came, and forget all."""
        arrived = [seen for seen in self.pending if seen.arrived]
        self.pending = []
        return arrived

    def drop_arrived(self) -> None:
        """Forget observations whose gradient the caller has thrown away."""
        self.pending = [seen for seen in self.pending if not seen.arrived]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.taps.close()

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
        wanted = self.wanted()
        if not wanted:
            return
        self._current = Observation(0, [])
        if self.keep_arguments:
            self._current.arguments, self._current.keywords = arguments, keywords
            self._current.random_state = _random_state(module)
        if wanted == "taps":
            if _is_compiled(module):
                torch.compiler.set_stance("force_eager")
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
        seen.output_gradients = [None] * len(outputs)
        seen.foreign = self.taps.foreign
        if tapped and not seen.foreign and self.fisher != "empirical":
            self._take_gradients(seen, outputs)
            for call in calls:  # the hooks on outputs saw these gradients too
                call.backward = None
        for index, z in enumerate(outputs):
            if z.requires_grad:
                z.register_hook(_arrival(seen, index, self.grad_scale))  # type: ignore[no-untyped-call]
        self.pending.append(seen)

    def _finish(self) -> list[Call]:
        if self.taps.is_open and _is_compiled(self.root):
            torch.compiler.set_stance("default")
        self._current = None
        return self.taps.close()

    def _take_gradients(self, seen: Observation, outputs: tuple[Tensor, ...]) -> None:
        edges = seen.edges()
        if not edges or not all(bool(z.isfinite().all()) for z in seen.outputs):
            return  # nothing can be sampled from such a density: no draws, no statistics
        with torch.autocast(outputs[0].device.type, enabled=False), torch.no_grad():
            if self.fisher == "exact":
                columns, weight = self.likelihood.columns(seen.outputs), 1.0
            else:
                sample = self.likelihood.sample_gradients
                columns = (sample(seen.outputs, self.generator) for _ in range(self.draws))
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


class _Hook:
    """A weakly held method, so that a copied or pickled model has no part in the optimizer."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self.method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *arguments: Any) -> None:
        method = None if self.method is None else self.method()
        if method is not None:
            method(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()


def _arrival(
    seen: Observation, index: int, grad_scale: Callable[[], float]
) -> Callable[[Tensor], None]:
    def note(gradient: Tensor) -> None:
        gradient = gradient.detach() / grad_scale()
        before = seen.output_gradients[index]
        seen.output_gradients[index] = gradient if before is None else before + gradient
        seen.arrived = True

    return note


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or any(
        hasattr(inner, "_orig_mod") or inner._compiled_call_impl is not None
        for inner in module.modules()
    )


def _random_state(module: nn.Module) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    for device in {p.device for p in module.parameters() if p.is_cuda}:
        states[str(device)] = torch.cuda.get_rng_state(device)
    return states
