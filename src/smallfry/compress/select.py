"""Selection of layers by shell patterns of their names."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from smallfry.errors import UsageError, nearest

DENSE = (nn.Linear, nn.Conv2d)


def dense_layers(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[str]:
    """List the linear layers and convolutions that patterns match, each layer once.

    Args:
        model: The model.
        include: Shell patterns of qualified names.
        exclude: Patterns of those left out.

    Raises:
        UsageError: No layer is chosen.
    """
    modules = dict(model.named_modules())
    names = [
        name
        for name, module in modules.items()
        if isinstance(module, DENSE)
        and not isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)
    ]
    return chosen(names, include, exclude, "linear layer or convolution")


def chosen(
    names: Collection[str], include: Sequence[str], exclude: Sequence[str], what: str
) -> list[str]:
    """Return the names that patterns match.

    Raises:
        UsageError: None is chosen.
    """
    found = [
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not names:
        raise UsageError(f"the model has no {what} left")
    if not found:
        hint = nearest(include[0], names) if include else ""
        raise UsageError(f"include {list(include)} without {list(exclude)} matches no {what}{hint}")
    return found
