"""Anchors of a teacher, cue tokens and the consistency of embeddings."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.compress.distill.anchors import (
    AnchorConsistency,
    AnchorSet,
    pooled_features,
    spherical_k_means,
)
from smallfry.errors import DataError, UsageError
from smallfry.layers.prefix_cues import PrefixCues
from smallfry.transforms import ModelSpec, build
from smallfry.transforms.cues import Cues

SPEC = ModelSpec("vitrm_micro_patch4_8", {"num_classes": 4, "embed_dim": 16, "num_heads": 2})


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def clusters(count=30):
    """Rows in three directions, with little noise."""
    centres = torch.eye(3, 5).double()
    return centres.repeat_interleave(count, 0) + 0.05 * torch.randn(3 * count, 5).double()


def test_clusters_are_found_with_centres_of_norm_one():
    rows = F.normalize(clusters(), dim=1)
    centres = spherical_k_means(rows, 3, seed=0)
    found = (rows @ centres.T).argmax(1).view(3, 30)
    assert (found == found[:, :1]).all()
    assert len(found[:, 0].unique()) == 3
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(3).double())
    means = torch.stack([F.normalize(part.mean(0), dim=0) for part in rows.view(3, 30, 5)])
    torch.testing.assert_close(centres[found[:, 0]], means, atol=1e-12, rtol=0)


def test_k_means_lowers_its_objective_and_survives_equal_rows():
    rows = F.normalize(torch.randn(200, 4).double(), dim=1)

    def spread(centres):
        return float((1 - (rows @ centres.T).amax(1)).sum())

    found = spherical_k_means(rows, 5, seed=1)
    for _ in range(20):
        other = rows[torch.randperm(200)[:5]]
        assert spread(found) < spread(other)
    same = torch.ones(4, 2).double() / 2**0.5
    assert bool(spherical_k_means(same, 3, seed=0).isfinite().all())


def test_anchors_are_deterministic_and_their_file_holds_all(tmp_path):
    rows = clusters()
    first, again = (AnchorSet.from_features(rows, 3, seed=2) for _ in range(2))
    first.save(tmp_path / "one")
    again.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    for tensor, expected in zip(AnchorSet.load(tmp_path / "one"), first, strict=True):
        assert torch.equal(tensor, expected)
    centred = F.normalize(rows - rows.mean(0), dim=1)
    expected = (centred @ first.centres.double().T / 0.1).softmax(1)
    torch.testing.assert_close(first.assignments.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.similarities, first.centres @ first.centres.T)


def test_scale_and_origin_of_the_features_do_not_matter():
    rows = clusters()
    one, other = AnchorSet.from_features(rows, 3), AnchorSet.from_features(4 * rows + 7, 3)
    torch.testing.assert_close(one.assignments, other.assignments, atol=1e-5, rtol=0)


def test_a_teacher_gives_the_inputs_of_its_classifier():
    teacher = timm.create_model("loopnet_70k").eval()
    images = torch.rand(6, 3, 32, 32)
    features = pooled_features(teacher.train(), [images[:4], images[4:]])
    assert teacher.training
    teacher.eval()
    expected = teacher.head(features) * teacher.logit_scale
    torch.testing.assert_close(expected, teacher(images), atol=1e-5, rtol=1e-4)
    assert AnchorSet.from_teacher(teacher, [images], k=2).centres.shape == (2, 48)


def test_cues_of_zero_are_constant_tokens_and_nothing_else():
    plain, cued = build(SPEC), build(SPEC.then(Cues(anchors=5, tokens=3)))
    cued.load_state_dict(plain.state_dict(), strict=False)
    nn.init.zeros_(cued.cues.project.weight)
    images = torch.rand(2, 1, 8, 8)
    own = plain.embed
    plain.embed = lambda images: torch.cat([own(images), torch.zeros(len(images), 3, 16)], 1)
    with torch.no_grad():
        assert torch.equal(cued(images), plain(images))


@pytest.mark.slow
def test_a_cued_model_is_rebuilt_and_traced():
    spec = SPEC.then(Cues(anchors=5))
    model, images = build(spec), torch.rand(2, 1, 8, 8)
    again = build(ModelSpec.from_dict(spec.to_dict()), model.state_dict())
    assert torch.equal(again(images), model(images))
    program = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(program(images), model(images))
    torch.testing.assert_close(model.recurse(images)[-1].logits, model(images))


def test_half_of_the_images_get_the_teachers_assignment_and_the_guess_learns_it():
    cues = PrefixCues(width=6, anchors=4, tokens=2)
    tokens, given = torch.rand(400, 3, 6), F.one_hot(torch.arange(400) % 4, 4).float()
    guessed = cues(tokens)
    with cues.given(given):
        mixed = cues(tokens)
        loss = cues.guess_loss()
    taught = cues.project(given).view(400, 2, 6)
    is_taught = (mixed[:, 3:] - taught).abs().amax((1, 2)) < 1e-6
    torch.testing.assert_close(mixed[~is_taught], guessed[~is_taught])
    assert 150 < int(is_taught.sum()) < 250
    logits = cues.guess(tokens.mean(1)) / 0.1
    torch.testing.assert_close(loss, F.cross_entropy(logits, given))
    loss.backward()
    assert cues.guess.weight.grad is not None
    with pytest.raises(RuntimeError, match="inside given"):
        cues.guess_loss()
    assert torch.equal(cues(tokens), guessed)  # inference needs no teacher


def test_consistency_is_zero_for_the_teachers_geometry_and_falls_with_training():
    rows = clusters()
    anchors = AnchorSet.from_features(rows, 3)
    hard = F.one_hot(anchors.assignments.argmax(1), 3).double()
    means = torch.stack([rows[hard[:, i] > 0].mean(0) for i in range(3)])
    own = F.normalize(means - rows.mean(0), dim=1)
    same = AnchorConsistency(own @ own.T)
    assert float(same(rows, hard)) < 1e-20
    student = nn.Linear(5, 4).double()
    loss = AnchorConsistency(anchors.similarities.double(), keep=0.5)
    optimizer = torch.optim.Adam(student.parameters(), 0.03)
    losses = []
    for _ in range(60):
        value = loss(student(rows), hard)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_student_anchors_are_running_means():
    loss, (a, b) = AnchorConsistency(torch.eye(2), keep=0.5), torch.randn(2, 4, 3).unbind()
    each = F.one_hot(torch.tensor([0, 1, 0, 1]), 2).float()
    loss(a, each)
    value = loss(b, each)
    means = (0.5 * each.T @ a + each.T @ b) / 3
    rows = F.normalize(means - means.mean(0), dim=1)
    torch.testing.assert_close(value, (rows @ rows.T - torch.eye(2)).square().mean())


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UsageError, match="4 anchors of 3 images"):
        AnchorSet.from_features(torch.randn(3, 2), 4)
    with pytest.raises(UsageError, match="same for all images"):
        AnchorSet.from_features(torch.ones(3, 2), 2)
    with pytest.raises(UsageError, match="forward_features"):
        pooled_features(nn.Linear(1, 1), [])
    (tmp_path / "file").write_bytes(b"no")
    for name in ("file", "missing"):
        with pytest.raises(DataError, match="no file of anchors"):
            AnchorSet.load(tmp_path / name)
    wrong = AnchorSet(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(5, 3))
    wrong.save(tmp_path / "wrong")
    with pytest.raises(DataError, match="different numbers"):
        AnchorSet.load(tmp_path / "wrong")
    with pytest.raises(ValueError, match="no place for cues"):
        Cues(4).apply(timm.create_model("loopnet_70k"))
    for sizes in ({"anchors": 0}, {"anchors": 4, "tokens": 1.5}):
        with pytest.raises(ValueError, match="is a number from 1"):
            Cues(**sizes)
