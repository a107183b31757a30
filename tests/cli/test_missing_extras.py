"""A missing package is reported in one line, with the command that installs it."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from smallfry.cli import _main, main
from smallfry.cli._extras import install_for

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCKED = """
import sys
from importlib import metadata

class Without:  # a finder of modules that refuses one
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without())
metadata.requires = lambda name: {requirements!r}
from smallfry.cli import main

sys.exit(main({arguments!r}))
"""


def requirements() -> list[str]:
    """As the metadata of the wheel has them, where an extra repeats those that it contains."""
    extras = PROJECT["optional-dependencies"]

    def packages(extra: str) -> list[str]:
        return [
            package
            for entry in extras[extra]
            for package in (
                [each for part in entry[9:-1].split(",") for each in packages(part)]
                if entry.startswith("smallfry[")
                else [entry]
            )
        ]

    marked = [f"{each}; extra == '{extra}'" for extra in extras for each in packages(extra)]
    return [*PROJECT["dependencies"], *marked]


def without(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    code = BLOCKED.format(module=module, requirements=requirements(), arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["jsonargparse", "rich", "yaml", "docstring_parser"])
def test_the_command_without_the_packages_that_it_is_made_with(module):
    done = without(module, "--help")
    expected = f"{module} is needed here and not installed: pip install 'smallfry[train]'"
    assert done.stderr == f"smallfry: {expected}\n"
    assert (done.returncode, done.stdout) == (1, "")


def test_debug_shows_where_a_package_is_missing():
    done = without("rich", "models", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "'smallfry[train]'" not in done.stderr


@pytest.mark.parametrize(
    ("module", "install"),
    [
        ("lightning", "'smallfry[train]'"),
        ("sklearn", "'smallfry[train]'"),
        ("onnxscript", "'smallfry[export]'"),
        ("onnx_ir", "'smallfry[export]'"),
        ("gradio", "'smallfry[demo]'"),
        ("uvicorn", "'smallfry[demo]'"),
        ("pytorch_optimizer", "'smallfry[peers]'"),
        ("safetensors", "safetensors"),
        ("wonderful", None),
    ],
)
def test_the_smallest_extra_with_a_package_is_named(module, install):
    assert install_for(module, requirements()) == install


def test_every_package_that_smallfry_imports_is_one_that_can_be_named():
    modules = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((node.module or "").partition(".")[0])
    foreign = modules - sys.stdlib_module_names - {"smallfry", "smallfry_runtime"}
    assert foreign > {"torch", "lightning", "onnx"}
    device = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())["project"]
    known = [*requirements(), *device["dependencies"]]
    assert [module for module in sorted(foreign) if install_for(module, known) is None] == []


def test_a_verb_without_its_extra_ends_in_one_line(monkeypatch, capsys):
    def fail(*_):
        raise ModuleNotFoundError("No module named 'onnxscript.ir'", name="onnxscript.ir")

    monkeypatch.setattr("smallfry.cli._extras.metadata.requires", lambda _: requirements())
    monkeypatch.setattr("smallfry.cli.models.run", fail)
    assert main(["models"]) == 1
    expected = "onnxscript is needed here and not installed: pip install 'smallfry[export]'"
    assert capsys.readouterr().err == f"smallfry: {expected}\n"


def test_a_package_that_smallfry_does_not_name_is_an_error_inside(monkeypatch, capsys):
    def fail(*_):
        raise ModuleNotFoundError("No module named 'wonderful'", name="wonderful")

    monkeypatch.setattr("smallfry.cli.models.run", fail)
    assert main(["models"]) == 1
    assert "an error inside smallfry, ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    heavy = "torch timm lightning torchvision datasets sklearn matplotlib onnxruntime gradio"
    code = (
        f"import sys, contextlib; from {_main.__name__} import run\n"
        "with contextlib.suppress(SystemExit): run(['--help'])\n"
        "with contextlib.suppress(SystemExit): run(['train', '--help'])\n"
        f"print('heavy:', *({{*{heavy.split()!r}}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("heavy:\n"), done.stderr
