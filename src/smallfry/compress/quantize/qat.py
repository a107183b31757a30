"""Quantisation-aware training with learned step sizes (LSQ), 2 to 8 bits.

Every linear layer and convolution trains with its weight, and its inputs at each call, rounded with
learned steps (``smallfry.layers.fake_quant``). Begin from a trained model (``--model.start``), with
a tenth of its learning rate. Steps are parameters of the model: checkpoints, averages of the
weights and resumed runs hold them like any other.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from smallfry.compress.quantize.calibration import supported, unsupported
from smallfry.compress.quantize.calls import Passes, count_calls, histograms
from smallfry.compress.quantize.ranges import find_range
from smallfry.compress.select import dense_layers
from smallfry.errors import UsageError
from smallfry.layers.fake_quant import FakeQuantized, fake_quantized
from smallfry.layers.quantized import QuantizedWeight, number_calls
from smallfry.layers.quantizers import BITS, affine
from smallfry.models import Recursive
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.bits import Bits
from smallfry.transforms.modes import evaluating
from smallfry.transforms.replace import replace_layers, tied_layers
from smallfry.transforms.spec import Transform


@register_method
@dataclass(frozen=True)
class LSQ:
    """Training with learned step sizes of quantised weights and inputs.

    A recursive model of several recursion steps has one step size for all calls of a layer, as it
    trains one recursion step at a time.

    Args:
        weights: Bits per weight, 2 to 8.
        activations: Bits of the layers' inputs, 2 to 8; None leaves them in floating point.
        edges: Bits of the first called layer and of the classifier, weights and inputs.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep in floating point.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry import compress
        >>> model, images = timm.create_model("vitrm_micro_patch4_8"), torch.rand(8, 1, 8, 8)
        >>> optimizer_of = lambda m: torch.optim.AdamW(m.parameters(), 1e-4)
        >>> session = compress.Session(model, [compress.LSQ(weights=4)], images, steps=1)
        >>> optimizer = optimizer_of(model)  # after the session, which adds parameters
        >>> session.attach(optimizer)
        >>> torch.nn.functional.cross_entropy(model(images), torch.arange(8)).backward()
        >>> _ = optimizer.step()
        >>> [each.kind for each in session.finish().transforms]
        ['bits']
    """

    name: ClassVar[str] = "lsq"
    trains: ClassVar[bool] = True

    weights: int = 4
    activations: int | None = 4
    edges: int = 8
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "edges"):
            bits = getattr(self, name)
            optional = name == "activations" and bits is None
            if not optional and (type(bits) is not int or bits not in BITS):
                raise UsageError(f"lsq.{name} must be 2 to 8 bits, not {bits!r}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Train(self)


class _Train(Method):
    needs = ("layers",)

    def __init__(self, settings: LSQ) -> None:
        self._settings = settings
        self._layers: dict[str, dict[str, Any]] = {}  # settings of all layers by all their names
        self._first: str | None = None
        self._hooks: list[Any] = []

    def begin(self, model: nn.Module, setting: Setting) -> None:
        settings = self._settings
        if not setting.example.numel():
            raise UsageError("lsq needs example inputs: pass example=")
        left = unsupported(model, settings.include, settings.exclude)
        chosen = dense_layers(model, settings.include, settings.exclude)
        names = supported(settings.name, chosen, left, setting.rehearsal)
        ties, modules = tied_layers(model), dict(model.named_modules(remove_duplicate=False))
        every = dict.fromkeys(alias for name in names for alias in ties[name])
        canonical = {id(module): name for name, module in model.named_modules()}
        own = dict.fromkeys(canonical[id(modules[alias])] for alias in every)
        with evaluating(model):
            passes = count_calls(model, own, setting.example)
            edges = _edges(model, passes)
            inputs = self._inputs(model, passes, edges, setting)
        bits = {name: settings.edges if name in edges else settings.weights for name in own}
        made: dict[str, dict[str, Any]] = {}
        for name in own:
            made[name] = {"bits": bits[name]}
            if name in inputs:
                width = settings.edges if name in edges else settings.activations
                made[name] |= {"input_bits": width, "calls": len(inputs[name][0])}
        self._layers = {alias: made[canonical[id(modules[alias])]] for alias in every}
        replace_layers(model, every, lambda old, name: cast(
            nn.Module, fake_quantized(old, **self._layers[name])
        ))  # fmt: skip
        for name, (scale, zero) in inputs.items():
            cast(FakeQuantized, model.get_submodule(name)).set_inputs(scale, zero)
        several = any(each.get("calls", 1) > 1 for each in made.values())
        self._first = passes.first if several else None
        self._hooks = number_calls(model, self._first)

    def _inputs(
        self, model: nn.Module, passes: Passes, edges: set[str], setting: Setting
    ) -> dict[str, Any]:
        """Measure first steps and zero points of inputs, by call."""
        settings = self._settings
        if settings.activations is None:
            return {}
        batches = [setting.example] if setting.rehearsal else setting.batches
        if next(iter(batches), None) is None:
            batches = [setting.example]
        per_call = not (isinstance(model, Recursive) and model.recursion_steps > 1)
        found = {}
        for name, calls in histograms(model, passes.calls, batches, per_call).items():
            bits = settings.edges if name in edges else settings.activations
            ranges = [find_range(each, "mse", bits) for each in calls]
            low, high = (torch.tensor(ends) for ends in zip(*ranges, strict=True))
            found[name] = affine(low, high, bits)
        return found

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Do nothing: gradients differ from those that the layers' inputs give, by clipping."""

    @torch.no_grad()
    def finish(self, model: nn.Module) -> Transform:
        for hook in self._hooks:
            hook.remove()
        old = {name: model.get_submodule(name) for name in self._layers}
        replace_layers(
            model,
            self._layers,
            lambda layer, name: QuantizedWeight.from_dense(layer, **self._layers[name]),
        )
        for name, before in old.items():
            _fill(cast(Any, model.get_submodule(name)), cast(Any, before))
        number_calls(model, self._first)
        return Bits(self._layers, self._first)


def _fill(layer: Any, before: Any) -> None:
    layer.codes.copy_(before.codes())
    layer.scales.fill_(float(before.weight_step))
    if before.input_bits is not None:
        layer.input_scales.copy_(before.input_steps)
        layer.input_zeros.copy_(before.input_zeros)


def _edges(model: nn.Module, passes: Passes) -> set[str]:
    """Return the first called layer and the classifier, or the last layer without one."""
    names = list(passes.calls)
    classifier: Any = getattr(model, "get_classifier", lambda: None)()
    parts = classifier if isinstance(classifier, list | tuple) else (classifier,)
    last = [n for n in names if any(model.get_submodule(n) is part for part in parts)]
    return {*names[:1], *(last or names[-1:])}
