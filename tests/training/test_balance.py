"""Classes with different numbers of training images: weights, sampling, choice of the epoch."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import write_images
from run_helpers import StopAt, assert_same_run, metrics
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch.testing import assert_close

from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import RunError, SmallfryWarning, Stopped, UsageError
from smallfry.report.confusion import balanced_accuracy
from smallfry.tasks import create_task
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.tasks.puzzle import Puzzle
from smallfry.training.augment import Augment
from smallfry.training.balance import class_draws, class_weights, describe_small_classes
from smallfry.training.batches import TrainBatches
from smallfry.training.bias_loss import BiasLoss
from smallfry.training.config import (
    AugmentConfig,
    BalanceConfig,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from smallfry.training.selection import rank, require_choice
from smallfry.training.train import resume, train

SIZES = {"common": 60, "rare": 6, "some": 24}
PLAIN = AugmentConfig(crop_padding=0, flip=False, mixup=0.0, cutmix=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("unequal") / "images"
    for seed, (name, count) in enumerate(SIZES.items()):
        write_images(place / name, count, mode="L", seed=seed)
    return place


@pytest.fixture(scope="module")
def data(folder):
    return load_data(str(folder), validation=0.2, test=0.1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Sampling


@pytest.mark.parametrize(
    ("exponent", "wanted"), [(0.0, [35, 0, 35, 35]), (0.5, [60, 0, 15, 30]), (1.0, [80, 0, 5, 20])]
)
def test_classes_are_drawn_in_proportion_to_a_power_of_their_size(exponent, wanted):
    labels = torch.tensor([0] * 80 + [2] * 5 + [3] * 20)
    labels = labels[torch.randperm(105, generator=seeded(1))]
    for seed in range(5):
        drawn = class_draws(labels, exponent, seeded(seed))
        assert torch.equal(drawn, drawn.sort().values)
        assert torch.bincount(labels[drawn], minlength=4).tolist() == wanted
        for label, size in ((0, 80), (2, 5), (3, 20)):
            times = torch.bincount(drawn, minlength=105)[labels == label]
            assert len(times) == size
            assert times.max() - times.min() <= 1  # no image is preferred


def test_numbers_of_images_are_rounded_without_bias_and_images_change():
    labels = torch.tensor([0] * 90 + [1] * 3 + [2] * 7)
    counts, images = torch.zeros(3), torch.zeros(100)
    for seed in range(300):
        drawn = class_draws(labels, 0.0, seeded(seed))
        assert len(drawn) == 100
        counts += torch.bincount(labels[drawn])
        images += torch.bincount(drawn, minlength=100)
    assert_close(counts / 300, torch.full((3,), 100 / 3), atol=0.1, rtol=0)
    assert_close(images[:90] / 300, torch.full((90,), 100 / 270), atol=0.12, rtol=0)


def batches(data, sampler, seed=0, rank=0, processes=1):
    augment = Augment(PLAIN, 8, 3, data.mean, data.std, flip=False)
    return TrainBatches(data.train, augment, 16, seed, rank, processes, sampler=sampler)


def test_batches_of_a_sampler_are_functions_of_seed_and_step(data):
    made, other = batches(data, "balanced"), batches(data, "balanced")
    wanted = [made[step] for step in (5, 0)]
    _ = other[2]
    for step, batch in zip((5, 0), wanted, strict=True):
        assert torch.equal(batch.inputs, other[step].inputs)
        assert torch.equal(batch.targets.labels, other[step].targets.labels)
        halves = [batches(data, "balanced", 0, part, 2)[step] for part in (0, 1)]
        assert torch.equal(torch.cat([half.inputs for half in halves]), batch.inputs)
    assert not torch.equal(wanted[1].inputs, batches(data, "balanced", 1)[0].inputs)


def test_a_balanced_epoch_has_as_many_steps_and_all_classes_alike(data):
    made, plain = batches(data, "balanced"), batches(data, "none")
    assert made.steps_per_epoch == plain.steps_per_epoch == len(data.train) // 16
    labels = torch.cat([made[step].targets.labels for step in range(40)])
    shares = torch.bincount(labels).double() / len(labels)
    assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03, rtol=0)
    rare = torch.cat([made[s].inputs[made[s].targets.labels == 1] for s in range(40)])
    assert len(rare.unique(dim=0)) == (data.train.labels == 1).sum()


def test_streamed_images_are_sampled_too(folder, tmp_path):
    from image_files import grey, write_parquet

    images, labels = grey(60), ["a"] * 50 + ["b"] * 10
    write_parquet(tmp_path, "train", images, labels)
    streamed = load_data(str(tmp_path), stream=True)
    made = batches(streamed, "balanced")
    labels = torch.cat([made[step].targets.labels for step in range(20)])
    assert abs((labels == 1).double().mean() - 0.5) < 0.06
    assert torch.equal(made[3].inputs, batches(streamed, "balanced")[3].inputs)


# Weights


def test_weights_are_those_of_scikit_learn_and_of_the_paper(data):
    labels = data.train.labels
    counts = torch.bincount(labels).double()
    found = class_weights(BalanceConfig("balanced"), data, Classification())
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert found == pytest.approx(wanted.tolist())
    effective = class_weights(BalanceConfig("effective", beta=0.9), data, Classification())
    by_hand = (1 - 0.9) / (1 - 0.9**counts)
    assert_close(
        torch.tensor(effective) / effective[0], (by_hand / by_hand[0]).float(), check_dtype=False
    )
    for weights in (found, effective):
        assert (torch.tensor(weights) * counts).sum() == pytest.approx(counts.sum())
    assert effective[1] / effective[0] < found[1] / found[0]
    given = BalanceConfig(weights={"rare": 5})
    assert class_weights(given, data, Classification()) == (1.0, 5.0, 1.0)
    assert class_weights(BalanceConfig(sampler="balanced"), data, Classification()) == ()
    assert class_weights(BalanceConfig(), data, Puzzle()) == ()


def test_classes_without_training_images_have_no_weight(data):
    lacking = replace(data, train=data.train.take((data.train.labels != 1).nonzero()[:, 0]))
    for config in (BalanceConfig("balanced"), BalanceConfig("effective")):
        weights = class_weights(config, lacking, Classification())
        assert weights[1] == 0
        assert all(w > 0 for w in (weights[0], weights[2]))


def test_the_loss_is_weighted_by_the_share_of_each_class():
    torch.manual_seed(0)
    outputs, shares = torch.randn(5, 3), torch.rand(5, 3).softmax(dim=1)
    weights = torch.tensor([0.5, 4.0, 1.0])
    task = Classification(0.1, tuple(weights.tolist()))
    smoothed = 0.9 * shares + 0.1 / 3
    wanted = -(weights * smoothed * outputs.log_softmax(1)).sum(1)
    targets = ClassTargets(shares.argmax(1), shares)
    assert_close(task.losses(outputs, targets), wanted)
    assert_close(task.loss(outputs, targets), wanted.mean())
    scores = task.metrics(outputs, targets.labels)
    assert scores == Classification().metrics(outputs, targets.labels)  # of images as they are
    single = Classification(weights=(2.0, 2.0, 2.0))
    assert_close(single.loss(outputs, targets), 2 * Classification().loss(outputs, targets))
    assert BiasLoss(task).task.losses(outputs, targets).shape == (5,)


def test_balanced_accuracy_is_that_of_scikit_learn():
    torch.manual_seed(0)
    labels, predicted = torch.randint(0, 4, (2, 50))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = balanced_accuracy_score(labels.numpy(), predicted.numpy())
        assert balanced_accuracy(predicted, labels, 7) == pytest.approx(wanted)
        few = labels[labels < 2], predicted[labels < 2]
        wanted = balanced_accuracy_score(few[0].numpy(), few[1].numpy())
    assert balanced_accuracy(few[1], few[0], 4) == pytest.approx(wanted)
    assert balanced_accuracy(labels[:0], labels[:0], 4) == 0.0


# Choice of the epoch


def test_a_score_ranks_epochs_and_the_task_decides_between_equals():
    task = Classification()
    low = {"accuracy": 0.9, "balanced_accuracy": 0.5, "macro_f1": 0.4, "loss": 0.3}
    high = {"accuracy": 0.8, "balanced_accuracy": 0.7, "macro_f1": 0.4, "loss": 0.6}
    assert rank(task, low) > rank(task, high)
    assert rank(task, low, "balanced_accuracy") < rank(task, high, "balanced_accuracy")
    assert rank(task, low, "loss") > rank(task, high, "loss")
    assert rank(task, low, "macro_f1") > rank(task, high, "macro_f1")  # equal: by accuracy
    require_choice(task, None)
    for name in Classification.choices:
        require_choice(task, name)
    require_choice(Puzzle(), None)
    with pytest.raises(UsageError, match="no score 'balanced'; did you mean 'balanced_accuracy'"):
        require_choice(task, "balanced")
    with pytest.raises(UsageError, match="puzzle ranks its epochs itself: leave out select_by"):
        require_choice(create_task("puzzle"), "accuracy")


@pytest.mark.parametrize("by", ["loss", pytest.param("macro_f1", marks=pytest.mark.slow)])
def test_a_run_keeps_the_best_epoch_of_the_chosen_score(by, variant, tmp_path):
    summary = train(variant(select_by=by, epochs=4, run=tmp_path / by))
    sign = -1 if by == "loss" else 1
    rows = [sign * float(row[f"validation_{by}"]) for row in metrics(tmp_path / by)]
    assert rows[summary["measured"]["best_epoch"] - 1] == max(rows)
    assert summary["measured"]["select_by"] == by


# Runs


@pytest.fixture
def unequal(variant, folder):
    def make(**changes):
        settings = {
            "data": DataConfig(str(folder), validation=0.2, test=0.1),
            "balance": BalanceConfig("effective", sampler="square_root"),
            "select_by": "macro_f1",
            "batch_size": 16,
            "epochs": 3,
        }
        return variant(**settings | changes)

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
def test_a_stopped_run_with_a_sampler_resumes_to_the_bit(unequal, tmp_path):
    train(unequal(run=tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(unequal(run=tmp_path / "parted"), StopAt(5))
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
    config = tmp_path / "parted" / "config.yaml"
    config.write_text(config.read_text().replace("sampler: square_root", "sampler: balanced"))
    with pytest.raises(RunError, match=r"balance\.sampler balanced.*square_root so far"):
        resume(tmp_path / "parted", changes={"epochs": 5})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
def test_natural_gradient_takes_samplers_but_no_weights(unequal):
    optimizer = OptimizerConfig("kfac", lr=0.05)
    objective = ObjectiveConfig("cross_entropy")
    with pytest.raises(UsageError, match="kfac needs a loss without weights of classes: take bal"):
        train(unequal(optimizer=optimizer, objective=objective, epochs=1))
    sampled = BalanceConfig(sampler="balanced")
    train(unequal(optimizer=optimizer, objective=objective, epochs=1, balance=sampled))


@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")
def test_the_command_and_a_file_take_every_setting(folder, tmp_path, capsys):
    file = tmp_path / "unequal.yaml"
    file.write_text(
        f"data: {{name: {folder}, validation: 0.2, test: 0.1}}\n"
        "balance: {weights: {rare: 4}, sampler: balanced}\nepochs: 1\nreferences: false\n"
        "model: {options: {embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, "
        "latent_steps: 1}}\n"
    )
    run = tmp_path / "run"
    options = ["--run", str(run), "--select_by", "balanced_accuracy", "--progress", "quiet"]
    assert main(["train", "--config", str(file), *options]) == 0
    assert "rare: 4.0" in (run / "config.yaml").read_text()
    measured = json.loads((run / "summary.json").read_text())["measured"]
    assert measured["select_by"] == "balanced_accuracy"
    assert 0 <= measured["test"]["balanced_accuracy"] <= 1
    assert main(["train", "--data", str(folder), "--balance.loss", "equal"]) == 2
    assert "balance.loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 1.0}, "balance.beta is 0 to below 1, not 1.0"),
        ({"loss": "balanced", "weights": {"a": 1}}, "leave one of them out"),
        ({"weights": {"a": 0}}, "balance.weights.a must be a positive number, not 0"),
        ({"weights": {"a": "2"}}, "must be a positive number, not '2'"),
        ({"weights": {"a": float("inf")}}, "must be a positive number"),
        ({"weights": {"a": True}}, "must be a positive number"),
        ({"sampler": "sqrt"}, "balance.sampler must be one of none, balanced, square_root"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        BalanceConfig(**settings)


def test_settings_that_do_not_fit_the_data_or_task_are_refused(data):
    with pytest.raises(UsageError, match=r"balance\.weights: no class 'rear'; did you mean 'rare'"):
        class_weights(BalanceConfig(weights={"rear": 2}), data, Classification())
    with pytest.raises(UsageError, match="balance is for classification, not puzzle"):
        class_weights(BalanceConfig(sampler="balanced"), data, Puzzle())


# Warnings


def test_classes_with_too_few_images_are_named(folder, data, tmp_path, variant):
    for name, count in {"few": 4, "many": 20, "two": 2}.items():
        write_images(tmp_path / "d" / name, count, seed=count)
    sparse = load_data(str(tmp_path / "d"))
    none, few = describe_small_classes(sparse)
    assert "no validation image of two, so that" in none
    assert "fewer than 5 training images of few, two" in few
    assert describe_small_classes(sparse, False) == [few]
    assert "fewer than 5 training images of rare" in describe_small_classes(data)[0]
    config = variant(data=DataConfig(str(tmp_path / "d")), batch_size=8, epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SmallfryWarning)
        train(config)
    assert [str(each.message) for each in caught] == [none, few]
    assert describe_small_classes(load_data("digits")) == []


def test_every_class_with_three_images_is_in_every_split(tmp_path):
    for name, count in {"a": 3, "b": 300}.items():
        write_images(tmp_path / name, count, seed=count)
    found = load_data(str(tmp_path), validation=0.01, test=0.01)
    for split in (found.train, found.validation, found.test):
        assert set(split.labels.tolist()) == {0, 1}
