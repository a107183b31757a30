"""Mixed precision: bits for each layer by the curvature of the loss, under a budget."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from smallfry.compress.quantize.calls import visit
from smallfry.compress.quantize.knapsack import Option, least_loss, trade_off
from smallfry.compress.quantize.sensitivity import Measure, sensitivities
from smallfry.errors import UsageError
from smallfry.transforms.replace import tied_layers

Budget = Literal["weights", "macs", "bytes"]
BUDGETS: tuple[Budget, ...] = ("weights", "macs", "bytes")
_UNITS = {
    "weights": "bits per weight",
    "macs": "bits per multiply-accumulate",
    "bytes": "bytes of codes",
}
MOST_SHOWN = 200  # points of a reported front


class MixedBits(NamedTuple):
    """Bits of each layer, with the trade-off of the choice and the sensitivities."""

    bits: dict[str, int]
    report: dict[str, Any]
    profile: dict[str, Any]


def choose_bits(
    model: nn.Module,
    errors: Mapping[str, Mapping[int, Tensor]],
    budget: float,
    kind: Budget = "weights",
    measure: Measure = "kronecker",
    batches: Iterable[Tensor] = (),
    seed: int = 0,
    measured: Mapping[str, Mapping[int, float]] | None = None,
) -> MixedBits:
    """Choose the bits of least summed sensitivity under a budget.

    Args:
        model: In floating point, in evaluation mode.
        errors: Ŵ − W of each layer, in the weight's shape, by bits.
        budget: Average bits per weight, average bits per multiply-accumulate of all calls, or
            bytes of all codes together.
        kind: ``weights``, ``macs`` or ``bytes``.
        measure: Sensitivity: ``kronecker``, ``fisher`` or ``hessian``.
        batches: Batches of images.
        seed: Random seed.
        measured: Sensitivities that are known already.

    Raises:
        UsageError: A budget that the fewest bits don't meet, or no images.
    """
    found = measured or sensitivities(model, errors, measure, batches, seed=seed)
    sizes = {name: next(iter(by_bits.values())).numel() for name, by_bits in errors.items()}
    if kind == "macs":
        ties, modules = tied_layers(model), dict(model.named_modules())
        uses = {name: [each for each in ties[name] if each in modules] for name in errors}
        units = macs(model, [each for names in uses.values() for each in names], batches)
        sizes = {name: sum(units.get(each, 0) for each in uses[name]) for name in errors}
    total = sum(sizes.values())
    most = int(8 * budget) if kind == "bytes" else int(budget * total)
    options = {
        name: [Option(bits, sizes[name] * bits, loss) for bits, loss in sorted(by_bits.items())]
        for name, by_bits in found.items()
    }
    try:
        chosen = least_loss(options, most)
    except UsageError as error:
        raise UsageError(f"{budget:g} {_UNITS[kind]}: {error}") from None
    uniform = {
        str(bits): {
            "cost": sum(sizes.values()) * bits,
            "loss": sum(by_bits[bits] for by_bits in found.values()),
        }
        for bits in sorted(set.intersection(*(set(each) for each in found.values())))
    }
    front = trade_off(options)
    step = -(-len(front) // MOST_SHOWN)
    shown = [*front[:-1:step], front[-1]]
    return MixedBits(
        chosen.choices,
        {
            "measure": measure,
            "budget": {"value": budget, "of": kind},
            "unit": "MAC·bits" if kind == "macs" else "bits",
            "cost": chosen.cost,
            "loss": chosen.loss,
            "average_bits": chosen.cost / total if total else 0.0,
            "front": [list(point) for point in shown],
            "uniform": uniform,
        },
        {
            "choices": "bits per weight",
            "costs": f"sensitivity ({measure})",
            "layers": {n: {str(b): v for b, v in each.items()} for n, each in found.items()},
            "chosen": {name: str(bits) for name, bits in chosen.choices.items()},
        },
    )


def macs(model: nn.Module, layers: Collection[str], batches: Iterable[Tensor]) -> dict[str, int]:
    """Count the multiply-accumulates of layers for one image, over all calls.

    Args:
        model: In evaluation mode.
        layers: Names of linear layers and convolutions.
        batches: Batches of images, of which the first is read.
    """
    counts: dict[str, int] = {}
    modules = dict(model.named_modules(remove_duplicate=False))

    def add(name: str, call: int, inputs: Tensor, output: Tensor) -> None:
        weight: Any = modules[name].weight
        counts[name] = counts.get(name, 0) + output.numel() * weight[0].numel()

    first = next(iter(batches), None)
    if first is None:
        raise UsageError("no images to count multiply-accumulates on: give data, or batches=")
    visit(model, layers, [first], add)
    return {name: count // len(first) for name, count in counts.items()}
