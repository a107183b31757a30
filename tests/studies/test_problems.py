from pathlib import Path

import pytest
import torch

from smallfry.studies.problems import PROBLEMS, Examples, load_examples
from smallfry.studies.trial import Job, Resources, run_trial

SHARED = Path(__file__).parents[3] / "shared" / "data" / "mnist"
SHAPES = {"faces": (1, 25, 25), "convnet": (3, 32, 32)}


def noise(problem: str, count: int) -> Examples:
    generator = torch.Generator().manual_seed(count)
    shape = (count, *SHAPES.get(problem, (1, 28, 28)))
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    mean, std = (0.5, 0.3) if PROBLEMS[problem].whiten else (0.0, 1.0)
    return Examples(pixels, torch.randint(10, (count,), generator=generator), mean, std)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("contestant", ["adamw", "kfac", "two_level"])
def test_every_problem_can_be_raced_on(
    problem: str, contestant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smallfry.studies.trial.EVALUATED", 64)
    settings = {"lr": 1e-3} if contestant == "adamw" else {"lr": 0.01, "damping": 1.0}
    job = Job("tuning", problem, contestant, settings, 0, 0, 0.1)
    measured = run_trial(job, Resources(), noise(problem, 1100), noise(problem, 100))
    assert not measured["diverged"]
    assert measured["steps"] > 0
    assert ("energy" in measured) == (contestant == "two_level")


@pytest.mark.slow
def test_curves_are_split_as_in_the_paper() -> None:
    training, held_out = load_examples(PROBLEMS["curves"], None, torch.device("cpu"))
    assert (len(training.pixels), len(held_out.pixels)) == (16_000, 4_000)
    inputs, targets = training.batch(torch.arange(3), reconstruct=True)
    assert inputs.shape == (3, 1, 28, 28)
    assert torch.equal(targets, inputs.flatten(1))
    assert 0 <= float(inputs.min()) <= float(inputs.max()) <= 1


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="MNIST's files are not on this machine")
def test_whitened_inputs_have_mean_0_and_variance_1() -> None:
    training, _ = load_examples(PROBLEMS["deep_linear"], SHARED, torch.device("cpu"))
    assert abs(len(training.pixels) - 50_000) < 10  # every class gives its share
    inputs, labels = training.batch(torch.arange(20_000), reconstruct=False)
    assert labels.shape == (20_000,)
    assert abs(float(inputs.mean())) < 0.05
    assert float(inputs.std()) == pytest.approx(1, abs=0.05)
