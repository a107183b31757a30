"""Post-training quantisation: weights, and optionally inputs, to 2 to 8 bits, without labels.

Steps, in this order, each optional but for the codes: channels are rescaled exactly (equalisation,
smoothing); bits are chosen by curvature under a budget; ranges of inputs are measured for each
call; weights are rounded layer by layer; biases are corrected for the mean error.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from smallfry.compress.quantize.calibration import (
    Images,
    require_images,
    supported,
    unsupported,
)
from smallfry.compress.quantize.calls import Passes, count_calls, histograms
from smallfry.compress.quantize.equalize import equalize, smooth
from smallfry.compress.quantize.mixed import BUDGETS, Budget, choose_bits
from smallfry.compress.quantize.moments import input_means, moments
from smallfry.compress.quantize.ranges import RANGES, Range, find_range
from smallfry.compress.quantize.rounding import adaptive_rounding
from smallfry.compress.quantize.sensitivity import MEASURES, Measure
from smallfry.compress.select import dense_layers
from smallfry.curvature.layers import matrix_to_weight, weight_to_matrix
from smallfry.errors import UsageError
from smallfry.layers.quantized import QuantizedWeight, number_calls, quantize
from smallfry.layers.quantizers import BITS, affine, grouped, least_error_scale, spread
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.bits import Bits
from smallfry.transforms.modes import evaluating
from smallfry.transforms.replace import replace_layers, tied_layers
from smallfry.transforms.spec import Transform

ROUNDINGS = ("nearest", "adaround")
WEIGHT_RANGES = ("minmax", "mse")


@register_method
@dataclass(frozen=True)
class Quantize:
    """Post-training quantisation of a model.

    Args:
        weights: Bits per weight, 2 to 8, where no budget is given.
        activations: Bits of the layers' inputs, 2 to 8; None leaves them in floating point.
        group: Consecutive inputs of a weight's row with a scale of their own; None for one per row.
        weight_range: Scales of weights: ``mse`` or ``minmax``.
        activation_range: ``minmax``, ``percentile``, ``mse`` or ``kl``.
        percentile: Share of the inputs inside the range of ``percentile``, in percent.
        per_call: A range for each call of a layer; else one for all.
        rounding: ``nearest``, or ``adaround`` by calibration images.
        iterations: Iterations of AdaRound per layer.
        bias_correction: Correct the mean output error of every layer by its bias.
        equalize: Rescale channels between layers first, where that is exact; an example shows where
            that is in an ``nn.Sequential`` of a model of your own.
        smooth: Move ranges behind LayerNorms from inputs to weights first, by this exponent in
            (0, 1), such as 0.5; None for not.
        budget: Mixed precision of this budget; None for the same bits everywhere.
        budget_of: Unit of the budget: average bits over ``weights``, over ``macs``, or ``bytes``
            of all codes.
        sensitivity: ``kronecker``, ``fisher`` or ``hessian``.
        choices: Bits to choose from under a budget.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep in floating point.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry.compress import Quantize, apply_to_model
        >>> model, images = timm.create_model("vitrm_micro_patch4_8"), torch.rand(32, 1, 8, 8)
        >>> method = Quantize(weights=4, activations=8)
        >>> small, spec = apply_to_model(model, [method], example=images[:2], batches=[images])
        >>> small.blocks[0].attn.qkv.input_scales.shape  # a range for each call
        torch.Size([6])
    """

    name: ClassVar[str] = "quantize"
    trains: ClassVar[bool] = False

    weights: int = 8
    activations: int | None = None
    group: int | None = None
    weight_range: str = "mse"
    activation_range: Range = "minmax"
    percentile: float = 99.99
    per_call: bool = True
    rounding: str = "nearest"
    iterations: int = 1000
    bias_correction: bool = False
    equalize: bool = False
    smooth: float | None = None
    budget: float | None = None
    budget_of: Budget = "weights"
    sensitivity: Measure = "kronecker"
    choices: tuple[int, ...] = (2, 3, 4, 8)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_bits("weights", self.weights)
        if self.activations is not None:
            _require_bits("activations", self.activations)
        _require(self.group is None or self.group >= 1, "group must be at least 1")
        for name, allowed in _CHOICES.items():
            given = getattr(self, name)
            _require(given in allowed, f"{name} is one of {', '.join(allowed)}, not {given!r}")
        _require(50 < self.percentile <= 100, "percentile must be above 50, and at most 100")
        _require(self.iterations >= 1, "iterations must be at least 1")
        _require(self.smooth is None or 0 < self.smooth < 1, "smooth must be between 0 and 1")
        _require(self.budget is None or self.budget > 0, "budget must be positive")
        _require(bool(self.choices), "choices is empty")
        for bits in self.choices:
            _require_bits("choices", bits)

    @property
    def needs_images(self) -> bool:
        """True if images are needed."""
        measured = self.activations is not None or self.budget is not None
        return measured or self.rounding == "adaround" or self.bias_correction or bool(self.smooth)

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Quantize(self)


_CHOICES: dict[str, Any] = {
    "weight_range": WEIGHT_RANGES,
    "activation_range": RANGES,
    "rounding": ROUNDINGS,
    "budget_of": BUDGETS,
    "sensitivity": MEASURES,
}
assert set(get_args(Budget)) == set(BUDGETS)


def nearest_codes(
    weight: Tensor, bits: int, group: int | None = None, weight_range: str = "mse"
) -> tuple[Tensor, Tensor]:
    """Round a weight to the nearest codes.

    Args:
        weight: (outputs, …).
        bits: 2 to 8.
        group: Consecutive inputs with a scale of their own; None for one scale per output.
        weight_range: ``mse`` or ``minmax``.

    Returns:
        Codes and scales, as of ``smallfry.layers.quantized.quantize``.
    """
    scales = None
    if weight_range == "mse":
        rows = grouped(weight.detach().double().flatten(1), group)
        scales = least_error_scale(rows, bits).squeeze(-1)
    return quantize(weight, bits, group, scales)


def rounding_error(
    weight: Tensor, bits: int, group: int | None = None, weight_range: str = "mse"
) -> Tensor:
    """Compute Ŵ − W of nearest rounding; arguments as ``nearest_codes``."""
    codes, scales = nearest_codes(weight, bits, group, weight_range)
    if group is not None:
        scales = spread(scales, weight.shape, group)
    return codes.to(weight.dtype) * scales.to(weight.dtype) - weight


class _Quantize(Method):
    def __init__(self, settings: Quantize) -> None:
        self._settings = settings
        self._setting: Setting | None = None
        self._report: dict[str, Any] = {}

    def begin(self, model: nn.Module, setting: Setting) -> None:
        self._setting = setting

    def finish(self, model: nn.Module) -> Transform:
        with evaluating(model):
            return self._quantize(model)

    def _quantize(self, model: nn.Module) -> Transform:
        settings, setting = self._settings, self._setting
        assert setting is not None
        images = Images(setting.batches, setting.example, setting.rehearsal)
        chosen = dense_layers(model, settings.include, settings.exclude)
        left = unsupported(model, settings.include, settings.exclude)
        layers = _Layers(model, supported(settings.name, chosen, left, setting.rehearsal))
        if settings.needs_images:
            require_images("quantize", model, images)
        passes = Passes({}, None)
        if images.example.numel():
            passes = count_calls(model, layers.names, images.example)
        if settings.equalize:
            equalize(model, example=images.example)
        if settings.smooth is not None:
            smooth(model, images.batches, settings.smooth)
        bits, mixed = self._bits(model, layers, images, setting.seed)
        reference = deepcopy(model)
        inputs = self._inputs(reference, passes, images)
        means: dict[str, Tensor] = {}
        if settings.bias_correction:
            means = input_means(reference, passes.calls, images.batches)
        own = {name: self._own(reference, name, bits, inputs, means) for name in layers.names}
        replaced: set[str] = set()
        several = any(each.get("calls", 1) > 1 for each in own.values())
        first = passes.first if several else None
        order = [*passes.calls, *(n for n in layers.names if n not in passes.calls)]
        for name in order:
            if name not in replaced:
                tied = layers.tied(name)
                some = {n: own[n] for n in tied}
                self._replace(model, reference, some, layers, images, first)
                for each in {*tied} & inputs.keys():  # which AdaRound of later layers needs
                    layer: Any = model.get_submodule(each)
                    layer.input_scales.copy_(inputs[each][0])
                    layer.input_zeros.copy_(inputs[each][1])
                replaced |= {*tied}
        for name, mean in means.items():
            _correct_bias(reference.get_submodule(name), model.get_submodule(name), mean)
        number_calls(model, first)
        self._report = {
            "method": "quantize",
            "layers": [_line(reference, model, name, own[name]) for name in layers.names],
            "left_in_float": left,
            "lists": {"layers left in floating point": [each["name"] for each in left]},
            "calibration": images.description() if settings.needs_images else None,
            **mixed,
        }
        return Bits({alias: own[name] for alias, name in layers.aliases.items()}, first)

    def report(self) -> dict[str, Any] | None:
        return self._report

    def _bits(
        self, model: nn.Module, layers: "_Layers", images: Images, seed: int
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """Choose the bits of every layer, and report how."""
        settings = self._settings
        if settings.budget is None:
            return dict.fromkeys(layers.names, settings.weights), {"mixed": None}
        errors = {
            name: {
                b: rounding_error(_weight(model, name), b, settings.group, settings.weight_range)
                for b in sorted({*settings.choices})
            }
            for name in layers.firsts
        }
        found = choose_bits(
            model, errors, settings.budget, settings.budget_of, settings.sensitivity,
            images.batches, seed,
        )  # fmt: skip
        bits = {n: found.bits[first] for first in layers.firsts for n in layers.tied(first)}
        return bits, {"mixed": found.report, "profile": found.profile}

    def _codes(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return nearest_codes(weight, bits, self._settings.group, self._settings.weight_range)

    def _inputs(
        self, model: nn.Module, passes: Passes, images: Images
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Measure scales and zero points of the layers' inputs, by call."""
        settings = self._settings
        if settings.activations is None:
            return {}
        seen = histograms(model, passes.calls, images.batches, settings.per_call)
        found = {}
        for name, calls in seen.items():
            ranges = [
                find_range(h, settings.activation_range, settings.activations, settings.percentile)
                for h in calls
            ]
            low, high = (torch.tensor(ends) for ends in zip(*ranges, strict=True))
            found[name] = affine(low, high, settings.activations)
        return {name: (each.scale, each.zero) for name, each in found.items()}

    def _own(
        self, model: nn.Module, name: str, bits: dict[str, int], inputs: Any, means: Any
    ) -> dict[str, Any]:
        """Return the settings of one quantised layer."""
        found: dict[str, Any] = {"bits": bits[name]}
        if self._settings.group is not None:
            found["group"] = self._settings.group
        if name in inputs:
            found |= {"input_bits": self._settings.activations, "calls": len(inputs[name][0])}
        if name in means and model.get_submodule(name).bias is None:
            found["bias"] = True
        return found

    @torch.no_grad()
    def _replace(
        self, model: nn.Module, reference: nn.Module, own: dict[str, Any], layers: "_Layers",
        images: Images, first: str | None,
    ) -> None:  # fmt: skip
        """Replace one weight's layers by quantised ones."""
        name = next(iter(own))
        codes, scales = self._codes(_weight(model, name), own[name]["bits"])
        if self._settings.rounding == "adaround":
            codes = self._adaptive(
                model, reference, [*own], own[name]["bits"], scales, images, first
            )
        wanted = [alias for alias, each in layers.aliases.items() if each in own]
        by_name = layers.aliases
        replace_layers(
            model, wanted, lambda old, n: QuantizedWeight.from_dense(old, **own[by_name[n]])
        )
        layer: Any = model.get_submodule(name)
        layer.codes.copy_(codes)
        layer.scales.copy_(scales)

    def _adaptive(
        self, model: nn.Module, reference: nn.Module, names: list[str], bits: int, scales: Tensor,
        images: Images, first: str | None,
    ) -> Tensor:  # fmt: skip
        """Round the weight of some layers by AdaRound, over the inputs of all of them."""
        layer: Any = model.get_submodule(names[0])
        handles = number_calls(model, first)
        try:
            seen = moments(reference, model, names, images.batches)
        except ZeroDivisionError:  # a layer that no image reaches
            return self._codes(layer.weight, bits)[0]
        finally:
            for handle in handles:
                handle.remove()
        weight = layer.weight.detach()
        wide = scales.double()
        if self._settings.group is not None:
            wide = spread(wide, weight.shape, self._settings.group)
        scale = weight_to_matrix(layer, wide.expand_as(weight))
        iterations = 1 if images.rehearsal else self._settings.iterations
        with torch.enable_grad():
            found = adaptive_rounding(
                weight_to_matrix(layer, weight), scale, bits, seen, iterations
            )
        return matrix_to_weight(layer, found.codes).to(torch.int8)


def _weight(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight).detach()


class _Layers:
    """Layers to quantise, by the first name of each module, with all their other names."""

    def __init__(self, model: nn.Module, chosen: Iterable[str]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        canonical = {id(module): name for name, module in model.named_modules()}
        ties = tied_layers(model)
        every = dict.fromkeys(alias for one in chosen for alias in ties[one])
        self.aliases = {alias: canonical[id(modules[alias])] for alias in every}
        self.names = list(dict.fromkeys(self.aliases.values()))
        groups: dict[int, list[str]] = {}
        for name in self.names:
            groups.setdefault(id(modules[name].weight), []).append(name)
        self._groups = {name: group for group in groups.values() for name in group}
        self.firsts = [group[0] for group in groups.values()]

    def tied(self, name: str) -> list[str]:
        """Return the layers that have one weight in common, the given one included."""
        return self._groups[name]


@torch.no_grad()
def _correct_bias(dense: Any, layer: Any, mean: Tensor) -> None:
    """Subtract the mean output error (Ŵ − W) E[x] from a layer's bias."""
    error = weight_to_matrix(dense, layer.weight.double() - dense.weight.double())
    layer.bias.sub_((error @ mean.unsqueeze(-1)).flatten().to(layer.bias.dtype))


def _line(reference: nn.Module, model: nn.Module, name: str, own: dict[str, Any]) -> dict[str, Any]:
    before: Any = reference.get_submodule(name).weight
    after: Any = model.get_submodule(name).weight
    size = float(before.detach().double().norm())
    error = float((after.double() - before.detach().double()).norm())
    figures = {"parameters": before.numel(), "weight_error": error / size if size else 0.0}
    return {"name": name, **own, **figures}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(f"quantize.{message}")


def _require_bits(name: str, bits: Any) -> None:
    _require(type(bits) is int and bits in BITS, f"{name} must be 2 to 8 bits, not {bits!r}")
