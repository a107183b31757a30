"""Distillation: its losses, its place around any objective, and runs with a teacher."""

import json
from dataclasses import replace

import pytest
import torch
from run_helpers import StopAt, assert_same_run
from torch import nn
from torch.nn import functional as F

from smallfry.deploy.pretrained import load_trained, save_pretrained
from smallfry.errors import DataError, RunError, Stopped, UsageError
from smallfry.tasks import Batch
from smallfry.tasks.classification import ClassTargets
from smallfry.training.augment import Normalize
from smallfry.training.build_objective import build_objective
from smallfry.training.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from smallfry.training.distillation import (
    Distilled,
    Teacher,
    logit_distance,
    similarity_distance,
)
from smallfry.training.distillation_config import DistillationConfig
from smallfry.training.run import TrainedModel, load_run
from smallfry.training.train import resume, train
from smallfry.transforms import ModelSpec, build

SMALL = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}


def model(seed, width=16):
    torch.manual_seed(seed)
    options = {**SMALL, "embed_dim": width, "num_classes": 3, "drop_rate": 0.0}
    return build(ModelSpec("vitrm_micro_patch4_8", options)).train()


def teacher(seed=1, mean=0.5, std=0.2, ours=(0.5, 0.2), width=16, precision="32-true"):
    trained = TrainedModel(model(seed, width), ("a", "b", "c"), 8, 1, Normalize([mean], [std]), {})
    return Teacher(trained, Normalize([ours[0]], [ours[1]]), precision)


def test_a_teacher_has_the_precision_of_a_mixed_training():
    taught, images = teacher(), batch().inputs
    exact, exact_features = taught(images)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert taught(images)[0].dtype == torch.float32  # its own, whatever is around it
    logits, features = teacher(precision="bf16-mixed")(images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, atol=0.05, rtol=0.05)
    assert not torch.equal(logits.float(), exact)
    torch.testing.assert_close(features.float(), exact_features, atol=0.05, rtol=0.05)


def batch():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 1])
    return Batch(torch.randn(4, 1, 8, 8), ClassTargets(labels, torch.eye(3)[labels]))


def objective(name, student, supervision_steps=2):
    steps = None if name == "cross_entropy" else supervision_steps
    config = ObjectiveConfig(name, supervision_steps=steps)
    return build_objective(config, student)


def test_the_distance_of_logits_is_that_of_soft_labels():
    torch.manual_seed(0)
    one, other = torch.randn(2, 5, 4, dtype=torch.float64)
    one.requires_grad_()
    for temperature in (1.0, 4.0):
        soft = (other / temperature).softmax(1)
        entropy = -(soft * soft.log()).sum(1).mean()
        cross = F.cross_entropy(one / temperature, soft)
        expected = temperature**2 * (cross - entropy)
        found = logit_distance(one, other, temperature)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        (gradient,) = torch.autograd.grad(found, one)
        by_hand = temperature * ((one / temperature).softmax(1) - soft) / 5
        torch.testing.assert_close(gradient, by_hand, atol=1e-12, rtol=1e-12)
    assert logit_distance(other, other, 3.0).abs() < 1e-12


def test_the_distance_of_similarities_ignores_widths_rotations_and_scale():
    torch.manual_seed(0)
    features = torch.randn(6, 8, dtype=torch.float64)
    turned = features @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    padded = F.pad(3 * turned, (0, 5))
    assert similarity_distance(features, padded) < 1e-20
    assert similarity_distance(features, torch.randn(6, 3, dtype=torch.float64)) > 1e-3


@pytest.mark.parametrize("name", ["cross_entropy", "deep_supervision"])
def test_every_step_has_the_share_of_the_teacher(name):
    student, config = model(0), DistillationConfig("T", 0.3, 2.0, features=0.7)
    plain, wrapped = (
        objective(name, student),
        Distilled(objective(name, student), teacher(), config),
    )
    assert wrapped.supervision_steps == plain.supervision_steps
    assert wrapped.likelihood == plain.likelihood
    assert wrapped.task == plain.task
    assert wrapped.halt_threshold == plain.halt_threshold
    student_features = []
    student.get_classifier().register_forward_pre_hook(
        lambda _, inputs: student_features.append(inputs[0])
    )
    expected = list(plain(plain.prepare(student), batch()))
    apart = student_features[:]
    found = list(wrapped(wrapped.prepare(student), batch()))
    logits, features = teacher()(batch().inputs)
    assert len(found) == len(expected)
    calls = len(apart) // len(expected)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours.outputs, theirs.outputs)
        own = apart[(number + 1) * calls - 1]
        total = 0.7 * theirs.loss + 0.3 * logit_distance(theirs.outputs, logits, 2.0)
        total = total + 0.7 * similarity_distance(own, features)
        torch.testing.assert_close(ours.loss, total)
        assert ours.loss.requires_grad


def test_the_teacher_takes_images_as_it_was_trained_on_them():
    pixels = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    theirs, ours = Normalize([0.1], [0.5]), Normalize([0.4], [0.3])
    answer, _ = teacher(mean=0.1, std=0.5, ours=(0.4, 0.3))(ours(pixels))
    torch.testing.assert_close(answer, model(1).eval()(theirs(pixels)), atol=1e-5, rtol=1e-5)


def test_a_student_of_another_width_and_an_average_of_it_leave_no_features_behind():
    student = model(0)
    wrapped = Distilled(
        objective("cross_entropy", student),
        teacher(width=32),
        DistillationConfig("T", features=1.0),
    )
    prepared = wrapped.prepare(student)
    (step,) = wrapped(prepared, batch())
    step.loss.backward()
    assert student.get_classifier().weight.grad is not None
    student.eval()(batch().inputs)
    assert wrapped._features == []


def test_a_model_without_a_classifier_is_refused():
    wrapped = Distilled(
        objective("cross_entropy", model(0)), teacher(), DistillationConfig("T", features=1.0)
    )
    with pytest.raises(UsageError, match="get_classifier"):
        wrapped.prepare(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, "0 to 1"),
        ({"temperature": 0.0}, "positive"),
        ({"features": -1.0}, "0 or more"),
        ({"weight": "much"}, "must be a number"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        DistillationConfig(**settings)


# Runs


@pytest.fixture
def taught(variant, tmp_path):
    train(variant(run=tmp_path / "teacher", epochs=1))
    config = DistillationConfig(str(tmp_path / "teacher"), 0.5, 2.0, features=0.1)
    return lambda **changes: variant(**{"distillation": config, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"objective": ObjectiveConfig("slots", supervision_steps=2)}],
    ids=["deep supervision", "slots"],
)
def test_a_distilled_run_resumes_to_the_bit(taught, tmp_path, settings):
    train(taught(run=tmp_path / "whole", **settings))
    with pytest.raises(Stopped):
        train(taught(run=tmp_path / "parted", **settings), StopAt(7))
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
    manifest = json.loads((tmp_path / "whole/best/manifest.json").read_text())
    assert manifest["teacher"]["model"] == "vitrm_micro_patch4_8"
    assert str(tmp_path) not in json.dumps(manifest)


def test_the_teacher_stays_and_the_student_comes_near(taught, tmp_path):
    before = load_run(tmp_path / "teacher").model.state_dict()
    config = taught().distillation
    same = {"optimizer": OptimizerConfig("adamw", lr=3e-3), "epochs": 4}
    distances = {}
    for weight in (0.0, 1.0):
        run = tmp_path / f"at{weight}"
        train(taught(run=run, distillation=replace(config, weight=weight, features=0.0), **same))
        torch.manual_seed(0)
        images = torch.randn(64, 1, 8, 8)
        logits = [load_run(each).model(images) for each in (run, tmp_path / "teacher")]
        distances[weight] = float(logit_distance(*logits, 2.0).detach())
    assert distances[1.0] < distances[0.0]
    for name, tensor in load_run(tmp_path / "teacher").model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_natural_gradient_is_distilled_too(taught):
    train(taught(optimizer=OptimizerConfig("kfac"), epochs=1))


def test_a_teacher_that_changed_is_refused_on_resuming(taught, variant, tmp_path):
    with pytest.raises(Stopped):
        train(taught(), StopAt(3))
    train(variant(run=tmp_path / "other", epochs=1, seed=5))
    (tmp_path / "teacher").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "teacher")
    with pytest.raises(RunError, match="teacher's weights are not those"):
        resume(taught().run)


def test_teachers_that_do_not_fit_are_refused_before_the_training(taught, variant, tmp_path):
    config = taught().distillation
    wrong = (
        (
            {
                "data": replace(variant().data, image_size=16),
                "model": ModelConfig("vitrm_micro_patch4_8"),
            },
            UsageError,
            "1×8×8",
        ),
        ({"distillation": replace(config, teacher=str(tmp_path / "none"))}, RunError, "none"),
    )
    for settings, kind, message in wrong:
        with pytest.raises(kind, match=message):
            train(taught(**settings))
        assert not variant().run.exists()


def test_teachers_of_other_classes_are_refused(taught, tmp_path, monkeypatch):
    file = tmp_path / "teacher/best/manifest.json"
    content = json.loads(file.read_text())
    content["classes"] = [f"other {name}" for name in content["classes"]]
    file.write_text(json.dumps(content))
    with pytest.raises((DataError, RunError)):
        train(taught())


def test_a_shared_student_names_its_teacher(taught, tmp_path):
    train(taught(run=tmp_path / "student", epochs=1))
    save_pretrained(tmp_path / "student", tmp_path / "shared")
    teacher = json.loads((tmp_path / "shared" / "config.json").read_text())["smallfry"]["teacher"]
    assert teacher["name"] == "teacher"
    row = f"| distilled from | `teacher`, weights `{teacher['weights_sha256'][:16]}` |"
    assert row in (tmp_path / "shared" / "README.md").read_text()
    assert load_trained(tmp_path / "shared").manifest["teacher"] == teacher
