"""Selection of layers by shell patterns of their names."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from smallfry.curvature.products import computes
from smallfry.errors import UsageError, nearest
from smallfry.transforms.replace import tied_layers

DENSE = (nn.Linear, nn.Conv2d)


def is_dense(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or convolution, and nothing but that.

    Subclasses with another forward are not, as of a standardised weight or with an adapter in them,
    nor are layers whose weight is computed from other parameters.
    """
    kind = next((kind for kind in DENSE if isinstance(module, kind)), None)
    return kind is not None and "weight" in module._parameters and computes(module, kind)


def read_by_others(model: nn.Module) -> set[str]:
    """Find the dense layers whose weight is an embedding's, or another module's, as well.

    They can be replaced together only, and what stands for a dense layer is no embedding.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        name
        for name, names in tied_layers(model).items()
        if not all(is_dense(modules[each]) for each in names)
    }


def dense_layers(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[str]:
    """List the linear layers and convolutions that patterns match, each layer once.

    Those of ``is_dense`` outside PyTorch's own attention.

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
    dense = [name for name in names if is_dense(modules[name])]
    try:
        return chosen(dense, include, exclude, "linear layer or convolution")
    except UsageError as error:
        if not names:
            raise UsageError(
                f"{error}; if an earlier method has replaced them, as quantize does, put this one "
                "before it"
            ) from None
        other = next((name for name in names if name not in dense), None)
        if other is None:
            raise
        raise UsageError(
            f"{error}; '{other}' ({type(modules[other]).__name__}) has a forward of its own, or a "
            "weight computed from others: nn.utils.parametrize.remove_parametrizations or "
            "nn.utils.prune.remove makes the latter ordinary"
        ) from None


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
