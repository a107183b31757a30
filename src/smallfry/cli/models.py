"""List models and their cost."""

import json
from dataclasses import dataclass

from rich.table import Table

from smallfry.cli._fields import argument
from smallfry.cli._shared import AsJson
from smallfry.errors import UsageError
from smallfry.io.console import CleanConsole
from smallfry.io.terminal import say


@dataclass(frozen=True, kw_only=True)
class Options(AsJson):
    """List smallfry's models with their cost per image.

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

    names = [
        name
        for name in timm.list_models(options.pattern)
        if timm.model_entrypoint(name).__module__.startswith("smallfry.")
    ]
    if not names:
        raise UsageError(f"no model of smallfry matches '{options.pattern}'")
    table = Table("model", "parameters", "MMAC", "activations", "input", box=None)
    for name in names:
        shape = timm.get_pretrained_cfg(name).input_size
        with torch.device("meta"):  # the largest have no need to be filled with numbers
            spent = cost(timm.create_model(name), torch.zeros(1, *shape))
        if options.json:
            say(json.dumps({"model": name, "input": list(shape), **spent._asdict()}))
        table.add_row(
            name,
            f"{spent.parameters:,}",
            f"{spent.macs / 1e6:,.0f}",
            f"{spent.activation_bytes / 2**20:,.1f} MiB",
            "×".join(map(str, shape)),
        )
    if not options.json:
        CleanConsole().print(table)
    return 0
