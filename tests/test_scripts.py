"""Scripts beside the package import what is there."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    file
    for folder in ("benchmarks", "campaign", "docs", "examples", "notebooks")
    for file in sorted((ROOT / folder).rglob("*.py"))
]


def imported(file):
    """Modules and names that a script imports from smallfry and its runtime."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_of_a_script_are_there(file):
    for name, attribute in imported(file):
        if name.split(".")[0] in ("smallfry", "smallfry_runtime"):
            module = import_module(name)
            if attribute is not None and not hasattr(module, attribute):
                import_module(f"{name}.{attribute}")
