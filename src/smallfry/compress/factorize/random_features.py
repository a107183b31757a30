"""SNNK: random features in place of a head, or of an MLP, fitted in closed form.

A pair of linear layers around an activation, W₂ f(W₁ x + b₁) + b₂, becomes Ψ Φ(x) + c with fixed
random ReLU features Φ: both layers and the activation are bundled into one matrix Ψ. On calibration
images Ψ and c are the ridge regression of the pair's outputs on Φ; without images they follow from
the weights, which is a start for training (``smallfry.layers.random_features``).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from smallfry.compress.quantize.calls import visit
from smallfry.compress.select import chosen
from smallfry.errors import UsageError
from smallfry.layers.random_features import SNNKLinear, bundle, ridge_solution
from smallfry.training.method import Method, Setting, register_method
from smallfry.transforms.declared import ZERO_AT_ZERO
from smallfry.transforms.find import TOLERANCE, distance_of
from smallfry.transforms.modes import evaluating
from smallfry.transforms.random_features import RandomFeatures
from smallfry.transforms.replace import tied_layers
from smallfry.transforms.spec import Transform

ACTIVATIONS = tuple(kind for kind in ZERO_AT_ZERO if kind is not nn.Identity)
PARTS = (nn.Linear, nn.Sigmoid, nn.Softplus, *ACTIVATIONS)


@register_method
@dataclass(frozen=True)
class SNNK:
    """Replacement of pairs of linear layers by random features.

    Args:
        features: Number of random features, m; a pair is then left with m + 1 parameters an output.
        ridge: Penalty of the regression, relative to the mean square of a feature.
        include: Shell patterns of the names of second layers of pairs.
        exclude: Patterns of pairs to keep.

    Example:
        >>> import torch
        >>> from smallfry import compress
        >>> layers = [torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)]
        >>> images = torch.rand(50, 16)
        >>> small, _ = compress.apply_to_model(
        ...     torch.nn.Sequential(*layers), [compress.SNNK(32)], example=images, batches=[images]
        ... )
        >>> sum(p.numel() for p in small.parameters())
        132
    """

    name: ClassVar[str] = "snnk"
    trains: ClassVar[bool] = False
    tunable: ClassVar[bool] = True

    features: int = 64
    ridge: float = 1e-6
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if type(self.features) is not int or self.features < 1:
            raise UsageError(f"snnk.features must be 1 or more, not {self.features!r}")
        if not 0 < self.ridge <= 1:
            raise UsageError(f"snnk.ridge must be above 0 and at most 1, not {self.ridge!r}")

    def start(self) -> Method:
        """Create the method with these settings."""
        return _Bundle(self)


class _Pair(NamedTuple):
    """Names of two linear layers and of the activation between them."""

    first: str
    activation: str
    second: str


class _Bundle(Method):
    def __init__(self, settings: SNNK) -> None:
        self._settings = settings
        self._setting: Setting | None = None

    def begin(self, model: nn.Module, setting: Setting) -> None:
        if not setting.example.numel():
            raise UsageError("snnk needs example inputs to find pairs of layers: pass example=")
        self._setting = setting

    @torch.no_grad()
    def finish(self, model: nn.Module) -> Transform | None:
        settings, setting = self._settings, cast(Setting, self._setting)
        found = {pair.second: pair for pair in _find_pairs(model, setting.example)}
        names = chosen(list(found), settings.include, settings.exclude, "pair of linear layers")
        made = {}
        for number, name in enumerate(names):
            pair, seed = found[name], setting.seed + number
            first, second = (cast(nn.Linear, model.get_submodule(n)) for n in (pair.first, name))
            layer = SNNKLinear.from_dense(first, features=settings.features, seed=seed)
            made[name] = bundle(layer, second)
        batches = [] if setting.rehearsal else setting.batches
        _fit(model, [found[name] for name in names], made, batches, settings.ridge)
        transform = RandomFeatures({
            name: {
                "first": found[name].first,
                "activation": found[name].activation,
                "features": settings.features,
                "seed": setting.seed + number,
            }
            for number, name in enumerate(names)
        })  # fmt: skip
        transform.apply(model)
        for name, layer in made.items():
            model.get_submodule(name).load_state_dict(layer.state_dict())
        return transform


def _fit(
    model: nn.Module,
    pairs: Sequence[_Pair],
    made: dict[str, SNNKLinear],
    batches: Any,
    ridge: float,
) -> None:
    """Set Ψ to the regression of each pair's outputs on features of its inputs, over all calls."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}
    of_first = {pair.first: pair.second for pair in pairs}

    def see(name: str, call: int, given: Tensor, output: Tensor) -> None:
        if name in of_first:
            inputs.setdefault(of_first[name], []).append(given)
            return
        rows = inputs[name].pop().flatten(0, -2).double()
        features = made[name].features(rows.to(given)).double()
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        fresh = features.T @ features, features.T @ output.flatten(0, -2).double()
        before = sums.get(name)
        sums[name] = fresh if before is None else (before[0] + fresh[0], before[1] + fresh[1])

    with evaluating(model):
        visit(model, [*of_first, *of_first.values()], batches, see)
    for name, (gram, products) in sums.items():
        solution = ridge_solution(gram, products, ridge).T
        made[name].psi.weight.copy_(solution[:, :-1])
        made[name].psi.bias.copy_(solution[:, -1])


def _find_pairs(model: nn.Module, example: Tensor) -> list[_Pair]:
    """Find linear layers that take the output of an activation of another one's output, alone.

    Dropout and identities in between don't count. A layer that shares its weight is in no pair, and
    neither is one whose pair can't be one module in its place, such as where something that is no
    module takes the activation's output, too.
    """
    ties, modules = tied_layers(model), dict(model.named_modules())
    parts = [name for name, module in modules.items() if isinstance(module, PARTS)]
    made_by: dict[tuple[int, int], str] = {}  # the module that has made each tensor
    sources: dict[str, set[str | None]] = {}  # the modules whose outputs each module takes
    held: list[Tensor] = []  # so that no memory is used twice

    def see(name: str, call: int, given: Tensor, output: Tensor) -> None:
        sources.setdefault(name, set()).add(made_by.get(_place(given)))
        made_by[_place(output)] = name
        held.append(output)

    with evaluating(model):
        visit(model, parts, [example], see)
    found = []
    for name, own in sources.items():
        activation = _only(own)
        first = _only(sources.get(activation or "", set()))
        if first is None or activation is None or isinstance(modules[activation], nn.Linear):
            continue
        ends = [each for each in (first, name) if isinstance(modules[each], nn.Linear)]
        takers = [sum(each in s for s in sources.values()) for each in (first, activation)]
        if takers == [1, 1] and [len(ties[each]) for each in ends] == [1, 1]:
            found.append(_Pair(first, activation, name))
    return [pair for pair in found if _is_one(model, pair, example)]


def _is_one(model: nn.Module, pair: _Pair, example: Tensor) -> bool:
    """Return whether the outputs stay if the second layer's place has the pair in a row."""
    moved = copy.deepcopy(model)
    parts = [moved.get_submodule(name) for name in pair]
    for name in pair[:2]:
        moved.set_submodule(name, nn.Identity())
    moved.set_submodule(pair.second, nn.Sequential(*parts))
    with evaluating(model), evaluating(moved):
        try:
            distance = distance_of(model(example), moved(example))
        except Exception:  # of shapes that don't fit
            return False
    return distance is not None and distance <= TOLERANCE


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _only(names: set[str | None]) -> str | None:
    """Return the only name; None if there are others, or a source that is not known."""
    return next(iter(names)) if len(names) == 1 else None
