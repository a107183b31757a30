"""Compacter: fine-tuning of adapters with shared hypercomplex rules, of norms and the classifier.

All other weights are frozen. Adapters follow the last layers of attention and MLPs
(``smallfry.layers.phm``), or the convolutions of a network without any. In a recursive block they
are shared by all calls, or there is one for each call within a recursion step (an idea of this
project). Karimi Mahabadi, Henderson, Ruder, *Compacter: Efficient Low-Rank Hypercomplex Adapter
Layers*, NeurIPS 2021.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, ClassVar, get_args

from torch import nn

from smallfry.compress.adapt.files import FILE, pack_adapters, trained_names
from smallfry.compress.quantize.calls import count_calls
from smallfry.compress.select import dense_layers
from smallfry.errors import UsageError
from smallfry.layers.phm import Activation
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.adapters import CHILD, Adapters
from smallfry.transforms.classifier import classifier_names
from smallfry.transforms.modes import evaluating
from smallfry.transforms.spec import ModelSpec, Transform

SUBLAYERS = ("*attn*.proj", "*mlp*.fc2", "blocks.*.fc2")  # last layers of both kinds


@register_method
@dataclass(frozen=True)
class Compacter:
    """Training of adapters in a frozen model.

    Args:
        n: Number of the shared rules; widths of adapted layers are multiples of it.
        reduction: Outputs of a layer for each unit inside its adapter.
        per_call: Train an adapter for each call of a layer in a recursion step.
        activation: Inside adapters; ``none`` makes them linear, so that exports merge them into the
            layers before them.
        include: Shell patterns of layer names; default the last layers of attention and MLPs, or
            all convolutions but the first where there are none.
        exclude: Patterns of layers without an adapter.

    Example:
        >>> import timm, torch, smallfry
        >>> from smallfry import compress
        >>> model, images = timm.create_model("vitrm_micro_patch4_8"), torch.rand(8, 1, 8, 8)
        >>> session = compress.Session(model, [compress.Compacter()], images, steps=1)
        >>> trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        >>> trained / sum(p.numel() for p in model.parameters()) < 0.03
        True
        >>> [each.kind for each in session.finish().transforms]
        ['adapters']
    """

    name: ClassVar[str] = "compacter"
    trains: ClassVar[bool] = True

    n: int = 4
    reduction: int = 16
    per_call: bool = False
    activation: Activation = "gelu"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("n", "reduction"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 64:
                raise UsageError(f"compacter.{name} must be 1 to 64, not {value!r}")
        if self.activation not in get_args(Activation):
            raise UsageError(f"compacter.activation is gelu or none, not {self.activation!r}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Adapt(self)

    def files(self, model: nn.Module, manifest: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the file of a finished model's adapters, by its name.

        There is none if a later method has changed the frozen weights.
        """
        transforms = ModelSpec.from_dict(manifest["model"]).transforms
        is_last = bool(transforms) and isinstance(transforms[-1], Adapters)
        return {FILE: pack_adapters(model, manifest)} if is_last else {}


class _Adapt(Method):
    def __init__(self, settings: Compacter) -> None:
        self._settings = settings
        self._transform: Adapters | None = None

    def begin(self, model: nn.Module, setting: Setting) -> None:
        if _is_of_transformers(model):
            _delegate(model, self._settings)
            return
        if hasattr(model, CHILD):
            raise UsageError(
                "compacter: the model has adapters already: train these further (smallfry train "
                "--resume RUN --epochs N), or start from their base"
            )
        names = _places(model, self._settings)
        calls, first = dict.fromkeys(names, 1), None
        if self._settings.per_call:
            calls, first = _calls_of_a_step(model, names, setting)
        modules = dict(model.named_modules())
        layers = {
            name: {"inner": self._inner(name, modules[name]), "calls": calls[name]}
            for name in names
        }
        self._transform = Adapters(layers, self._settings.n, self._settings.activation, first)
        try:
            self._transform.apply(model)
        except ValueError as error:
            raise UsageError(f"compacter: {error}") from error
        trained = trained_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained and parameter.requires_grad)

    def finish(self, model: nn.Module) -> Transform | None:
        return self._transform

    def _inner(self, name: str, layer: nn.Module) -> int:
        """Return the width inside a layer's adapter, a multiple of n."""
        n, weight = self._settings.n, layer.weight
        width = len(weight)  # type: ignore[arg-type]
        if width % n:
            raise UsageError(
                f"compacter: '{name}' has {width} outputs, no multiple of n = {n}: choose another "
                "n, or exclude the layer"
            )
        return n * max(1, round(width / self._settings.reduction / n))


def _places(model: nn.Module, settings: Compacter) -> list[str]:
    """List the layers to adapt.

    Raises:
        UsageError: There are none.
    """
    if settings.include:
        return dense_layers(model, settings.include, settings.exclude)
    heads = (*classifier_names(model), "")
    dense = [name for name in dense_layers(model) if name not in heads]
    found = [name for name in dense if any(fnmatchcase(name, each) for each in SUBLAYERS)]
    if not found:
        modules = dict(model.named_modules())
        found = [name for name in dense if isinstance(modules[name], nn.Conv2d)][1:]
    left = [name for name in found if not any(fnmatchcase(name, each) for each in settings.exclude)]
    if not left:
        raise UsageError(
            "compacter: no attention, MLP or second convolution is left to adapt: name layers with "
            "include"
        )
    return left


def _calls_of_a_step(
    model: nn.Module, names: list[str], setting: Setting
) -> tuple[dict[str, int], str | None]:
    """Count the calls of layers in one recursion step, and find the layer that begins a pass.

    Raises:
        UsageError: Recursion steps with different calls, or no example.
    """
    if not setting.example.numel():
        raise UsageError("compacter.per_call needs example inputs: pass example=")
    with evaluating(model):
        passes = count_calls(model, names, setting.example)
    steps = getattr(model, "recursion_steps", 1)
    for name in names:
        if passes.calls.get(name, 0) % steps or name not in passes.calls:
            raise UsageError(
                f"compacter.per_call: '{name}' has {passes.calls.get(name, 0)} calls in {steps} "
                "recursion steps, not equally many in each: exclude it, or take per_call: false"
            )
    return {name: passes.calls[name] // steps for name in names}, passes.first


def _is_of_transformers(model: nn.Module) -> bool:
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )


def _delegate(model: nn.Module, settings: Compacter) -> None:
    """Add Compacter to a model of Hugging Face, by the library ``adapters``.

    Raises:
        UsageError: It can't be imported, or a setting that it does not have.
    """
    if settings.per_call or settings.include or settings.exclude or settings.activation != "gelu":
        raise UsageError(
            "compacter: models of Hugging Face take n and reduction alone; leave out the others"
        )
    try:
        library: Any = import_module("adapters")
    except ImportError as error:
        raise UsageError(
            f"compacter: models of Hugging Face need the library adapters, which can't be imported "
            f"({error}): pip install adapters, with the version of transformers that it requires"
        ) from error
    config = library.CompacterConfig(phm_dim=settings.n, reduction_factor=settings.reduction)
    library.init(model)
    adapted: Any = model
    adapted.add_adapter(Compacter.name, config=config)
    adapted.train_adapter(Compacter.name)
