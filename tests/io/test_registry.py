"""Registries by name: a name is taken once, and what is defined again replaces the former."""

import re
from dataclasses import dataclass

import pytest
from timm.layers import Mlp
from timm.models import model_entrypoint

from smallfry.analysis.question import find_questions, register_question
from smallfry.data.generators import grids, sudoku
from smallfry.data.registered import find_reader, register_data
from smallfry.deploy.targets import find_target, register_target
from smallfry.errors import UsageError
from smallfry.io.registry import add
from smallfry.layers.linear_map import register_layer
from smallfry.models.sources import register_sizes
from smallfry.tasks import register
from smallfry.training.method import methods, register_method
from smallfry.training.objectives.registry import objectives, register_objective
from smallfry.transforms import kinds
from smallfry.transforms import registry as transforms
from smallfry.transforms.declared import groups_of


def ask(subject):
    """Stand for a question of another package, in a module of the same name."""


ask.__module__ = "elsewhere.limits"


def named(name):
    """Return a frozen class of settings with a name."""
    return dataclass(frozen=True)(type("Other", (), {"name": name, "kind": name}))


@pytest.mark.parametrize(
    ("take", "former"),
    [
        (lambda: register_target(named("onnx")), "smallfry.deploy.targets.onnx.Onnx"),
        (lambda: register(named("classification")), "classification.Classification"),
        (lambda: register_method(named("low_rank")), "smallfry.compress.factorize"),
        (lambda: register_objective(named("bias")), "objectives.bias.BiasSettings"),
        (lambda: register_layer(named("low_rank")), "smallfry.layers.low_rank.LowRank"),
        (lambda: transforms.register(named("resize")), "transforms.resize.Resize"),
        (lambda: register_question(ask), "two questions are named 'limits'"),
        (lambda: register_data(["sudoku9"], ask), "generators.grids.read_puzzles"),
        (lambda: register_data(["mnist"], ask), "smallfry's own"),
        (lambda: grids.register(["sudoku9"], ask), "generators.sudoku._build"),
        (
            lambda: register_sizes("elsewhere", ["cct_2_3x2_32"], ask),
            "smallfry.models.cct and elsewhere",
        ),
        (lambda: register_sizes("elsewhere", ["resnet18"], ask), "timm.models.resnet and else"),
        (lambda: groups_of(Mlp)(ask), "smallfry.transforms.declared"),
    ],
)
def test_a_name_that_is_taken_is_refused_with_both_of_its_owners(take, former):
    find_target("onnx"), find_questions("limits"), methods(), objectives(), kinds()
    with pytest.raises(UsageError, match=r"^two .* are named .*; rename one$") as error:
        take()
    assert former in str(error.value)
    assert re.search(r" and (\S*test_registry\.Other|elsewhere)", str(error.value))


def test_what_was_registered_stays_after_a_refusal():
    with pytest.raises(UsageError):
        register_data(["sudoku9"], ask)
    assert find_reader("sudoku9") is grids.read_puzzles
    assert find_reader("mnist") is None
    assert model_entrypoint("resnet18").__module__ == "timm.models.resnet"


def test_what_a_module_defines_again_replaces_the_former():
    found = {}
    for _ in range(2):
        last = named("one")
        add(found, "one", last, "things")
    assert found == {"one": last}
    register_sizes("smallfry.models.cct", [], ask)
    grids.register(["sudoku9"], sudoku._build)
    assert find_reader("sudoku9") is grids.read_puzzles
