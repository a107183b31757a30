"""Comparison of the campaign's runs: bit for bit, or up to rounding."""

import csv
import shutil
from dataclasses import replace

import pytest

from campaign import runs
from campaign.runs import CONFIG, difference, rounds_alike
from smallfry.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(replace(CONFIG, run=str(folder), epochs=1))
    return folder


@pytest.fixture
def other(run, tmp_path):
    return shutil.copytree(run, tmp_path / "other")


def change(run, column, factor=1.0, offset=0.0):
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row[column] = str(float(row[column]) * factor + offset)
    with open(run / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_a_copy_is_equal_to_the_bit(run, other):
    assert difference(run, other) is None
    assert rounds_alike(run, other)


@pytest.mark.parametrize(
    ("column", "factor", "offset", "alike"),
    [
        ("train_loss", 1 + 1e-5, 0.0, True),
        ("train_loss", 1 + 1e-2, 0.0, False),
        ("validation_loss", 1 - 1e-4, 0.0, True),
        ("learning_rate", 1.1, 0.0, False),
        ("step", 1.0, 1.0, False),
        ("validation_accuracy", 1.0, 0.007, True),
        ("validation_accuracy", 1.0, 0.1, False),
        ("validation_macro_f1", 1.0, 0.01, True),
        ("validation_calibration_error", 1.0, 0.5, False),
    ],
)
def test_rows_differ_by_rounding_and_by_whole_images(run, other, column, factor, offset, alike):
    change(other, column, factor, offset)
    assert difference(run, other) is not None
    assert rounds_alike(run, other) == alike


@pytest.mark.parametrize(("factor", "alike"), [(1 + 1e-5, True), (1.1, False)])
def test_weights_are_compared_up_to_rounding(run, other, monkeypatch, factor, alike):
    load = runs.load_checkpoint

    def changed(folder, *rest):
        loaded = load(folder, *rest)
        if other not in folder.parents:
            return loaded
        return loaded._replace(weights={k: v * factor for k, v in loaded.weights.items()})

    monkeypatch.setattr(runs, "load_checkpoint", changed)
    assert rounds_alike(run, other) == alike


def test_another_best_epoch_is_allowed_and_another_last_step_is_not(run, other, monkeypatch):
    load, moved = runs.load_checkpoint, []

    def changed(folder, *rest):
        loaded = load(folder, *rest)
        if folder == other / moved[0]:
            training = {**loaded.manifest["training"], "step": 1}
            return loaded._replace(manifest={**loaded.manifest, "training": training})
        return loaded

    monkeypatch.setattr(runs, "load_checkpoint", changed)
    moved[:] = ["best"]
    assert rounds_alike(run, other)
    moved[:] = ["last"]
    assert not rounds_alike(run, other)
