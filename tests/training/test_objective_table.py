"""The table of objectives: every one is a module of its own, and old configurations load."""

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import yaml
from torch import nn

from smallfry.cli import main
from smallfry.errors import UsageError
from smallfry.tasks.classification import Classification
from smallfry.training import objectives as package
from smallfry.training.build_objective import build_objective
from smallfry.training.config import ObjectiveConfig, TrainConfig, read_config
from smallfry.training.continuation import changes_since, dotted
from smallfry.training.objective import Supervised
from smallfry.training.objectives.registry import objectives, register_objective

# what every run recorded before the table, whatever its objective
RECORDED = {
    "supervision_steps": 1,
    "halt_threshold": 0.5,
    "label_smoothing": 0.0,
    "exploration": 0.1,
    "alpha": 0.3,
    "beta": 0.3,
    "normalization": "batch",
}
EFFECTIVE = {
    "auto": {},
    "cross_entropy": {},
    "deep_supervision": {"supervision_steps": 1, "halt_threshold": 0.5},
    "slots": {"supervision_steps": 1, "exploration": 0.1},
    "every_step": {"last_weight": 1.0},
    "bias": {"alpha": 0.3, "beta": 0.3, "normalization": "batch"},
}


def test_every_module_of_the_package_is_in_the_table():
    folder = Path(package.__path__[0])
    modules = {file.stem for file in folder.glob("*.py")} - {"__init__", "registry"}
    assert modules == {kind.__module__.rpartition(".")[2] for kind in objectives().values()}
    assert {*objectives()} == {*EFFECTIVE} - {"auto"}


@pytest.mark.parametrize("name", objectives())
def test_settings_are_frozen_described_and_have_defaults(name):
    settings = objectives()[name]()
    assert settings.name == name
    for entry in fields(settings):
        assert getattr(ObjectiveConfig(name), entry.name) == entry.default
        assert f"{entry.name}: " in (type(settings).__doc__ or "")
        assert f"({name}) " in (ObjectiveConfig.__doc__ or "")
        with pytest.raises(FrozenInstanceError):
            setattr(settings, entry.name, entry.default)


@pytest.mark.parametrize("name", EFFECTIVE)
def test_only_settings_that_are_read_are_recorded(name):
    wanted = {"name": name, "label_smoothing": 0.0, **EFFECTIVE[name]}
    assert ObjectiveConfig(name).to_dict() == wanted
    assert TrainConfig(objective=name).to_dict()["objective"] == wanted


@pytest.mark.parametrize("name", EFFECTIVE)
def test_a_configuration_of_before_is_equal_to_one_of_now(name, tmp_path):
    before = {"name": name, **RECORDED}
    assert ObjectiveConfig(**before) == ObjectiveConfig(name)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"objective": before}))
    assert read_config(tmp_path / "config.yaml") == TrainConfig(objective=name)
    recorded = dotted(TrainConfig(objective=name).to_dict() | {"objective": before})
    assert changes_since(recorded, TrainConfig(objective=name)) == []


def test_a_changed_setting_is_reported():
    config = TrainConfig(objective={"name": "bias", "alpha": 0.5})
    before = dotted(TrainConfig().to_dict() | {"objective": {"name": "bias", **RECORDED}})
    assert [str(change) for change in changes_since(before, config)] == [
        "objective.alpha 0.3 → 0.5"
    ]


def test_what_is_given_survives_files_processes_and_replacement(tmp_path):
    given = ObjectiveConfig(supervision_steps=3, halt_threshold=0.25)
    assert given.to_dict() == {
        "name": "auto", "label_smoothing": 0.0, "supervision_steps": 3, "halt_threshold": 0.25
    }  # fmt: skip
    assert pickle.loads(pickle.dumps(given)) == given
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(TrainConfig(objective=given).to_dict()))
    assert read_config(file).objective == given
    slots = replace(given, name="slots", halt_threshold=None)
    assert slots.to_dict() == {
        "name": "slots", "label_smoothing": 0.0, "supervision_steps": 3, "exploration": 0.1
    }  # fmt: skip
    with pytest.raises(UsageError, match="objective slots has no setting 'halt_threshold'"):
        replace(given, name="slots")


# a value other than the default of every setting
OTHER = {
    "supervision_steps": 3,
    "halt_threshold": 0.25,
    "exploration": 0.5,
    "alpha": 0.1,
    "beta": 0.2,
    "normalization": "running",
}


@pytest.mark.parametrize("setting", OTHER)
@pytest.mark.parametrize("name", sorted({*EFFECTIVE} - {"auto"}))
def test_a_setting_of_another_objective_is_refused(name, setting):
    """Every objective with every setting: it is taken, or refused with what would be."""
    given = {"name": name, setting: OTHER[setting]}
    if setting in EFFECTIVE[name]:
        assert ObjectiveConfig(**given).to_dict()[setting] == OTHER[setting]
        return
    with pytest.raises(UsageError) as error:
        TrainConfig(objective=given)
    owners = [n for n in sorted(EFFECTIVE) if setting in EFFECTIVE[n]]
    assert str(error.value) == (
        f"objective {name} has no setting '{setting}', which {' and '.join(owners)} "
        f"{'has' if len(owners) == 1 else 'have'}: remove objective.{setting} "
        f"({name} takes {', '.join(['label_smoothing', *EFFECTIVE[name]])})"
    )


def test_the_command_refuses_a_setting_of_another_objective(tmp_path, capsys):
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    options = ["train", "--run", str(run), "--objective", "bias", "--objective.exploration", "0.5"]
    assert main(options) != 0
    expected = "objective bias has no setting 'exploration', which slots has"
    assert expected in capsys.readouterr().err
    recipe.write_text("objective: {name: cross_entropy, halt_threshold: 0.3}")
    assert main(["train", "--run", str(run), "--config", str(recipe)]) != 0
    expected = "objective cross_entropy has no setting 'halt_threshold', which deep_supervision has"
    assert expected in capsys.readouterr().err
    assert not run.exists()


def test_auto_refuses_what_the_models_objective_does_not_take():
    """Which objective auto is, is known with the model; runs of earlier versions go on."""
    model, given = nn.Linear(2, 2), ObjectiveConfig(supervision_steps=3, label_smoothing=0.1)
    with pytest.raises(UsageError, match="objective cross_entropy has no setting 'supervision_"):
        build_objective(given, model)
    resumed = build_objective(given, model, resumed=True)
    assert type(resumed) is Supervised
    assert resumed.task == Classification(0.1)


def test_auto_takes_the_settings_of_the_tasks_own_objective():
    model = timm.create_model("trm_sudoku4_micro", num_classes=5)
    built = build_objective(ObjectiveConfig(exploration=0.5), model, "puzzle")
    assert built.exploration == 0.5
    with pytest.raises(UsageError, match="objective slots has no setting 'halt_threshold'"):
        build_objective(ObjectiveConfig(halt_threshold=0.25), model, "puzzle")
    with pytest.raises(UsageError, match="objective deep_supervision has no setting 'exploration'"):
        build_objective(ObjectiveConfig(exploration=0.5), model)


def test_a_run_of_before_with_settings_that_had_no_effect_is_read(tmp_path):
    """Earlier versions took and recorded settings of every objective."""
    before = {"name": "cross_entropy", **RECORDED, "supervision_steps": 4, "alpha": 0.9}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"objective": before}))
    now = read_config(file)
    assert now == TrainConfig(objective="cross_entropy")
    recorded = dotted(TrainConfig(objective="cross_entropy").to_dict() | {"objective": before})
    assert changes_since(recorded, now) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "crossentropy"}, "objective.name must be one of auto, bias, cross_entropy, deep"),
        ({"label_smoothing": 1.0}, "objective.label_smoothing is 0 to below 1"),
        ({"supervision_steps": 0}, "objective.supervision_steps must be at least 1"),
        ({"name": "slots", "supervision_steps": 0}, "objective.supervision_steps must be at least"),
        ({"name": "slots", "exploration": 1.5}, "objective.exploration is 0 to 1"),
        ({"name": "bias", "alpha": -0.1}, "objective.alpha is at least 0, beta 0 to below 1"),
        ({"name": "bias", "beta": 1.0}, "objective.alpha is at least 0, beta 0 to below 1"),
        ({"normalization": "none"}, "objective.normalization must be one of batch, running"),
        ({"supervision_steps": 2.5}, "objective.supervision_steps must be a whole number"),
        ({"halt_threshold": float("nan")}, "objective.halt_threshold is not a number"),
        ({"supervision_steps": 2**31}, "objective.supervision_steps must be below 2"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(UsageError) as error:
        ObjectiveConfig(**given)
    assert str(error.value).startswith(message)


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="objective has no setting 'alpa'; there are name, label_"):
        TrainConfig(objective={"alpa": 1.0})


def test_a_name_is_taken_once_and_settings_are_frozen():
    with pytest.raises(UsageError, match="two objectives are named 'bias'"):

        @register_objective
        @dataclass(frozen=True)
        class Other:
            name: ClassVar[str] = "bias"

    with pytest.raises(UsageError, match="Loose must be a frozen dataclass"):

        @register_objective
        @dataclass
        class Loose:
            name: ClassVar[str] = "loose"

    assert "loose" not in objectives()
    assert objectives()["bias"].__name__ == "BiasSettings"


@pytest.mark.slow
def test_a_new_objective_is_a_file_of_its_own(tmp_path):
    """An objective that a file adds is an option, is checked, recorded and built."""
    (tmp_path / "doubled.py").write_text(
        '''from dataclasses import dataclass
from typing import ClassVar
from smallfry.training.objective import Supervised
from smallfry.training.objectives.registry import register_objective

@register_objective
@dataclass(frozen=True)
class Doubled:
    """Twice the loss.

    Args:
        times: Factor of the loss.
        alpha: Another default than that of bias.
    """

    name: ClassVar[str] = "doubled"
    times: float = 2.0
    alpha: float = 0.7

    def build(self, task, model, parts):
        return self, task, parts
'''
    )
    script = f"""
from smallfry.training import objectives
objectives.__path__.append({str(tmp_path)!r})
from smallfry.cli._parser import read
from smallfry.training.build_objective import build_objective
options = read(["train", "--objective", "doubled", "--objective.times", "3"]).options
config = options.settings.objective
assert config.to_dict() == {{
    "name": "doubled", "label_smoothing": 0.0, "alpha": 0.7, "times": 3.0}}, config
settings, task, parts = build_objective(config, None, parts=4)
assert (settings.times, task.name, parts) == (3.0, "classification", 4)
from smallfry.training.config import ObjectiveConfig
assert ObjectiveConfig("bias").alpha == 0.3
assert ObjectiveConfig(alpha=0.3).alpha == 0.3  # the default of one of two
assert "times: (doubled) Factor of the loss." in ObjectiveConfig.__doc__
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_a_configuration_does_not_import_pytorch():
    script = (
        "import sys; from smallfry.training.config import TrainConfig; "
        "TrainConfig(objective='bias'); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_objectives_refuse_models_that_they_do_not_fit():
    for name in ("deep_supervision", "slots"):
        with pytest.raises(UsageError, match=f"{name} needs a recursive model, not NoneType"):
            build_objective(ObjectiveConfig(name), None)
    built = build_objective(ObjectiveConfig("cross_entropy", label_smoothing=0.1), None)
    assert built.task == Classification(0.1)
