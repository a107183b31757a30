"""Registration of classes by a name that is their own."""

from collections.abc import MutableMapping
from dataclasses import is_dataclass
from typing import Any

from smallfry.errors import UsageError

__all__ = ["add", "require_frozen"]


def add(registry: MutableMapping[str, Any], name: str, kind: Any, plural: str) -> None:
    """Add a class to a registry; one that is defined again replaces the former.

    Args:
        registry: Classes by name.
        name: Of the class.
        kind: The class.
        plural: What the registry holds, for the message.

    Raises:
        UsageError: Another class has the name.
    """
    other = registry.setdefault(name, kind)
    if other is not kind and other.__qualname__ != kind.__qualname__:
        raise UsageError(f"two {plural} are named '{name}': {other!r} and {kind!r}")
    registry[name] = kind


def require_frozen(kind: Any) -> None:
    """Require a frozen dataclass, whose instances are settings.

    Raises:
        UsageError: It is another class.
    """
    parameters = getattr(kind, "__dataclass_params__", None)
    if not is_dataclass(kind) or parameters is None or not parameters.frozen:
        raise UsageError(f"{kind.__name__} must be a frozen dataclass")
