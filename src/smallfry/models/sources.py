"""Sources of architectures: paper, authors' code and the licence of that code.

A module of an architecture has its ``SOURCE``. The licence is that of the authors' published code,
which was not used: the networks here are written from their descriptions. Weights have licences of
their own.
"""

import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from types import ModuleType
from typing import Any, NamedTuple, cast

from timm.models import is_model, model_entrypoint, register_model
from torch import nn

from smallfry.errors import UsageError

__all__ = ["TIMM", "Source", "is_ours", "register_sizes", "source_of"]


class Source(NamedTuple):
    """Origin of an architecture."""

    paper: str  # with its number, such as "Hassani et al. 2021, arXiv 2104.05704"
    code: str = ""  # the authors' repository; "" if there is none, or it was not consulted
    licence: str = ""  # of that repository, by its SPDX identifier


TIMM = {  # networks of timm that have recipes here
    "tinynet_*": Source(
        "Han et al. 2020, arXiv 2010.14819", "huawei-noah/Efficient-AI-Backbones", "Apache-2.0"
    ),
    "fbnetv3_*": Source("Dai et al. 2021, arXiv 2006.02049", "timm's own", "Apache-2.0"),
}


def is_ours(name: str) -> bool:
    """Return whether a registered architecture is smallfry's own, not timm's."""
    return str(model_entrypoint(name).__module__).startswith("smallfry.")


def source_of(name: str) -> Source | None:
    """Return the source of a registered model; None if it is not known."""
    for pattern, source in TIMM.items():
        if fnmatch(name, pattern):
            return source
    module: ModuleType = sys.modules[model_entrypoint(name).__module__]
    known = getattr(module, "SOURCE", None)
    if isinstance(known, dict):
        return next((s for pattern, s in known.items() if fnmatch(name, pattern)), None)
    return cast(Source | None, known)


def register_sizes(
    module: str, sizes: Iterable[str], create: Callable[[str, bool, dict[str, Any]], nn.Module]
) -> None:
    """Register an architecture's sizes with timm, each as a function of its module.

    Args:
        module: ``__name__`` of the architecture's module, which has ``default_cfgs``.
        sizes: Names of models.
        create: Builds one from its name, timm's ``pretrained`` and its arguments.

    Raises:
        UsageError: Another module has registered a model of one of the names; as a model is built,
            ``features_only`` of one without such.
    """
    for name in sizes:
        if is_model(name) and (other := model_entrypoint(name).__module__) != module:
            raise UsageError(f"two models are named '{name}': of {other} and {module}; rename one")
        setattr(sys.modules[module], name, register_model(_entry(module, name, create)))


def _entry(
    module: str, name: str, create: Callable[[str, bool, dict[str, Any]], nn.Module]
) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        try:
            return create(name, pretrained, kwargs)
        except AttributeError as error:
            if kwargs.get("features_only") and "feature_info" in str(error):
                raise UsageError(
                    f"{name} has no maps of features that timm could take: leave out "
                    "features_only; forward_features has its last ones"
                ) from None
            raise

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = f"Build ``{name}``."
    return build
