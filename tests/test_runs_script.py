"""benchmarks/runs.py: a list of runs is trained, continued where it was stopped, and kept."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import yaml

from smallfry.cli import main

FILE = Path(__file__).parents[1] / "benchmarks" / "runs.py"
RECIPE = "recipes/vitrm_micro_digits.yaml"
SMALL = {"data.limit": 100, "epochs": 2, "batch_size": 50, "progress": "quiet", "threads": 1}


def start(folder, runs, *words):
    file = folder / "list.yaml"
    file.write_text(yaml.safe_dump(runs))
    command = [sys.executable, str(FILE), str(file), "--out", str(folder / "out"), *words]
    environment = os.environ | {"SMALLFRY_CACHE": str(folder / "cache")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_a_list_is_trained_once_and_the_best_weights_of_the_first_seed_are_kept(tmp_path):
    runs = [
        {"name": "a", "recipe": RECIPE, "settings": SMALL, "seeds": [0, 1], "keep": True},
        {"name": "b", "recipe": RECIPE, "settings": {**SMALL, "epochs": 0}, "decides": "nothing"},
        {"name": "c", "recipe": RECIPE, "settings": SMALL},
    ]
    words = ("--at-once", "2", "--only", "a", "b", "--set", "schedule.shape=linear")
    first = start(tmp_path, runs, *words)
    said, _ = first.communicate()
    out = tmp_path / "out"
    assert "b-seed0: UsageError: epochs must be at least 1" in said
    assert "a-seed0: test " in said
    assert {p.name for p in out.glob("*/summary.json")} == {"summary.json"}
    assert {p.parent.name for p in out.glob("*/summary.json")} == {"a-seed0", "a-seed1"}
    assert (out / "a-seed0" / "best" / "model.safetensors").is_file()
    assert not (out / "a-seed1" / "best").exists()
    config = yaml.safe_load((out / "a-seed1" / "config.yaml").read_text())
    assert (config["seed"], config["epochs"], config["schedule"]["shape"]) == (1, 2, "linear")
    assert json.loads((out / "log.json").read_text()).keys() == {"a-seed0", "a-seed1", "b-seed0"}
    again, _ = start(tmp_path, [runs[0]], *words).communicate()
    assert "a-seed" not in again
    assert "2 had ended before" in again


@pytest.mark.slow
def test_a_list_that_is_stopped_goes_on_where_it_was(tmp_path):
    settings = {**SMALL, "epochs": 400, "checkpoint_seconds": 600}
    runs = [{"name": "long", "recipe": RECIPE, "settings": settings}]
    begun = start(tmp_path, runs)
    metrics = tmp_path / "out" / "runs" / "long-seed0" / "metrics.csv"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert begun.poll() is None
        time.sleep(0.05)
    begun.send_signal(signal.SIGTERM)
    said, _ = begun.communicate()
    assert "long-seed0: stopped after step" in said
    assert begun.returncode == 1
    done = len(list(csv.DictReader(metrics.open())))
    assert 2 <= done < 400
    assert main(["train", "--resume", str(metrics.parent), "--epochs", str(done + 1)]) == 0
    said, _ = start(tmp_path, runs).communicate()
    assert "long-seed0: test " in said
    assert len(list(csv.DictReader(metrics.open()))) == done + 1


def test_commands_run_once_each_with_their_seed_and_a_failed_one_again(tmp_path):
    code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(sys.argv[2] == '1')"
    command = f"python -c {shlex.quote(code)} {{out}}/said {{seed}}"
    runs = [{"name": "a", "command": command, "seeds": [0, 1]}]
    for again in range(2):
        begun = start(tmp_path, runs)
        said, _ = begun.communicate()
        assert "a-seed1: failed with exit code 1" in said
        assert ("a-seed0" in said) == (not again)
        assert begun.returncode == 0
    assert (tmp_path / "out" / "said").read_text() == "011"
    record = json.loads((tmp_path / "out" / "a-seed0" / "summary.json").read_text())
    assert (record["command"], record["seed"]) == (command, 0)
    assert not (tmp_path / "out" / "a-seed1").exists()


def test_a_command_is_asked_to_end_with_its_list(tmp_path):
    code = "import time, sys; print('begun', flush=True); time.sleep(600)"
    begun = start(tmp_path, [{"name": "a", "command": f"python -c {shlex.quote(code)}"}])
    log = tmp_path / "out" / "a-seed0.txt"
    while not (log.exists() and log.read_text()):
        assert begun.poll() is None
        time.sleep(0.05)
    begun.send_signal(signal.SIGTERM)
    said, _ = begun.communicate()
    assert begun.returncode == 1
    assert "0 of 1 runs" in said
    assert not (tmp_path / "out" / "a-seed0").exists()


@pytest.mark.parametrize(
    "wrong", [{"recipe": RECIPE, "setings": {}}, {}, {"recipe": RECIPE, "command": "true"}]
)
def test_an_unknown_key_and_neither_or_both_of_recipe_and_command_are_refused(tmp_path, wrong):
    begun = start(tmp_path, [{"name": "a", **wrong}])
    begun.communicate()
    assert begun.returncode != 0


def test_runs_are_chosen_by_name_or_pattern():
    file = FILE.parent / "lists" / "cpu.yaml"
    sys.path.insert(0, str(FILE.parent))
    try:
        from runs import read_list
    finally:
        sys.path.remove(str(FILE.parent))
    assert [run.name for run in read_list(file, ["loopnet_2m_sizes_*"], {})] == [
        f"loopnet_2m_sizes_34_epochs-seed{seed}" for seed in range(3)
    ]
    chosen = {run.name for run in read_list(file, ["fast_*", "loopnet_300k"], {"epochs": 1})}
    assert len(chosen) == 7
    assert {"loopnet_300k-seed0", "fast_kfac_0.1-seed0"} < chosen
    assert read_list(file, ["fast"], {}) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", sorted((FILE.parent / "lists").glob("*.yaml")), ids=lambda f: f.stem
)
def test_lists_name_recipes_and_settings_that_exist(file):
    sys.path.insert(0, str(FILE.parent))
    try:
        from runs import read_list
    finally:
        sys.path.remove(str(FILE.parent))
    from smallfry.training.config import read_config
    from smallfry.training.continuation import with_changes

    runs = read_list(file, [], {})
    assert len({run.name for run in runs}) == len(runs) > 10
    parsed = cache(read_config)
    for run in runs:
        if run.recipe is not None:
            with_changes(parsed(run.recipe), run.settings)
