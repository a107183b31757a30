"""Attacks on pixels, and training against them."""

import pytest
import torch
from run_helpers import StopAt, assert_same_run
from torch import nn
from torch.nn import functional as F

from smallfry.cli import main
from smallfry.errors import Stopped, UsageError
from smallfry.tasks import Batch
from smallfry.tasks.classification import ClassTargets
from smallfry.training.adversarial import Adversarial
from smallfry.training.adversarial_config import AdversarialConfig
from smallfry.training.attack import PGD, parse_eps
from smallfry.training.augment import Normalize
from smallfry.training.build_objective import build_objective
from smallfry.training.config import ObjectiveConfig, OptimizerConfig
from smallfry.training.train import resume, train

NORMALIZE = Normalize([0.3, 0.5, 0.6], [0.2, 0.3, 0.25])


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )


def images():
    return torch.randint(256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(1)).byte()


def pixels(inputs):
    return (inputs - NORMALIZE.shift) / NORMALIZE.scale / 255


@pytest.mark.parametrize(("eps", "step"), [(8 / 255, None), (0.3, 0.05), (0.0, None)])
def test_an_attack_stays_in_its_ball_and_among_pixels(eps, step):
    model, labels = net().eval(), torch.randint(4, (16,))
    inputs = NORMALIZE(images())

    def loss(x):
        return F.cross_entropy(model(x), labels)

    attacked = PGD(eps, step, 5)(inputs, loss, NORMALIZE)
    changes = (pixels(attacked) - pixels(inputs)).abs()
    assert changes.max() <= eps + 1e-5
    assert pixels(attacked).min() >= -1e-5
    assert pixels(attacked).max() <= 1 + 1e-5
    assert not attacked.requires_grad
    assert (changes.max() > 0.9 * eps) or eps == 0


def test_an_attack_raises_the_loss_more_than_noise_and_more_steps_raise_it_further():
    model, labels = net().eval(), torch.randint(4, (16,))
    inputs = NORMALIZE(images())

    def loss(x):
        return F.cross_entropy(model(x), labels)

    def after(steps):
        generator = torch.Generator().manual_seed(0)
        return float(loss(PGD(8 / 255, steps=steps)(inputs, loss, NORMALIZE, generator)).detach())

    assert after(20) > after(2) > after(0)
    assert all(p.grad is None for p in model.parameters())


def test_a_linear_model_is_attacked_at_the_corner_of_the_ball():
    weight = torch.randn(3, 8, 8)
    inputs = NORMALIZE(torch.full((1, 3, 8, 8), 128).byte())
    attacked = PGD(0.1, 0.05, 10)(inputs, lambda x: (x * weight).sum(), NORMALIZE)
    torch.testing.assert_close(
        pixels(attacked)[0], 128 / 255 + 0.1 * weight.sign(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("0", 0.0)])
def test_largest_changes_are_read_as_fractions(text, value):
    assert parse_eps(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["8", "-1/255", "much", "1/0", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError, match="such as 8/255"):
        parse_eps(text)


@pytest.mark.parametrize("settings", [{"eps": 2.0}, {"step": 0.0}, {"steps": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UsageError, match=r"adversarial\."):
        AdversarialConfig(**settings)


def test_the_objective_trains_on_attacked_images_and_norms_do_not_take_the_attack():
    model, labels = net().train(), torch.randint(4, (16,))
    batch = Batch(NORMALIZE(images()), ClassTargets(labels, torch.eye(4)[labels]))
    plain = build_objective(ObjectiveConfig("cross_entropy"), model)
    wrapped = Adversarial(plain, PGD(0.1, steps=3), NORMALIZE)
    prepared, before = wrapped.prepare(model), model[1].num_batches_tracked.clone()
    seen = []
    model[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    (step,) = wrapped(prepared, batch)
    assert model.training
    assert model[1].num_batches_tracked == before + 1
    assert len(seen) == 1
    change = (pixels(seen[0]) - pixels(batch.inputs)).abs().max()
    assert 0.05 < change <= 0.1 + 1e-5
    assert step.loss.requires_grad


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"optimizer": OptimizerConfig("kfac")}, marks=pytest.mark.slow)]
)
def test_an_adversarial_run_resumes_to_the_bit(variant, tmp_path, settings):
    attack = AdversarialConfig(0.1, steps=2)
    train(variant(run=tmp_path / "whole", adversarial=attack, **settings))
    with pytest.raises(Stopped):
        train(variant(run=tmp_path / "parted", adversarial=attack, **settings), StopAt(7))
    resume(tmp_path / "parted")
    assert_same_run(tmp_path / "whole", tmp_path / "parted")


def test_a_run_is_evaluated_under_attack(variant, capsys):
    import json

    train(variant(epochs=1))
    run = str(variant().run)
    found = {}
    for eps in ("0", "64/255"):
        words = ["evaluate", run, "--attack", "pgd", "--eps", eps, "--attack_steps", "5", "--json"]
        assert main(words) == 0
        found[eps] = json.loads(capsys.readouterr().out)
    assert found["0"]["accuracy_under_attack"] == pytest.approx(found["0"]["accuracy"])
    assert found["64/255"]["accuracy_under_attack"] < found["64/255"]["accuracy"]
    assert main(["evaluate", run, "--attack", "pgd", "--eps", "9"]) == 2
    assert "such as 8/255" in capsys.readouterr().err
    attack, run_ = ["--attack", "pgd"], ["evaluate", run]
    for words, said in (
        (["--eps", "1/255"], "eps is of an attack: add --attack pgd"),
        (["--attack_steps", "3"], "attack_steps is of an attack: add --attack pgd"),
        ([*attack, "--flips"], "an attack is of the plain model, without flips"),
        ([*attack, "--exit_steps", "2"], "an attack is of the plain model, without exit_steps"),
        (["--flips", "--by_step"], "the scores by step are without flips"),
        (["--submodels", "--flips"], "submodels are measured without flips"),
        (["--submodels", "--split", "train"], "submodels are measured without split"),
    ):
        assert main([*run_, *words]) == 2
        assert said in capsys.readouterr().err


def test_flips_are_of_tasks_that_hold_for_mirrored_images(tmp_path, capsys):
    words = ["train", "--task", "eeg", "--epochs", "1", "--run", str(tmp_path / "run")]
    options = ["--data.options", "{subjects: 3, windows: 24}", "--progress", "quiet"]
    assert main([*words, *options]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--flips"]) == 2
    assert "the outputs of eeg do not hold for mirrored images" in capsys.readouterr().err
