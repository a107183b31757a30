"""Learning-rate range test: its rates, suggestion and picture, and that it leaves nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from run_helpers import metrics
from torch import nn

from smallfry.cli import main
from smallfry.errors import RunError, UsageError
from smallfry.report.rates import draw_rates
from smallfry.training import find_lr
from smallfry.training.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from smallfry.training.find_lr import _test, find_learning_rate, smoothed, suggest
from smallfry.training.own_code import OwnCode
from smallfry.training.train import train

RATES = np.geomspace(1e-6, 10, 100)


# The suggestion


def test_the_suggestion_is_where_most_of_the_fall_is_done():
    position = np.log10(RATES)
    losses = np.interp(position, [-6, -4, -2, 1], [2.0, 2.0, 1.0, 5.0])
    assert suggest(RATES, losses) == pytest.approx(10**-2.4, rel=0.1)  # 4/5 from -4 to -2
    bumpy = np.interp(position, [-6, -4, -3, -2, -1, 1], [2.0, 2.0, 1.1, 1.9, 1.0, 5.0])
    assert suggest(RATES, bumpy) == pytest.approx(10 ** (-1 - 2 / 9), rel=0.1)  # of the lowest


@pytest.mark.parametrize(
    "losses",
    [
        np.full(100, 2.0),
        np.linspace(2.0, 5.0, 100),
        np.linspace(2.0, 1.99, 100),  # hardly
        np.array([2.0, 1.0]),
        np.array([]),
    ],
    ids=["level", "rising", "hardly", "two", "none"],
)
def test_there_is_no_suggestion_without_a_fall(losses):
    assert suggest(RATES[: len(losses)], losses) is None


def test_smoothing_keeps_lines_and_removes_noise():
    line = np.linspace(3, 1, 60)
    assert_allclose(smoothed(line)[12:-12], line[12:-12], rtol=1e-4)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smoothed(noise).std() < 0.4 * noise.std()
    assert_allclose(smoothed(np.ones(5)), 1.0)  # up to the ends


class Quadratic:
    """Trainer of x² by gradient descent, of which all is known: it diverges above a rate of 1."""

    def __init__(self, noise=0.0):
        self.x, self.peak_rate, self.steps, self.noise = 1.0, 0.1, [], noise
        self.progress, self.batches = SimpleNamespace(step=0), range(10_000)

    def train_on(self, batch, rate):
        self.steps.append((batch, self.progress.step, rate))
        loss = self.x**2
        self.x -= rate * 2 * self.x
        return SimpleNamespace(loss=torch.tensor(loss))


def test_a_quadratic_is_tested_until_it_diverges():
    trainer = Quadratic()
    found = _test(trainer, 100)
    assert [step[:2] for step in trainer.steps] == [(i, i) for i in range(len(trainer.steps))]
    assert_allclose([step[2] for step in trainer.steps], RATES[: len(trainer.steps)])
    assert found.rates[0] == 1e-6
    assert found.losses[0] == 1.0
    assert len(found.rates) == len(found.losses) == len(found.smooth) < 100
    assert 0.02 < found.suggestion < 1
    assert found.default == 0.1


@pytest.mark.parametrize(
    "broken", [float("nan"), RuntimeError("eigh failed")], ids=["nan", "error"]
)
def test_weights_that_are_no_numbers_end_the_test(broken):
    class Breaks(Quadratic):
        def train_on(self, batch, rate):
            if batch == 50:
                if isinstance(broken, Exception):
                    raise broken
                return SimpleNamespace(loss=torch.tensor(broken))
            return super().train_on(batch, rate)

    assert len(_test(Breaks(), 100).rates) == 50


@pytest.mark.parametrize("error", [RuntimeError("wrong shape"), MemoryError()])
def test_an_error_of_the_first_step_is_raised(error):
    class Breaks(Quadratic):
        def train_on(self, batch, rate):
            raise error

    with pytest.raises(type(error)):
        _test(Breaks(), 100)


# The configured run


@pytest.mark.slow
def test_the_test_is_of_the_configured_run_and_changes_nothing(variant, tmp_path, monkeypatch):
    plain = variant(run=tmp_path / "plain")
    train(plain)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    config = variant(callbacks=["not:given"], optimizer=OptimizerConfig(lr=0.02))
    seen = []
    monkeypatch.setattr(
        find_lr, "_test", lambda trainer, steps: seen.append(trainer) or _test(trainer, steps)
    )
    found = find_learning_rate(config, tmp_path / "new" / "rates.png", steps=12)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert found.default == 0.02
    assert_allclose(found.rates, np.geomspace(1e-6, 10, 12)[: len(found.rates)])
    assert np.asarray(Image.open(tmp_path / "new" / "rates.png")).std() > 5
    assert {entry.name for entry in tmp_path.iterdir()} == {"plain", "new"}
    (trainer,) = seen
    assert not trainer.folder.path.exists()
    row = metrics(plain.run)[0]  # the first loss is that of the run's first step
    assert 1 < found.losses[0] < 2 * float(row["train_loss"])
    train(variant())
    assert metrics(variant().run) == metrics(plain.run)


@pytest.mark.slow
def test_layers_keep_their_share_of_the_rate_and_frozen_ones_stay(variant, tmp_path, monkeypatch):
    states = []

    def peek(trainer, steps):
        stem = {n: p.clone() for n, p in trainer.raw_model.named_parameters()}
        found = _test(trainer, steps)
        groups = trainer.raw_optimizer.param_groups
        states.append((stem, dict(trainer.raw_model.named_parameters()), groups, found))
        return found

    monkeypatch.setattr(find_lr, "_test", peek)
    config = variant(
        model=ModelConfig(**{**vars(variant().model), "freeze": ["patch_embed.*"]}),
        optimizer=OptimizerConfig(bias_rate=4.0),
        objective=ObjectiveConfig("cross_entropy"),
    )
    find_learning_rate(config, tmp_path / "rates.png", steps=4)
    before, after, groups, found = states[0]
    frozen = [name for name in before if name.startswith("patch_embed.")]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert len(found.rates) >= 2
    assert {group["lr_scale"] for group in groups} == {1.0, 4.0}
    (rate,) = {round(group["lr"] / group["lr_scale"], 9) for group in groups}
    assert rate == pytest.approx(np.geomspace(1e-6, 10, 4)[min(len(found.rates), 3)])


@pytest.mark.slow
def test_own_losses_are_tested_too(variant, tmp_path):
    calls = []

    def loss(logits, targets):
        calls.append(len(logits))
        return nn.functional.cross_entropy(logits, targets)

    config = variant(objective=ObjectiveConfig(loss="own:loss"))
    code = OwnCode(objects={"own:loss": loss})
    find_learning_rate(config, tmp_path / "rates.png", code, steps=3)
    assert calls[:3] == [32] * 3
    with pytest.raises(UsageError, match="names own:loss"):
        find_learning_rate(config, tmp_path / "rates.png", steps=3)


# The command


def test_the_command_draws_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find_lr, "_test", lambda trainer, steps: _test(trainer, 8))
    asked = ["train", "--data.limit", "100", "--objective", "cross_entropy", "--find_lr"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "suggest" in out
    assert out.endswith("picture: learning_rate.png\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["learning_rate.png"]
    assert main([*asked, "rates.jpg"]) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err
    assert main(["train", "--resume", "x", "--find_lr"]) == 2
    assert "leave out resume" in capsys.readouterr().err


def test_the_suggestion_is_described_with_its_option():
    found = find_lr.RateTest((1e-3, 1e-2), (2.0, 1.0), (2.0, 1.0), 0.00123, 0.5)
    assert found.describe() == (
        "suggested learning rate: 0.0012 (--optimizer.lr 0.0012); the configured peak is 0.5"
    )
    none = found._replace(suggestion=None).describe()
    assert "no suggestion: the loss does not fall at any rate up to 0.01" in none


def test_what_cannot_be_tested_is_refused(variant, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        find_lr, "_test", lambda *_: find_lr.RateTest((1.0,), (1.0,), (1.0,), None, 1)
    )
    with pytest.raises(RunError, match="can't be written"):
        find_learning_rate(variant(), tmp_path / "file" / "rates.png")
    monkeypatch.setattr(find_lr, "launch", lambda: SimpleNamespace(processes=2))
    with pytest.raises(UsageError, match="one process"):
        find_learning_rate(variant(), tmp_path / "rates.png")


@pytest.mark.slow
def test_the_suggestion_is_marked_in_the_picture(tmp_path):
    losses = np.linspace(2, 1, 100)
    pictures = []
    for name, suggestion in (("a.png", None), ("b.png", 1e-2)):
        draw_rates(RATES, losses, losses, suggestion, tmp_path / name)
        pictures.append(np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int))
    orange = [int((abs(p - [234, 88, 12]).sum(2) < 60).sum()) for p in pictures]
    assert orange[0] == 0 < 100 < orange[1]
