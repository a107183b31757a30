"""Self-tuning beside closed forms, finite differences and plain training."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.__main__ import main
from smallfry.errors import UsageError
from smallfry.tasks import Batch
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.adversarial import Adversarial
from smallfry.training.attack import PGD
from smallfry.training.augment import Normalize
from smallfry.training.config import TrainConfig
from smallfry.training.hyper_parameters import (
    TUNABLE,
    find_hypers,
    from_unconstrained,
    to_unconstrained,
)
from smallfry.training.objective import Supervised
from smallfry.training.run import load_run
from smallfry.training.self_tuning import SelfTuned, entropy_of, transform
from smallfry.training.train import train

ALL = tuple(TUNABLE.values())
SHARED = {"references": False, "progress": "quiet", "threads": 1}


class Squares:
    """Task of the mean squared error."""

    name, likelihood = "regression", "gaussian"

    def loss(self, outputs, targets):
        return (outputs - targets).square().mean()


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.Tanh(),
        nn.Dropout(0.0),
        nn.Linear(16, 10),
    ).double()


def batch_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (count,), generator=generator)
    return Batch(images, ClassTargets(labels, F.one_hot(labels, 10).double()))


def tuned(model, hypers=ALL, warmup=0, **settings):
    found = SelfTuned(
        Supervised(Classification()),
        hypers,
        lambda step: batch_of(32, 100 + step),
        warmup,
        **settings,
    )
    found.raw.data = found.raw.data.double()
    found.raw_scale.data = found.raw_scale.data.double()
    found.prepare(model)
    return found


def randomize(objective):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for each in objective.responses.parameters():
            each.copy_(0.3 * torch.randn(each.shape, generator=generator, dtype=torch.float64))


# Ranges


@pytest.mark.parametrize(
    ("low", "high", "value", "expected"),  # of the specification's golden file
    [
        (0, 0.95, 0.05, -2.8903717578961645),
        (2, 24, 4.0, -2.3025850929940455),
        (0, 5, 1.0, -1.3862943611198906),
    ],
)
def test_ranges_have_the_published_map(low, high, value, expected):
    assert to_unconstrained(value, low, high) == pytest.approx(expected, abs=1e-12)
    assert from_unconstrained(expected, low, high) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("hyper", ALL, ids=lambda hyper: hyper.name)
def test_values_come_from_real_numbers_and_stay_in_their_range(hyper):
    raw = torch.tensor([hyper.unconstrained(), -5.0, 5.0], dtype=torch.float64)
    first, low, high = hyper.value(raw).tolist()
    assert first == pytest.approx(hyper.start, rel=1e-12)
    assert hyper.low < low < high < hyper.high
    expected = from_unconstrained(-5.0, hyper.low, hyper.high, hyper.log)
    assert low == pytest.approx(expected, rel=1e-12)


def test_the_entropy_has_the_published_value():
    raw = torch.tensor([0.5, 1.0], dtype=torch.float64).expm1().log()
    assert entropy_of(raw).item() == pytest.approx(2.1447298858494, abs=1e-12)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["lr"], "can't tune lr: the best weights do not depend on it"),
        (["depth"], "can't tune depth: it changes the shapes"),
        (["droput"], "did you mean 'dropout'"),
        (["noise", "noise"], "noise twice"),
        ([{"dropout": 0.97}], "dropout starts between 0 and 0.95, not at 0.97"),
        ([{"dropout": "much"}], "dropout starts between"),
        ([{"dropout": 0.1, "noise": 0.1}], "expected NAME or NAME: START"),
    ],
)
def test_what_cannot_be_tuned_is_refused_by_name(entries, message):
    with pytest.raises(UsageError, match=message):
        find_hypers(entries)
    with pytest.raises(UsageError, match=message):
        TrainConfig(self_tune=entries)


# The network with its gates


def test_at_the_hyper_parameters_the_network_is_the_ordinary_one():
    model = network()
    plain, batch = copy.deepcopy(model), batch_of(6)
    objective = tuned(model)
    randomize(objective)
    zero = torch.zeros(6, len(ALL), dtype=torch.float64)
    expected = plain(batch.inputs)
    assert torch.equal(model(batch.inputs), expected)
    torch.testing.assert_close(objective.gated(batch.inputs, zero), expected)
    torch.testing.assert_close(objective.linearised(batch.inputs, zero), expected)
    assert {*model.state_dict()} == {*plain.state_dict()}


def test_the_linearised_network_has_the_derivative_of_finite_differences():
    model, batch = network(), batch_of(6)
    objective = tuned(model)
    randomize(objective)
    gates = torch.randn(6, len(ALL), dtype=torch.float64)
    change = objective.linearised(batch.inputs, gates) - model(batch.inputs)
    h = 1e-5
    ahead, behind = (objective.gated(batch.inputs, sign * h * gates) for sign in (1, -1))
    torch.testing.assert_close(change, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


def test_a_training_step_without_tuning_is_the_plain_one_with_these_hyper_parameters():
    model, batch = network(), batch_of(6)
    hypers = find_hypers([{"weight_decay": 0.3}, {"label_smoothing": 0.2}])
    objective = tuned(model, hypers, warmup=10)
    loss = next(iter(objective(model, batch))).loss
    outputs = model(batch.inputs)
    expected = F.cross_entropy(outputs, batch.targets.labels, label_smoothing=0.2)
    squares = sum(model[number].weight.square().sum() for number in (0, 4, 7))
    torch.testing.assert_close(loss, expected + 0.3 * squares / 2)


def test_dropout_augmentation_and_noise_act_by_their_own_strength():
    model, batch = network(), batch_of(400)
    objective = tuned(model, find_hypers([{"dropout": 0.5}]), warmup=10)
    kept = []
    model[7].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0] != 0))
    next(iter(objective(model, batch)))
    assert float(kept[0].double().mean()) == pytest.approx(0.5, abs=0.03)
    images = batch.inputs.float()
    still = transform(images, torch.zeros(400))
    torch.testing.assert_close(still, images, atol=1e-5, rtol=1e-4)
    strength = torch.linspace(0, 1, 400)
    distance = (transform(images, strength) - images).square().mean((1, 2, 3))
    assert float(distance[:40].mean()) < 0.2 * float(distance[-200:].mean())
    noisy = tuned(network(), find_hypers([{"noise": 1.0}]), warmup=10)
    raw = noisy.raw.detach().expand(400, -1)
    change = noisy._changed(batch, raw).inputs - batch.inputs
    assert float(change.std()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("places", [True, False])
def test_a_network_in_evaluation_drops_nothing(places):
    body = [nn.Flatten(), nn.Linear(64, 16, dtype=torch.float64), nn.Tanh()]
    model = nn.Sequential(*body, nn.Dropout(0.0), nn.Linear(16, 10, dtype=torch.float64))
    if not places:
        model = nn.Sequential(*body, nn.Linear(16, 10, dtype=torch.float64))
        model.get_classifier = lambda: model[-1]
    attacked = Adversarial(Supervised(Classification()), PGD(0.1, None, 3), Normalize([0.0], [1.0]))
    found = SelfTuned(attacked, find_hypers([{"dropout": 0.5}]), batch_of, 99)
    prepared, seen = found.prepare(model), []
    model[-1].register_forward_hook(
        lambda layer, inputs, _: seen.append((layer.training, bool((inputs[0] == 0).any())))
    )
    model.train()
    next(found(prepared, batch_of(8)))
    assert {dropped for training, dropped in seen if not training} == {False}  # while it attacks
    assert {dropped for training, dropped in seen if training} == {True}


def test_the_steps_of_response_and_hyper_parameters_leave_the_network_alone():
    model, batch = network(), batch_of(16)
    objective = tuned(model)
    before = copy.deepcopy(model.state_dict())
    values = objective.raw.detach().clone()
    weights = [each.detach().clone() for each in objective.responses.parameters()]
    objective._step_responses(batch)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights, objective.responses.parameters(), strict=True)
    )
    assert torch.equal(values, objective.raw)
    objective._step_responses(batch)
    objective._step_hypers(batch_of(16, 1))
    assert bool((values != objective.raw).all())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.slow
def test_the_weight_decay_of_a_ridge_regression_reaches_the_closed_form_optimum():
    generator = torch.Generator().manual_seed(4)

    def draw(count):
        x = torch.randn(count, 20, generator=generator, dtype=torch.float64)
        noise = 2 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
        return x, x @ truth + noise

    truth = 0.4 * torch.randn(20, 1, generator=generator, dtype=torch.float64)
    (x, y), (u, v) = draw(40), draw(400)

    def validation_loss(weight):
        return (u @ weight - v).square().mean().item()

    def solved(decay):
        count = len(x)
        return torch.linalg.solve(
            2 / count * x.T @ x + decay * torch.eye(20).double(), 2 / count * x.T @ y
        )

    losses = [validation_loss(solved(10**e)) for e in torch.linspace(-5, 0, 401).tolist()]
    best = min(losses)
    model = nn.Linear(20, 1, bias=False).double()
    objective = SelfTuned(
        Supervised(Squares()), find_hypers([{"weight_decay": 1e-3}]), lambda step: Batch(u, v)
    )
    objective.raw.data, objective.raw_scale.data = (
        each.data.double() for each in (objective.raw, objective.raw_scale)
    )
    objective.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(0)
    for _ in range(2500):
        loss = next(iter(objective(model, Batch(x, y)))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 1.05 * best  # little decay is worse
    assert validation_loss(solved(1e-3)) > 1.05 * best
    decay = objective.values["weight_decay"]
    assert validation_loss(solved(decay)) < 1.02 * best
    assert validation_loss(model.weight.detach().T) < 1.02 * best


# Runs


MODEL = {"name": "plain_mlp", "options": {"embed_dim": 16}}


def tuning_run(folder, epochs, **settings):
    return TrainConfig(
        model=MODEL,
        self_tune=["dropout", {"label_smoothing": 0.1}],
        epochs=epochs,
        run=folder,
        seed=1,
        batch_size=64,
        **SHARED,
        **settings,
    )


def test_a_run_tunes_and_its_model_is_an_ordinary_one(tmp_path):
    train(tuning_run(tmp_path / "a", 6))
    rows = [json.loads(row) for row in (tmp_path / "a" / "self_tuning.jsonl").open()]
    assert [row["batch"] for row in rows] == [50, 100]
    assert rows[0]["label_smoothing"] != rows[1]["label_smoothing"]
    assert 0 < rows[1]["dropout"] < 0.95
    train(TrainConfig(model=MODEL, epochs=1, run=tmp_path / "plain", **SHARED))
    names = [{*load_run(tmp_path / name).model.state_dict()} for name in ("a", "plain")]
    assert names[0] == names[1]


def test_a_stopped_run_resumes_to_the_bit(tmp_path, capsys):
    own = tmp_path / "stop.py"
    own.write_text(
        "import os, signal\n"
        "class Stop:\n"
        "    def on_step(self, done):\n"
        "        if done.step == 61:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    whole = train(tuning_run(tmp_path / "whole", 6))
    arguments = ["--model", "plain_mlp", "--model.options", "{embed_dim: 16}", "--epochs", "6"]
    arguments += ["--self_tune", "[dropout, {label_smoothing: 0.1}]", "--seed", "1"]
    arguments += ["--batch_size", "64"]
    arguments += ["--references=false", "--progress", "quiet", "--threads", "1"]
    stopped = str(tmp_path / "stopped")
    code = ["--code", str(own), "--callbacks", "[stop:Stop]"]
    assert main(["train", *arguments, *code, "--run", stopped]) == 128 + 15
    assert main(["train", "--resume", stopped, "--callbacks", "[]"]) == 0
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["measured"]["test"] == whole["measured"]["test"]
    files = [tmp_path / name / "self_tuning.jsonl" for name in ("whole", "stopped")]
    assert files[0].read_text() == files[1].read_text()
    weights = [load_run(tmp_path / name).model.state_dict() for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vitrm_micro_patch4_8", "loopnet_70k"])
def test_recursive_models_and_models_with_batch_norms_tune(name, tmp_path):
    options = {"widths": [8, 8], "depths": [1, 1]} if name == "loopnet_70k" else {"depth": 1}
    config = TrainConfig(
        model={"name": name, "options": options},
        self_tune=["dropout", "weight_decay"],
        optimizer={"weight_decay": 0.0},
        data={"limit": 40},
        epochs=10,
        batch_size=64,
        run=tmp_path / "a",
        **SHARED,
    )
    summary = train(config)
    assert summary["measured"]["epochs"] == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "kfac"}, "self_tune calls the model beside the training step"),
        ({"self_tune": ["weight_decay"]}, "add --optimizer.weight_decay 0"),
        ({"objective": {"label_smoothing": 0.1}}, "leave out objective.label_smoothing"),
        ({"accumulate": 2}, "without compile and accumulate"),
    ],
)
def test_settings_that_do_not_go_with_tuning_are_refused(settings, message, tmp_path):
    given = {"self_tune": ["label_smoothing"], **settings}
    with pytest.raises(UsageError, match=message):
        train(TrainConfig(model=MODEL, epochs=1, run=tmp_path / "a", **given, **SHARED))
