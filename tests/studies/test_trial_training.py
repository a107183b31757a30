"""A trial under a clock of the test, against the same training written out."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smallfry.studies import latency, problems, trial
from smallfry.studies.latency import choose_device, measure_latency
from smallfry.studies.problems import PROBLEMS, Examples, Problem, load_examples
from smallfry.studies.trial import EVALUATIONS, TUNING_EVALUATIONS, Job, Resources, run_trial

TINY = Problem(
    "tiny", "digits", 0.25, lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 8,
    "categorical", F.cross_entropy, 1.0, whiten=True, reconstruct=False,
)  # fmt: skip


def examples(images, seed):
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (images, 1, 2, 2), generator=draw, dtype=torch.uint8)
    return Examples(pixels, torch.randint(3, (images,), generator=draw), 0.5, 0.3)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock on which every step takes a second."""
    monkeypatch.setitem(PROBLEMS, "tiny", TINY)
    ticks = count()
    monkeypatch.setattr(Resources, "now", lambda self: float(next(ticks)))


def job(phase="defaults", seconds=10.0, seed=3, **settings):
    return Job(phase, "tiny", "sgd", settings or {"lr": 0.1}, seed, 0, seconds)


def by_hand(training, held_out, steps, lr, seed=3, batch=8):
    """Losses of both splits after each number of steps."""
    torch.manual_seed(seed)
    model = TINY.build()
    draw = torch.Generator().manual_seed(seed)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    rows, found = [], {}
    for step in range(max(steps) + 1):
        if step in steps:
            with torch.no_grad():
                losses = [
                    F.cross_entropy(model((e.pixels / 255 - 0.5) / 0.3), e.labels).item()
                    for e in (training, held_out)
                ]
            found[step] = losses
        if not rows:
            order = torch.randperm(len(training.pixels), generator=draw)
            rows = list(torch.split(order, batch))
            rows = [each for each in rows if len(each) == min(batch, len(order))]
        chosen = rows.pop(0)
        inputs = (training.pixels[chosen] / 255 - 0.5) / 0.3
        loss = F.cross_entropy(model(inputs), training.labels[chosen])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, gradient, v in zip(model.parameters(), gradients, velocity, strict=True):
            v.mul_(0.9).add_(gradient)
            parameter.data -= lr * (gradient + 0.9 * v)  # Nesterov's
    return found


@pytest.mark.parametrize(
    ("phase", "evaluations"), [("tuning", TUNING_EVALUATIONS), ("tuned", EVALUATIONS)]
)
def test_points_are_the_losses_of_a_training_written_out(phase, evaluations):
    training, held_out = examples(27, 0), examples(13, 1)
    found = run_trial(job(phase), Resources(), training, held_out)
    points = found["points"]
    due = [10.0 * (i / evaluations) ** 1.5 for i in range(evaluations + 1)]
    assert [point["step"] for point in points] == [int(np.ceil(each - 1e-9)) for each in due]
    assert [point["seconds"] for point in points] == [point["step"] for point in points]
    expected = by_hand(training, held_out, {point["step"] for point in points}, 0.1)
    for point in points:
        assert point["epoch"] == pytest.approx(point["step"] * 8 / 27)
        assert [point["train"], point["validation"]] == pytest.approx(
            expected[point["step"]], rel=1e-4
        )
        assert point["wall_seconds"] >= 0
    assert (found["steps"], found["diverged"]) == (10, False)
    assert (found["plain_ms"], found["refresh_ms"], found["mean_ms"]) == (1000, None, 1000)
    assert found["state_over_weights"] == pytest.approx(1)  # the velocity
    assert "energy" not in found


def test_an_epoch_of_fewer_images_than_a_batch_is_one_step():
    training = examples(5, 0)
    points = run_trial(job(seconds=4.0), Resources(), training, examples(3, 1))["points"]
    assert [point["epoch"] for point in points] == [point["step"] for point in points]
    expected = by_hand(training, examples(3, 1), {4}, 0.1)
    assert points[-1]["train"] == pytest.approx(expected[4][0], rel=1e-4)


def test_a_trial_that_diverges_keeps_the_points_before():
    training, held_out = examples(27, 0), examples(13, 1)
    found = run_trial(job(seconds=500.0, lr=1e38), Resources(), training, held_out)
    assert found["diverged"]
    assert found["points"][0]["step"] == 0
    assert all(np.isfinite([p["train"], p["validation"]]).all() for p in found["points"])
    assert found["steps"] < 20
    assert found["mean_ms"] == 1000


def test_seeds_decide_weights_and_batches():
    training, held_out = examples(27, 0), examples(13, 1)

    def losses(seed):
        points = run_trial(job(seed=seed), Resources(), training, held_out)["points"]
        return [point["train"] for point in points]

    assert losses(1) == losses(1)
    assert losses(1)[0] != losses(2)[0]


def test_refreshes_are_timed_apart_from_plain_steps(monkeypatch):
    calls = count()
    done = [0]  # steps

    def now(self):
        done[0] = (next(calls) + 1) // 2
        return float(sum(5 if step % 3 == 0 else 1 for step in range(done[0])))

    monkeypatch.setattr(Resources, "now", now)
    monkeypatch.setattr(trial, "_refreshes", lambda optimizer: -(-done[0] // 3))
    found = run_trial(job(seconds=20.0), Resources(), examples(27, 0), examples(13, 1))
    assert (found["refresh_ms"], found["plain_ms"]) == (5000, 1000)
    assert found["mean_ms"] == pytest.approx(1000 * found["points"][-1]["seconds"] / found["steps"])
    assert found["points"][-1]["seconds"] == 20


# Data


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_inputs_have_one_mean_and_variance_over_all_channels(monkeypatch, channels):
    draw = np.random.default_rng(0)
    scale = np.array([1.0, 0.5, 0.2])[:channels, None, None]
    pixels = (draw.integers(0, 256, (200, channels, 4, 4)) * scale).astype(np.uint8)
    values = pixels / 255
    told = []
    part = SimpleNamespace(images=torch.from_numpy(pixels), labels=torch.arange(200))
    data = SimpleNamespace(
        mean=values.mean((0, 2, 3)).tolist(), std=values.std((0, 2, 3)).tolist(),
        train=part, validation=part,
    )  # fmt: skip
    monkeypatch.setattr(problems, "load_data", lambda *a, **k: told.append((a, k)) or data)
    found, held_out = load_examples(TINY, None, torch.device("cpu"))
    assert told == [(("digits", None), {"validation": 0.25, "min_classes": 1})]
    inputs, labels = found.batch(torch.arange(200), reconstruct=False)
    assert float(inputs.double().mean()) == pytest.approx(0, abs=1e-5)
    assert float(inputs.double().var(correction=0)) == pytest.approx(1, abs=1e-4)
    assert labels.tolist() == list(range(200))
    assert (held_out.mean, held_out.std) == (found.mean, found.std)
    plain, _ = load_examples(replace(TINY, whiten=False), None, torch.device("cpu"))
    assert (plain.mean, plain.std) == (0.0, 1.0)


# Latency


def test_every_model_is_timed_in_evaluation_mode_on_one_image(monkeypatch):
    seen = []

    class Watched(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, images):
            seen.append(
                (self.name, tuple(images.shape), self.training, torch.is_inference_mode_enabled())
            )
            return images

    trained = {
        name: SimpleNamespace(model=Watched(name).train(), input_shape=(channels, 6, 7))
        for name, channels in (("a", 1), ("b", 3))
    }
    found = measure_latency(trained, torch.device("cpu"), 4, 1)
    assert set(found) == {"a", "b"}
    assert {row for row in seen if row[0] == "b"} == {("b", (1, 3, 6, 7), False, True)}
    assert sum(row[0] == "a" for row in seen) == sum(row[0] == "b" for row in seen) >= 4
    names = [row[0] for row in seen[-8:]]
    assert names == ["a", "b"] * 4  # in turns
    for each in found.values():
        assert 0 <= each["low_ms"] <= each["median_ms"] <= each["high_ms"]
    assert measure_latency({}, torch.device("cpu"), 4, 1) == {}


def test_threads_are_restored_where_a_model_fails():
    class Failing(nn.Module):
        def forward(self, images):
            raise RuntimeError("no")

    torch.set_num_threads(2)
    trained = {"a": SimpleNamespace(model=Failing(), input_shape=(1, 2, 2))}
    with pytest.raises(RuntimeError, match="no"):
        measure_latency(trained, torch.device("cpu"), 2, 1)
    assert torch.get_num_threads() == 2


def test_a_device_is_the_named_one_or_the_machines(monkeypatch):
    assert choose_device("cuda:3") == torch.device("cuda", 3)
    monkeypatch.setattr(latency.torch.accelerator, "current_accelerator", lambda **_: None)
    assert choose_device("auto") == torch.device("cpu")
