"""List models and their cost."""

import json
from dataclasses import dataclass
from fnmatch import filter as fnmatch_filter
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from rich.progress import track
from rich.table import Table

from smallfry.cli._fields import argument
from smallfry.cli._shared import AsJson
from smallfry.errors import UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smallfry.costing import Cost
    from smallfry.models.sources import Source


@dataclass(frozen=True, kw_only=True)
class Options(AsJson):
    """List models with their cost per image, and the paper and licence of the idea.

    TinyNet and FBNetV3 are timm's, the others smallfry's. The licence is that of the authors'
    published code; smallfry's own is Apache-2.0 throughout.

    Args:
        pattern: Name, part of names, or a pattern such as 'vitrm_*'.
        json: Print one JSON object per line.
    """

    pattern: str = argument("*")


FEW = (2, 3)  # recursion steps, of which the second costs as much as each after it


def run(options: Options) -> int:
    """Print the models that match the pattern."""
    import timm
    import torch

    from smallfry.models.sources import TIMM, Source, is_ours, source_of

    known = [
        name
        for name in timm.list_models()
        if is_ours(name) or any(fnmatch(name, pattern) for pattern in TIMM)
    ]
    pattern = options.pattern
    names = fnmatch_filter(known, pattern) or [name for name in known if pattern in name]
    if not names:
        raise UsageError(
            f"no model of smallfry matches '{options.pattern}'; smallfry models lists them all"
        )
    table = Table("model", "parameters", "MMAC", "activations", "input", box=None)
    table.columns[0].no_wrap = True
    origins: dict[Source, list[str]] = {}
    errors = CleanConsole(stderr=True)  # a terminal shows progress there, and a file nothing
    shown = track(
        names, "measuring", console=errors, transient=True, disable=not errors.is_terminal
    )
    for name in shown:
        shape = timm.get_pretrained_cfg(name).input_size
        source = source_of(name) or Source("")
        origins.setdefault(source, []).append(name)
        with torch.device("meta"):  # the largest have no need to be filled with numbers
            spent = measure(timm.create_model(name), torch.zeros(1, *shape))
        if options.json:
            facts = {"model": name, "input": list(shape), **spent._asdict(), **source._asdict()}
            say(json.dumps(facts))
        table.add_row(
            name,
            f"{spent.parameters:,}",
            f"{spent.macs / 1e6:,.0f}",
            f"{spent.activation_bytes / 2**20:,.1f} MiB",
            "×".join(map(str, shape)),
        )
    if not options.json:
        CleanConsole().print(table)
        for source, members in origins.items():
            if source.paper:
                say(_origin(source, members))
    return 0


def _origin(source: "Source", names: list[str]) -> str:
    """Describe the origin of models in a line."""
    code = f"; {source.code}, {source.licence}" if source.code else ""
    return f"{source.paper}{code}: {', '.join(names)}"


def measure(model: "nn.Module", input: "Tensor") -> "Cost":
    """Measure a model; one of many recursion steps on few, as each costs the same."""
    from smallfry import cost
    from smallfry.models import Recursive

    if not isinstance(model, Recursive) or model.recursion_steps <= FEW[1]:
        return cost(model, input)
    steps, costs = model.recursion_steps, []
    for model.recursion_steps in FEW:
        costs.append(cost(model, input))
    model.recursion_steps = steps
    few, more = costs
    rest = steps - FEW[1]
    return more._replace(
        macs=more.macs + rest * (more.macs - few.macs),
        activation_bytes=more.activation_bytes
        + rest * (more.activation_bytes - few.activation_bytes),
    )
