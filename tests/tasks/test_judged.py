"""Samples with nothing to be right about: they are not right, and no accuracy counts them."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.kits.graphs.task import Graphs
from smallfry.kits.pose.models import PoseCodes
from smallfry.kits.pose.task import PoseTask
from smallfry.kits.pose.truth import codes
from smallfry.kits.pose.truth import pack as pack_pose
from smallfry.kits.pose.truth import unpack as unpack_pose
from smallfry.kits.splats.generate import generate
from smallfry.kits.splats.labels import Labels, make_labels
from smallfry.kits.splats.task import Splats
from smallfry.kits.stereo.models import FirstExit
from smallfry.kits.stereo.task import Stereo
from smallfry.kits.stereo.truth import pack as pack_pair
from smallfry.kits.stereo.truth import unpack as unpack_pair
from smallfry.tasks import Judges, register
from smallfry.tasks.classification import Classification
from smallfry.tasks.multilabel import MultiLabel
from smallfry.tasks.puzzle import Puzzle
from smallfry.tasks.task import count_judged, share_of
from smallfry.training.attack import PGD, accuracy_under_attack
from smallfry.training.augment import Normalize
from smallfry.training.config import DataConfig, ModelConfig, TrainConfig
from smallfry.training.exit_calibration import judged_part, trace
from smallfry.training.run import RunFolder
from smallfry.training.train import train
from smallfry_runtime.pnp import Camera, Pose

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}


@register
@dataclass(frozen=True)
class EvenDigits(Classification):
    """Classes, of which every answer to an even one is right, and no odd one is judged."""

    name: ClassVar[str] = "even_digits"

    def right(self, outputs, targets):
        return self.judged(targets)

    def judged(self, targets):
        return targets.labels % 2 == 0


def test_early_exit_is_calibrated_on_what_is_judged():
    model = timm.create_model("vitrm_micro_patch4_8", num_classes=10, recursion_steps=2, **TINY)
    labels = torch.arange(240) % 10
    images = torch.randint(0, 256, (240, 1, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(240), labels)
    for task, count in ((EvenDigits(), 120), (Classification(), 240)):
        found = trace(model, split, Normalize([0.5], [0.5]), task=task)
        assert found.right.shape == found.halting.shape == (2, count)
        assert len(judged_part(split, task, 10)) == count
    assert bool(trace(model, split, Normalize([0.5], [0.5]), task=EvenDigits()).right.all())
    assert judged_part(split, EvenDigits(), 10).labels.tolist() == [0, 2, 4, 6, 8] * 24
    odd = split.take(torch.arange(1, 240, 2))
    assert len(judged_part(odd, EvenDigits(), 10)) == 0
    with pytest.raises(UsageError, match="early exit is calibrated on validation images, and none"):
        trace(model, odd, Normalize([0.5], [0.5]), task=EvenDigits())


def symbols_of(answers, symbols):
    return 9.0 * F.one_hot(torch.tensor(answers), symbols)


def test_shares_are_of_what_is_judged_and_0_of_nothing():
    right, judged = (
        torch.tensor([True, True, False, False]),
        torch.tensor([True, False, True, True]),
    )
    assert share_of(right, judged) == pytest.approx(1 / 3)
    assert share_of(right, judged & False) == 0
    assert count_judged(Puzzle(), torch.tensor([[0, 0], [0, 3]]), right[:2]) == 1
    assert count_judged(Classification(), None, right) == 4


def test_a_puzzle_without_a_labelled_cell_counts_for_nothing():
    labels = torch.tensor([[2, 3], [0, 3], [0, 0], [0, 0]])
    outputs = symbols_of([[2, 3], [1, 1], [2, 3], [0, 0]], 4)
    task = Puzzle()
    assert task.right(outputs, labels).tolist() == [True, False, False, False]
    scores = task.metrics(outputs, labels)
    assert (scores["accuracy"], scores["cell_accuracy"]) == (1 / 2, 2 / 3)
    nothing = task.metrics(outputs[2:], labels[2:])
    assert (nothing["accuracy"], nothing["cell_accuracy"], nothing["loss"]) == (0, 0, 0)


def test_a_graph_without_a_labelled_node_counts_for_nothing():
    labels = torch.tensor([[0, 1, -1], [-1, -1, 1], [-1, -1, -1]])
    outputs = symbols_of([[0, 1, 0], [0, 0, 0], [1, 1, 1]], 2).transpose(1, 2)
    task = Graphs()
    assert task.right(outputs, labels).tolist() == [True, False, False]
    scores = task.metrics(outputs, labels)
    assert (scores["accuracy"], scores["node_accuracy"]) == (1 / 2, 2 / 3)
    nothing = task.metrics(outputs[2:], labels[2:])
    assert [nothing[name] for name in ("loss", "accuracy", "node_accuracy", "macro_f1")] == [0] * 4


def test_a_pair_without_a_known_point_that_both_views_see_counts_for_nothing():
    known, seen = np.full((32, 64), 16.0), np.zeros((32, 64), bool)
    labels = np.zeros((32, 64), int)
    rows = torch.from_numpy(
        np.stack(
            [
                pack_pair(known, seen, labels, 2),
                pack_pair(known, seen, labels, 2),
                pack_pair(0 * known, seen, labels, 2),  # no disparity is known
                pack_pair(known, ~seen, labels, 2),  # none is seen by both
            ]
        )
    )
    disparity = torch.tensor([1.0, 2.0, 0.0, 1.0])[:, None, None].expand(4, 2, 4)  # of 16 pixels
    outputs = FirstExit(disparity, disparity, torch.zeros(4, 2, 2, 4))
    task, truth = Stereo(), unpack_pair(rows)
    assert task.judged(truth).tolist() == [True, True, False, False]
    assert task.right(outputs, truth).tolist() == [True, False, False, False]
    assert task.metrics(outputs, rows)["accuracy"] == 1 / 2
    last = FirstExit(*(each[2:] for each in outputs))
    assert task.metrics(last, rows[2:])["accuracy"] == 0


def test_a_picture_without_a_keypoint_in_its_crop_is_not_right():
    pose, camera = Pose(np.eye(3), np.array([0, 0, 1.0])), Camera(100.0, 100.0, 32.0, 32.0)
    places = np.random.default_rng(0).uniform(0, 64, (8, 2))
    masks = np.zeros((2, 4, 4), bool)
    rows = [
        pack_pose(pose, camera, crop, False, places, masks) for crop in ((0, 0, 64), (500, 0, 64))
    ]
    truth = unpack_pose(torch.from_numpy(np.stack(rows)))
    wanted = codes(truth, 5)
    assert wanted.inside.sum(dim=1).tolist() == [8, 0]
    outputs = PoseCodes(
        20 * wanted.inside[:, None] - 10,
        20 * wanted.x - 10,
        20 * wanted.y - 10,
        torch.zeros(2, 2, 4, 4),
        torch.zeros(2, 8, 3),
        torch.zeros(2, 2, 8),
    )
    task = PoseTask()
    assert task.right(outputs, truth).tolist() == [True, False]
    assert not isinstance(task, Judges)  # its pose can't be found, and counts as wrong


def test_a_pruned_gaussian_counts_for_nothing():
    scene, kept = generate("torus", 12), np.arange(12) < 8
    labels = make_labels(scene, scene.positions, np.ones(12), kept, 0.0)
    known = Labels(labels)
    outputs = known.attributes.clone()
    outputs[:2] += known.deviations[:2]  # two that are kept are wrong
    task = Splats()
    assert task.right(outputs, labels).tolist() == [False] * 2 + [True] * 6 + [False] * 4
    assert task.judged(labels).tolist() == kept.tolist()
    assert task.metrics(outputs, labels)["accuracy"] == pytest.approx(6 / 8)


def test_an_image_of_no_class_is_right_where_none_is_found():
    """That it has none is its label, so that it is judged."""
    labels = torch.tensor([[0, 0], [0, 0], [1, 0]])
    outputs = torch.tensor([[-5.0, -5.0], [5.0, -5.0], [5.0, -5.0]])
    assert not isinstance(MultiLabel(), Judges)
    assert MultiLabel().metrics(outputs, labels)["accuracy"] == pytest.approx(2 / 3)


def test_accuracies_of_training_and_under_attack_leave_out_what_is_not_judged(tmp_path):
    config = TrainConfig(
        data=DataConfig(limit=60),
        model=ModelConfig(options=TINY, recursion_steps=1),
        task=EvenDigits.name,
        epochs=1,
        batch_size=20,
        threads=1,
        progress="quiet",
    )
    train(replace(config, run=tmp_path / "run"))
    assert RunFolder(tmp_path / "run").read_metrics()[0]["train_accuracy"] == 1
    images, labels = torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 5, 7])
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    split, normalize = Split(images, torch.arange(6), labels), Normalize([0.0], [1.0])
    found = [
        accuracy_under_attack(model, part, normalize, PGD(steps=1), batch_size=4, task=EvenDigits())
        for part in (split, split.take(torch.tensor([1, 3])))
    ]
    assert found == [1, 0]
