"""Factorisation of a trained model's layers, at one share of parameters or at a share for each.

Shares are allocated by a sensitivity profile: each layer alone is factorised at several shares, and
the divergence KL(model ‖ factorised) of the class probabilities is measured on calibration images.
The summed divergence is then minimised exactly under the budget; giving parameters step by step to
the layer that gains most for each only approximates that.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from smallfry.compress.quantize.calibration import Images
from smallfry.compress.quantize.knapsack import Option, least_loss
from smallfry.compress.quantize.sensitivity import LayerCurvature, curvature
from smallfry.compress.select import dense_layers, read_by_others
from smallfry.errors import SmallfryWarning, UsageError
from smallfry.io.json import Plain
from smallfry.training.evaluation import forward
from smallfry.training.method import Method, Setting
from smallfry.transforms.modes import evaluating
from smallfry.transforms.replace import Replace, replace_layers, tied_layers
from smallfry.transforms.spec import Transform

Allocation = Literal["uniform", "divergence"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "divergence")
Choose = Callable[[nn.Module], Mapping[str, Plain] | None]
SHARES = tuple(tenths / 10 for tenths in range(1, 10))


@dataclass(frozen=True)
class FactorSettings:
    """Settings of all factorisations.

    Args:
        keep: Parameters of the factors as a share of the layers', below 1.
        include: Shell patterns of layer names.
        exclude: Patterns of layers to keep dense.
        smallest: Layers with fewer parameters stay dense.
        allocation: ``uniform`` gives every layer this share. ``divergence`` chooses a share for
            each, or leaves it dense, such that together they keep this share and the class
            probabilities change least on calibration images.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = False
    tunable: ClassVar[bool] = True
    layer: ClassVar[Any]  # the registered layer that replaces others

    keep: float = 0.5
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    smallest: int = 256
    allocation: Allocation = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UsageError(f"{self.name}.keep must be between 0 and 1, not {self.keep}")
        if self.allocation not in ALLOCATIONS:
            raise UsageError(
                f"{self.name}.allocation is one of {', '.join(ALLOCATIONS)}, not "
                f"'{self.allocation}'"
            )

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Factorise(self)

    @property
    def needs_curvature(self) -> bool:
        """True if layers are fitted in the metric of their curvature."""
        return False

    def choose(self, layer: nn.Module, keep: float) -> dict[str, Plain] | None:
        """Choose the replacement's settings at a share of parameters; None to leave it dense."""
        raise NotImplementedError

    def fit(
        self, layer: nn.Module, chosen: Mapping[str, Plain], known: LayerCurvature | None
    ) -> nn.Module:
        """Create the replacement with the chosen settings."""
        made: nn.Module = self.layer.from_dense(layer, **chosen)
        return made


class _Factorise(Method):
    def __init__(self, settings: FactorSettings) -> None:
        self._settings = settings
        self._setting: Setting | None = None
        self._report: dict[str, Any] | None = None

    def begin(self, model: nn.Module, setting: Setting) -> None:
        self._setting = setting

    def finish(self, model: nn.Module) -> Transform | None:
        settings, setting = self._settings, self._setting
        layers = candidates(model, settings, lambda each: settings.choose(each, settings.keep))
        if not layers and setting is not None and not setting.rehearsal:
            warnings.warn(
                f"{settings.name} leaves the model as it is: no layer that it can replace is "
                f"included and has {settings.smallest} parameters or more (smallest)",
                SmallfryWarning,
                stacklevel=2,
            )
        with evaluating(model):
            known = self._curvature(model, layers)
            profile = self._profile(model, layers, known)
        shares = dict.fromkeys(layers, settings.keep)
        if profile:
            shares = allocate(settings, {name: layers[name] for name in profile}, profile)
        chosen = {
            name: found
            for name, layer in layers.items()
            if (share := shares.get(_first(layers, layer), 1.0)) < 1
            and (found := settings.choose(layer, share)) is not None
        }
        self._report = {
            "method": settings.name,
            "layers": [],
        }
        if profile:
            self._report["profile"] = {
                "choices": "share of the parameters kept (1: dense)",
                "costs": "mean KL from the model, nats",
                "layers": {
                    name: {f"{share:g}": kl for share, kl in [*each.items(), (1, 0.0)]}
                    for name, each in profile.items()
                },
                "chosen": {name: f"{shares[name]:g}" for name in profile},
            }
        if not chosen:
            return None
        lines = self._report["layers"]

        def make(layer: nn.Module, name: str) -> nn.Module:
            made = settings.fit(layer, chosen[name], known.get(name))
            lines.append({"name": name, **chosen[name], **_figures(layer, made)})
            return made

        replace_layers(model, chosen, make)
        return Replace(settings.layer.name, chosen)

    def _images(self) -> Images:
        setting = self._setting
        assert setting is not None
        images = Images(setting.batches, setting.example, setting.rehearsal)
        if next(iter(images.batches), torch.empty(0)).numel() == 0:
            raise UsageError(
                f"{self._settings.name} measures on images: give data (batches= of a model of your "
                "own), or choose settings that need none (allocation: uniform, metric: weights)"
            )
        return images

    def _curvature(
        self, model: nn.Module, layers: Mapping[str, nn.Module]
    ) -> dict[str, LayerCurvature]:
        """Measure the curvature of the layers, where their fit needs it."""
        assert self._setting is not None
        if not layers or not self._settings.needs_curvature:
            return {}
        batches, seed = self._images().batches, self._setting.seed
        known = curvature(model, batches, seed=seed, traces=False)
        if missing := [name for name in layers if name not in known]:
            raise UsageError(
                f"{self._settings.name}: the curvature of '{missing[0]}' is not known: exclude it, "
                "or choose metric: weights"
            )
        return known

    def _profile(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        known: Mapping[str, LayerCurvature],
    ) -> dict[str, dict[float, float]]:
        """Measure the sensitivity profile, where shares are chosen by it."""
        assert self._setting is not None
        if not layers or self._settings.allocation == "uniform" or self._setting.rehearsal:
            return {}
        return sensitivity_profile(model, self._settings, layers, self._images().batches, known)

    def report(self) -> dict[str, Any] | None:
        return self._report


class Selection(Protocol):
    """Selection of layers."""

    @property
    def include(self) -> tuple[str, ...]:
        """Shell patterns of layer names."""

    @property
    def exclude(self) -> tuple[str, ...]:
        """Patterns of layers to keep dense."""

    @property
    def smallest(self) -> int:
        """Layers with fewer parameters stay dense."""


def candidates(model: nn.Module, settings: Selection, choose: Choose) -> dict[str, nn.Module]:
    """List the layers to factorise by name, with all that share a weight with one of them.

    Args:
        model: The model.
        settings: Names and smallest size.
        choose: Settings of a layer's replacement, None if it can't be factorised.
    """
    modules, ties, others = dict(model.named_modules()), tied_layers(model), read_by_others(model)
    names = dense_layers(model, settings.include, settings.exclude)
    return {
        name: modules[name]
        for name in dict.fromkeys(tied for one in names for tied in ties[one])
        if name in modules
        and name not in others
        and _size(modules[name]) >= settings.smallest
        and choose(modules[name]) is not None
    }


def sensitivity_profile(
    model: nn.Module,
    settings: FactorSettings,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Tensor],
    known: Mapping[str, LayerCurvature] | None = None,
    shares: Iterable[float] = SHARES,
) -> dict[str, dict[float, float]]:
    """Measure what factorising one layer alone changes, at several shares of its parameters.

    Args:
        model: In evaluation mode; left as it is.
        settings: Of the factorisation.
        layers: Layers of the model by name; those of one weight are factorised together.
        batches: Batches of images, which can be read again.
        known: Curvature by name of the layer, where the settings need it.
        shares: Shares of the parameters.

    Returns:
        Mean KL(model ‖ factorised) of the class probabilities in nats, by the first name of each
        weight and share.
    """
    small = deepcopy(model)
    reference = _log_probabilities(small, batches)
    found: dict[str, dict[float, float]] = {}
    for name, layer in layers.items():
        if _first(layers, layer) != name:
            continue
        weight: Any = small.get_submodule(name).weight
        original = weight.detach().clone()
        found[name] = {}
        for share in shares:
            chosen = settings.choose(layer, share)
            if chosen is None:
                continue
            made: Any = settings.fit(layer, chosen, (known or {}).get(name))
            weight.data.copy_(made.dense().weight)
            other = _log_probabilities(small, batches)
            divergence = (reference.exp() * (reference - other)).sum(1).mean()
            found[name][share] = float(divergence.clamp(min=0))
        weight.data.copy_(original)
    return found


def allocate(
    settings: FactorSettings,
    layers: Mapping[str, nn.Module],
    profile: Mapping[str, Mapping[float, float]],
) -> dict[str, float]:
    """Choose a share for each layer, 1 to leave it dense, of least summed divergence.

    Args:
        settings: ``keep`` is the share of all layers together.
        layers: The layers of the profile by name.
        profile: Divergence by layer and share.

    Raises:
        UsageError: The smallest shares keep more than that.
    """
    options: dict[str, list[Option]] = {}
    tried = {name: [*each] for name, each in profile.items()}
    for name, each in profile.items():
        size = _size(layers[name])
        options[name] = [
            Option(number, _size_of(settings, layers[name], share), each[share])
            for number, share in enumerate(tried[name])
        ]
        options[name].append(Option(len(each), size, 0.0))
    budget = int(settings.keep * sum(map(_size, layers.values())))
    try:
        found = least_loss(options, budget)
    except UsageError as error:
        raise UsageError(f"{settings.name}.keep={settings.keep:g}: {error}") from None
    return {name: [*tried[name], 1.0][number] for name, number in found.choices.items()}


def _first(layers: Mapping[str, nn.Module], layer: nn.Module) -> str:
    """Return the first name of a layer's weight."""
    return next(name for name, other in layers.items() if other.weight is layer.weight)


def _size(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return int(weight.numel())


def _size_of(settings: FactorSettings, layer: nn.Module, share: float) -> int:
    """Count the parameters of a layer's factors at a share, without its bias."""
    return _parameters(settings.layer.like(layer, **settings.choose(layer, share) or {}))


def _parameters(made: nn.Module) -> int:
    return sum(p.numel() for n, p in made.named_parameters() if not n.endswith("bias"))


def _log_probabilities(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = [forward(model, batch)[0].flatten(1).double() for batch in batches]
    return torch.cat(outputs).log_softmax(1)


def _figures(layer: nn.Module, made: Any) -> dict[str, Any]:
    before: Any = layer.weight
    error = (made.dense().weight.double() - before.double()).norm() / before.double().norm()
    return {
        "parameters": {"before": before.numel(), "after": _parameters(made)},
        "weight_error": float(error.detach().nan_to_num(0.0)),
    }
