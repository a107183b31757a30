"""User's own losses, metrics and callbacks, by import path.

A configuration only names them, as ``my_code:focal``. Modules are imported for a command that
names their files (``--code my_code.py``) and never because a configuration does: a configuration
may come from someone else.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from smallfry.errors import UsageError, nearest

EXAMPLE = "my_code:focal"


@dataclass(frozen=True)
class OwnCode:
    """User code of a run.

    Args:
        modules: Imported modules, by name; what they define can be found.
        objects: Objects of a Python program, by import path.
    """

    modules: Mapping[str, ModuleType] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)

    def find(self, path: str, setting: str) -> Any:
        """Return what an import path names.

        Args:
            path: MODULE:NAME.
            setting: Setting with the path, for errors.

        Raises:
            UsageError: It is not of this code.
        """
        if path in self.objects:
            return self.objects[path]
        module, _, name = path.partition(":")
        if module not in self.modules:
            raise UsageError(
                f"{setting} names {path}, which is not imported because a configuration names it: "
                f"add --code {module.rpartition('.')[2]}.py if you trust that file, or leave "
                f"{setting} out"
            )
        defined = vars(self.modules[module])
        found = defined.get(name)
        if found is None or not _is_of(found, module):
            own = [key for key, value in defined.items() if _is_of(value, module)]
            raise UsageError(f"{setting}: {module} defines no '{name}'{nearest(name, own)}")
        return found


def load_code(places: Sequence[str | Path]) -> OwnCode:
    """Import the user's own modules.

    Args:
        places: Python files, or names of modules on Python's path.

    Raises:
        UsageError: One can't be imported.
    """
    modules = [_load_module(str(place)) for place in places]
    return OwnCode({module.__name__: module for module in modules})


def require_path(path: Any, setting: str) -> None:
    """Require the form MODULE:NAME.

    Raises:
        UsageError: It is of another form.
    """
    parts = path.split(":") if isinstance(path, str) else []
    if len(parts) != 2 or not all(parts):
        raise UsageError(f"{setting}: expected MODULE:NAME, such as {EXAMPLE}, not {path!r}")


def take_objects(settings: Mapping[str, Any], code: Any = None) -> tuple[dict[str, Any], OwnCode]:
    """Replace functions and objects in the keywords of ``smallfry.train`` by their import paths.

    Args:
        settings: Keywords.
        code: Files or modules as ``load_code`` takes them, one or several; or an ``OwnCode``.

    Returns:
        Settings of ``TrainConfig``, and the code that they name.
    """
    left, objects = dict(settings), dict[str, Any]()
    if not isinstance(code, OwnCode):
        code = load_code([code] if isinstance(code, str | Path) else list(code or ()))

    def path_of(value: Any) -> Any:
        if isinstance(value, str):
            return value
        kind = value if hasattr(value, "__qualname__") else type(value)
        path = wanted = f"{kind.__module__}:{kind.__qualname__}"
        number = 1
        while objects.get(path, value) is not value:  # another object of the class
            number += 1
            path = f"{wanted}-{number}"
        objects[path] = value
        return path

    for name in ("callbacks", "metrics"):
        if isinstance(left.get(name), list | tuple):
            left[name] = [path_of(value) for value in left[name]]
    objective = left.get("objective")
    if isinstance(objective, Mapping) and objective.get("loss") is not None:
        left["objective"] = {**objective, "loss": path_of(objective["loss"])}
    return left, OwnCode(code.modules, {**code.objects, **objects})


def _load_module(place: str) -> ModuleType:
    """Import a file, or a module by its name."""
    file = Path(place).expanduser()
    try:
        if file.suffix != ".py":
            return importlib.import_module(place)
        if not file.is_file():
            raise UsageError(f"{place}: there is no such file")
        if file.stem in sys.modules:
            known = getattr(sys.modules[file.stem], "__file__", None)
            if known is None or Path(known).resolve() != file.resolve():
                raise UsageError(f"{place}: another module has the name {file.stem}; rename it")
            return sys.modules[file.stem]
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None  # as it ends in .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # which dataclasses look up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[file.stem]
            raise
        return module
    except UsageError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"code {place} can't be imported ({reason}); --debug shows where") from (
            error
        )


def _is_of(value: Any, module: str) -> bool:
    """Return whether a module, or one below it, defines a value or its class."""
    if isinstance(value, ModuleType):
        return False
    kind = value if hasattr(value, "__qualname__") else type(value)
    home = str(getattr(kind, "__module__", ""))
    return home == module or home.startswith(f"{module}.")
