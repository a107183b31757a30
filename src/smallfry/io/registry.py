"""Registration by unique names."""

from collections.abc import MutableMapping
from dataclasses import is_dataclass
from typing import Any

from smallfry.errors import UsageError

__all__ = ["add", "path_of", "require_frozen"]


def add(registry: MutableMapping[Any, Any], name: Any, found: Any, plural: str) -> None:
    """Add a class or function to a registry; one that is defined again replaces the former.

    It is the same one if its module and its name in there are, as after running a notebook's cell
    or loading a module once more.

    Args:
        registry: Classes or functions by name.
        name: In the registry.
        found: The class or function.
        plural: What the registry holds, for the message.

    Raises:
        UsageError: Another one has the name.
    """
    other = registry.setdefault(name, found)
    if other is not found and path_of(other) != path_of(found):
        raise UsageError(
            f"two {plural} are named '{name}': {path_of(other)} and {path_of(found)}; rename one"
        )
    registry[name] = found


def path_of(found: Any) -> str:
    """Return the module of a class or function, and its name in there."""
    return f"{found.__module__}.{found.__qualname__}"


def require_frozen(kind: Any) -> None:
    """Require a frozen dataclass, whose instances are settings.

    Raises:
        UsageError: It is another class.
    """
    parameters = getattr(kind, "__dataclass_params__", None)
    if not is_dataclass(kind) or parameters is None or not parameters.frozen:
        raise UsageError(f"{kind.__name__} must be a frozen dataclass")
