"""Install hints for missing packages, from the extras of the installed smallfry."""

import re
from collections import defaultdict
from collections.abc import Iterable
from importlib import metadata

# modules whose package has another name, or that another package brings
DISTRIBUTIONS = {
    **{"sklearn": "scikit-learn", "yaml": "PyYAML", "PIL": "pillow"},
    "onnx_ir": "onnxscript",
    **dict.fromkeys(("anyio", "fastapi", "starlette", "uvicorn"), "gradio"),
}


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """Return the install command for a missing package; None if smallfry does not name it."""
    module = (error.name or "").partition(".")[0]
    try:
        requirements = metadata.requires("smallfry") or ()
    except metadata.PackageNotFoundError:  # run from its sources
        requirements = ()
    wanted = install_for(module, requirements)
    return wanted and f"{module} is needed here and not installed: pip install {wanted}"


def install_for(module: str, requirements: Iterable[str]) -> str | None:
    """Return the smallest extra that contains a module's package, such as ``'smallfry[train]'``.

    Args:
        module: A top-level module.
        requirements: Those of smallfry, as its metadata has them.
    """
    package = _normal(DISTRIBUTIONS.get(module, module))
    packages: dict[str, set[str]] = defaultdict(set)  # by extra; the empty one is always installed
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name is not None:
            packages[extra[1] if extra else ""].add(_normal(name[0]))
    having = [extra for extra, names in packages.items() if package in names]
    if not having:
        return None
    smallest = min(having, key=lambda each: (each != "", len(packages[each]), each == "all"))
    return f"'smallfry[{smallest}]'" if smallest else DISTRIBUTIONS.get(module, module)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
