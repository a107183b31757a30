"""Enumerated tables: stacked training is that of each network alone, and files are whole."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.costing import cost
from smallfry.errors import DataError, UsageError
from smallfry.search.nars import shortest_proxy
from smallfry.search.tables import (
    TABLES,
    TableEvaluator,
    candidates_of,
    load_table,
    micro_n2n,
    micro_nars,
)
from smallfry.search.tables import digits as digits_module
from smallfry.search.tables.digits import IMAGES, MOMENTS, epochs_of, load_split, shifted
from smallfry.search.tables.stacked import StackedLinear, correct_and_nll, repeat_channels, stack
from smallfry.search.tables.table import ARRAYS, write_table
from smallfry.studies.search.config import TABLE_NAMES

DOUBLE = torch.float64
RECIPES = [
    {"optimizer": "sgd", "rate": 5, "decay": False, "shift": False},
    {"optimizer": "sgd", "rate": 25, "decay": True, "shift": True},
    {"optimizer": "adamw", "rate": 5, "decay": True, "shift": True},
    {"optimizer": "adamw", "rate": 25, "decay": False, "shift": False},
]
ARCHITECTURES = {
    "dense": {"width": 4, "early": 1, "late": 1, "ratio": 2, "kind": "dense"},
    "depthwise": {"width": 4, "early": 1, "late": 2, "ratio": 1, "kind": "depthwise"},
}


@pytest.fixture(scope="module")
def digits():
    """A tenth of the digits in float64, as an equality needs no more."""
    found = load_split(DOUBLE)
    few = [digits_module.Split(part.images[:150], part.labels[:150]) for part in found[:3]]
    return digits_module.Digits(*few, found.black)


@pytest.fixture(scope="module", params=["micro_nars", "micro_n2n"])
def table(request):
    return load_table(request.param)


# Data


def test_the_split_is_of_all_digits_and_standardised_by_its_training_part():
    found = load_split(DOUBLE)
    assert [len(part.labels) for part in found[:3]] == [597, 600, 600]
    assert float(found.train.images.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.train.images.std(correction=0)) == pytest.approx(1)
    assert float(found.train.images.min()) == pytest.approx(found.black)
    images = torch.cat([part.images for part in found[:3]]).flatten(1)
    assert len(torch.unique(images, dim=0)) == 1797


def test_shifts_move_images_by_a_pixel_and_fill_with_black():
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    views = shifted(image, -1.0)
    assert torch.equal(views[0, 1, 1], image[0])
    assert torch.equal(views[0, 2, 1, 0, :7], image[0, 0, 1:])
    assert (views[0, 2, 1, 0, 7] == -1).all()
    assert (views[0, 1, 0, 0, :, 0] == -1).all()
    assert torch.equal(views[0, 1, 0, 0, :, 1:], image[0, 0, :, :7])


def test_epochs_have_every_image_once_and_rates_fall_to_zero(digits):
    batches = [batch for epoch in epochs_of(digits.train, 8, 3) for batch in epoch]
    assert len(batches) == 8 * 3
    assert sorted(torch.cat([b.rows for b in batches[:3]]).tolist()) == [*range(150)]
    shares = [batch.share for batch in batches]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    assert 0 < shares[-1] < 0.01
    assert {*torch.cat([b.shifts for b in batches]).flatten().tolist()} == {0, 1, 2}


# Stacked training


def train_alone(architecture, recipe, digits, seed):
    """Train one network plainly, with PyTorch's own optimizers."""
    torch.manual_seed(seed)
    model = micro_nars.build(architecture).to(DOUBLE)
    rate = micro_nars.LOWEST_RATE[recipe["optimizer"]] * recipe["rate"]
    decay = micro_nars.DECAY[recipe["optimizer"]] * recipe["decay"]
    if recipe["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    views = shifted(digits.train.images, digits.black)
    for epoch in epochs_of(digits.train, MOMENTS[-1], seed):
        for rows, moves, share in epoch:
            optimizer.param_groups[0]["lr"] = rate * share
            x, y = moves.T if recipe["shift"] else (1, 1)
            loss = F.cross_entropy(model(views[rows, x, y]), digits.train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_recipes_trained_at_once_give_the_networks_of_each_alone(kind, digits):
    stacked, results = micro_nars.train(ARCHITECTURES[kind], RECIPES, 7, digits)
    images = digits.validation.images
    with torch.no_grad():
        logits = stacked.eval()(repeat_channels(images, len(RECIPES)))
    for number, recipe in enumerate(RECIPES):
        model = train_alone(ARCHITECTURES[kind], recipe, digits, 7)
        with torch.no_grad():
            alone = model(images)
        torch.testing.assert_close(logits[number], alone, atol=1e-8, rtol=1e-8)
        right = int((alone.argmax(1) == digits.validation.labels).sum())
        assert results.correct[-1, number] == right
        nll = float(F.cross_entropy(alone, digits.validation.labels))
        assert results.nll[-1, number] == pytest.approx(nll, rel=1e-3)


def test_students_of_several_widths_trained_at_once_are_those_of_each_alone(digits):
    students = [
        {"layer1": 1.0, "layer2": 0.0, "layer3": share, "layer4": other, "layer5": 0.0}
        for share, other in ((0.25, 1.0), (1.0, 0.25), (0.5, 0.5))
    ]
    torch.manual_seed(1)
    targets = torch.randn(150, 10, dtype=DOUBLE)
    stacked, results = micro_n2n.distill(students, targets, 3, digits)
    with torch.no_grad():
        logits = stacked.eval()(repeat_channels(digits.test.images, 3))
    for number, student in enumerate(students):
        torch.manual_seed(3)
        model = micro_n2n.build(student).to(DOUBLE)
        optimizer = torch.optim.Adam(model.parameters(), micro_n2n.RATE)
        for epoch in epochs_of(digits.train, MOMENTS[-1], 3):
            for rows, _, share in epoch:
                optimizer.param_groups[0]["lr"] = micro_n2n.RATE * share
                optimizer.zero_grad()
                F.mse_loss(model(digits.train.images[rows]), targets[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            alone = model.eval()(digits.test.images)
        torch.testing.assert_close(logits[number], alone, atol=1e-8, rtol=1e-8)
        right = int((alone.argmax(1) == digits.test.labels).sum())
        assert results.test_correct[number] == right


def test_a_network_that_diverged_answers_class_0_and_leaves_the_others_alone():
    logits = torch.randn(2, 6, 3)
    whole = correct_and_nll(logits, torch.tensor([0, 0, 1, 1, 2, 2]))
    logits[1, 4, 2] = torch.nan
    right, losses = correct_and_nll(logits, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert right[0] == whole[0][0]
    assert losses[0] == whole[1][0]
    assert losses.isfinite().all()


def test_a_stack_of_linear_layers_has_each_ones_outputs():
    layers = [nn.Linear(6, 3), nn.Linear(4, 3)]
    inputs = torch.randn(5, 12)
    found = StackedLinear(layers)(inputs)
    torch.testing.assert_close(found[0], layers[0](inputs[:, :6]))
    torch.testing.assert_close(found[1], layers[1](inputs[:, 6:10]))
    assert len(stack([nn.Sequential(nn.ReLU())] * 2)) == 1


def test_recipes_with_adamw_before_sgd_are_refused(digits):
    with pytest.raises(ValueError, match="sgd come before"):
        micro_nars.train(ARCHITECTURES["dense"], RECIPES[::-1], 0, digits)


# Files


def test_a_table_has_every_candidate_with_three_seeds(table):
    count = {"micro_nars": 1728, "micro_n2n": 1023}[table.name]
    assert table.correct.shape == table.nll.shape == (3, 3, count)
    assert table.test_correct.shape == (3, count)
    assert table.correct.max() <= IMAGES
    assert np.isfinite(table.nll.astype(float)).all()
    assert len(table.candidates) == count
    assert table.record["data"].startswith("scikit-learn digits, real")
    assert (table.correct[0] != table.correct[1]).mean() > 0.9


def test_costs_of_a_table_are_those_of_the_networks(table):
    build = {"micro_nars": micro_nars.build, "micro_n2n": micro_n2n.build}[table.name]
    for position in np.linspace(0, len(table.candidates) - 1, 7, dtype=int):
        found = cost(build(table.candidates[position]), torch.zeros(1, 1, 8, 8))
        assert (table.parameters[position], table.macs[position]) == found[:3:2]


def test_a_table_was_computed_by_the_training_that_is_here(table):
    """One group of it again; other processors round otherwise, so counts differ a little."""
    digits = load_split()
    if table.name == "micro_nars":
        group = table.candidates[:24]
        results = micro_nars.train(group[0], group, 0, digits)[1]
    else:
        group = [
            e for e in table.candidates if [bool(v) for v in e.values()] == [True] + [False] * 4
        ]
        teacher = micro_n2n.train_teacher(digits)
        results = micro_n2n.distill(group, micro_n2n.teacher_logits(teacher, digits), 0, digits)[1]
    columns = [table.position(each) for each in group]
    differences = np.abs(results.correct.astype(int) - table.correct[0][:, columns])
    assert np.median(differences) <= 6
    assert np.corrcoef(results.correct[-1], table.correct[0, -1, columns])[0, 1] > 0.98


def test_the_best_are_those_with_the_most_correct_images_over_all_seeds(table):
    best = table.best(0.01)
    assert len(best) == len(table.candidates) // 100
    rest = np.setdiff1d(np.arange(len(table.candidates)), best)
    assert table.accuracy[best].min() >= table.accuracy[rest].max()
    assert (np.diff(table.accuracy[best]) <= 0).all()


def test_short_trainings_are_no_proxy_and_test_images_agree_with_validation():
    table = load_table("micro_nars")
    final = table.correct[:, -1].mean(0)
    assert np.corrcoef(final, table.test_correct.mean(0))[0, 1] > 0.97
    for seed in range(3):  # neither 2 nor 4 of 8 epochs
        assert shortest_proxy(table.correct[seed].T.astype(float)) == 2


# Evaluator


def test_an_evaluator_gives_one_training_or_the_mean_of_all(table):
    mean, noisy = TableEvaluator(table, "mean"), TableEvaluator(table, seed=4)
    seeds = set()
    for position in range(0, 300, 10):
        candidate = table.candidates[position]
        assert mean(candidate).value == pytest.approx(table.accuracy[position])
        trial = noisy(candidate)
        seeds.add(trial.seed)
        assert trial.value == pytest.approx(100 * table.correct[trial.seed, -1, position] / 600)
        assert noisy(candidate) == trial
        assert len(trial.measured["accuracy_by_moment"]) == 3
        json.dumps(trial.to_dict())
    assert seeds == {0, 1, 2}


def test_what_is_no_candidate_and_no_table_is_refused():
    with pytest.raises(UsageError, match="not a candidate of the table micro_n2n"):
        TableEvaluator("micro_n2n")(dict.fromkeys(micro_n2n.TEACHER, 0.0))
    with pytest.raises(UsageError, match="no table 'micro'; use micro_nars or micro_n2n"):
        candidates_of("micro")


def test_a_damaged_table_is_refused_and_a_written_one_is_read(table, tmp_path):
    arrays, file = {name: getattr(table, name) for name in ARRAYS}, tmp_path / "table.npz"
    write_table(file, arrays, {"seeds": [0]})
    again = load_table(table.name, file)
    assert np.array_equal(again.correct, table.correct)
    assert again.record["sha256"] == table.record["sha256"]
    with np.load(file) as archive:
        content = dict(archive)
    content["correct"] = content["correct"] + 1
    np.savez(file, **content)
    with pytest.raises(DataError, match="damaged"):
        load_table(table.name, file)
    file.write_bytes(b"no archive")
    with pytest.raises(DataError, match="no table of a search space"):
        load_table(table.name, file)


def test_the_settings_of_a_search_name_all_tables():
    assert sorted(TABLES) == sorted(TABLE_NAMES)
