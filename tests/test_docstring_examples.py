"""Examples in docstrings: they run, and print what they show."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "src", ROOT / "runtime/src"]
MODULES = [
    ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
    for source in SOURCES
    for file in sorted(source.rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_warnings: None
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0
