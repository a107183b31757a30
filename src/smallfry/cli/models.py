"""List models and their cost."""

import json
from dataclasses import dataclass
from fnmatch import fnmatch

from rich.table import Table

from smallfry.cli._fields import argument
from smallfry.cli._shared import AsJson
from smallfry.errors import UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import say


@dataclass(frozen=True, kw_only=True)
class Options(AsJson):
    """List models with their cost per image, and the paper and licence of the idea.

    TinyNet and FBNetV3 are timm's, the others smallfry's. The licence is that of the authors'
    published code; smallfry's own is Apache-2.0 throughout.

    Args:
        pattern: Pattern of names, such as 'vitrm_*'.
        json: Print one JSON object per line.
    """

    pattern: str = argument("*")


def run(options: Options) -> int:
    """Print the models that match the pattern."""
    import timm
    import torch

    from smallfry import cost
    from smallfry.models.sources import TIMM, Source, source_of

    names = [
        name
        for name in timm.list_models(options.pattern)
        if timm.model_entrypoint(name).__module__.startswith("smallfry.")
        or any(fnmatch(name, pattern) for pattern in TIMM)
    ]
    if not names:
        raise UsageError(f"no model of smallfry matches '{options.pattern}'")
    columns = ("model", "parameters", "MMAC", "activations", "input", "paper", "code", "licence")
    table = Table(*columns, box=None)
    for name in names:
        shape = timm.get_pretrained_cfg(name).input_size
        source = source_of(name) or Source("–")
        with torch.device("meta"):  # the largest have no need to be filled with numbers
            spent = cost(timm.create_model(name), torch.zeros(1, *shape))
        if options.json:
            facts = {"model": name, "input": list(shape), **spent._asdict(), **source._asdict()}
            say(json.dumps(facts))
        table.add_row(
            name,
            f"{spent.parameters:,}",
            f"{spent.macs / 1e6:,.0f}",
            f"{spent.activation_bytes / 2**20:,.1f} MiB",
            "×".join(map(str, shape)),
            source.paper,
            source.code or "–",
            source.licence or "–",
        )
    if not options.json:
        CleanConsole().print(table)
    return 0
