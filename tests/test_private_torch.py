"""Private names of PyTorch are used in one file, and are there."""

import ast
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from smallfry import _torch

ROOT = Path(__file__).parent.parent
FILE = Path(_torch.__file__)
ATTRIBUTES = {  # of PyTorch's objects, read without importing anything
    "_forward_hooks": nn.Module,
    "_forward_pre_hooks": nn.Module,
    "_flat_weights_names": nn.RNNBase,
    "_schema": torch._ops.OpOverload,
    "_cdata": torch.UntypedStorage,
    "_execution_engine": torch.autograd.Variable,
}


@lru_cache(maxsize=1)  # both of the following look at a file, one after the other
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


def private_imports(file: Path) -> list[tuple[str, str]]:
    """Modules and names that a file imports from PyTorch, where either is private."""
    found = []
    for node in nodes(file):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                parts = [*str(node.module).split("."), alias.name]
                if any(part.startswith("_") for part in parts):
                    found.append((str(node.module), alias.name))
    return found


def private_attributes(file: Path) -> set[str]:
    """Private attributes that a file reads of ``torch``, or any of those listed."""
    found = set()
    for node in nodes(file):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            of_torch = isinstance(base, ast.Name) and base.id == "torch"
            if node.attr in ATTRIBUTES or (of_torch and not node.attr.startswith("__")):
                found.add(node.attr)
    return found


def test_private_names_are_there() -> None:
    names = private_imports(FILE)
    assert len(names) >= 6
    gone = [f"{m}.{n}" for m, n in names if not hasattr(import_module(m), n)]
    assert gone == [], f"PyTorch {torch.__version__} has moved these: mend {FILE.name}"
    assert private_attributes(FILE) == ATTRIBUTES.keys()
    made = {nn.Module: nn.Linear(1, 1), nn.RNNBase: nn.LSTM(1, 1)}
    made |= {torch._ops.OpOverload: torch.ops.aten.add.Tensor}
    made |= {torch.autograd.Variable: torch.autograd.Variable}
    made |= {torch.UntypedStorage: torch.zeros(1).untyped_storage()}
    gone = [name for name, kind in ATTRIBUTES.items() if not hasattr(made[kind], name)]
    assert gone == [], f"PyTorch {torch.__version__} has moved these: mend {FILE.name}"


def test_they_are_used_nowhere_else() -> None:
    allowed = {"src/smallfry/curvature/taps.py": {"_unsafe_view"}}  # an operator, not a name
    found = {}
    for folder in ("src", "runtime/src"):
        for file in (ROOT / folder).rglob("*.py"):
            name = str(file.relative_to(ROOT))
            used = {n for _, n in private_imports(file)} | private_attributes(file)
            if file != FILE and used - allowed.get(name, set()):
                found[name] = used
    assert found == {}


def test_a_hook_is_seen() -> None:
    module = nn.Linear(1, 1)
    assert not _torch.has_forward_hooks(module)
    handle = module.register_forward_hook(lambda *_: None)
    assert _torch.has_forward_hooks(module)
    handle.remove()
    module.register_forward_pre_hook(lambda *_: None)
    assert _torch.has_forward_hooks(module)


def test_a_transform_is_seen() -> None:
    seen = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.is_transformed())
        return x

    torch.vmap(inside)(torch.ones(2))
    assert seen == [True]
    assert not _torch.is_transformed()


def test_names_of_weights_are_in_the_order_of_the_module() -> None:
    names = _torch.flat_weight_names(nn.LSTM(2, 3, bidirectional=True))
    assert names == [name for name, _ in nn.LSTM(2, 3, bidirectional=True).named_parameters()]
