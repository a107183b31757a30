"""Settings, and the table of methods: one row is all that a method needs."""

import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from smallfry import optim
from smallfry.errors import UsageError
from smallfry.optim import METHODS, CurvatureSettings, NaturalGradient
from smallfry.optim.kpsvd import ProductSettings
from smallfry.optim.settings import MODEL_KEYWORDS, Settings
from smallfry.studies import optimizer
from smallfry.studies.config import OptimizersConfig
from smallfry.studies.contestants import CONTESTANTS
from smallfry.studies.optimizer import LABELS
from smallfry.studies.race import AUTOENCODER
from smallfry.training.config import OptimizerConfig
from smallfry.training.optimization import NATURAL, peak_learning_rate

ROOT = Path(__file__).parents[2]


def test_keywords_are_the_fields_of_the_settings_with_their_types():
    keywords = typing.get_type_hints(Settings)
    fields = typing.get_type_hints(CurvatureSettings)
    assert keywords.keys() == (fields.keys() - {"lr"}) | set(MODEL_KEYWORDS)
    assert {name: kind for name, kind in keywords.items() if name in fields} == {
        name: kind for name, kind in fields.items() if name != "lr"
    }


def test_settings_can_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CurvatureSettings(lr=0.1).damping = 0.2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, "lr and fallback_lr can't be negative or infinite, got -1.0, 0.001"),
        ({"fallback_lr": -1.0}, "lr and fallback_lr can't be negative or infinite, got 0.1, -1.0"),
        ({"damping": 0.0}, "damping must be positive, got 0.0"),
        ({"damping_per": "block"}, "damping_per must be one of network, layer, not 'block'"),
        ({"momentum": 1.0}, "momentum is 0 to below 1, got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay can't be negative, got -0.1"),
        ({"kl_clip": 0.0}, "kl_clip must be positive or None, got 0.0"),
        ({"step_length": "best"}, "step_length must be one of lr, quadratic, not 'best'"),
        ({"ema_decay": 1.0}, "ema_decay is 0 to below 1, got 1.0"),
        ({"statistics_every": 0}, "periods are at least 1 step, got 0 and 0"),
        ({"inverse_every": 0}, "periods are at least 1 step, got 10 and 0"),
        ({"burn_in": -1}, "burn_in is 0 or more steps, got -1"),
        ({"loss_scale": 0.0}, "loss_scale is a positive number, 'mean' or 'sum', not 0.0"),
        ({"loss_scale": "max"}, "loss_scale is a positive number, 'mean' or 'sum', not 'max'"),
        ({"max_rows": 0}, "max_rows is positive or None, got 0"),
        ({"check": "no"}, "check must be one of error, warn, off, not 'no'"),
    ],
)
def test_settings_that_make_no_sense_are_named(wrong, message):
    with pytest.raises(UsageError) as error:
        CurvatureSettings(**{"lr": 0.1, **wrong})
    assert str(error.value) == message


def test_inverses_are_made_with_the_statistics_unless_stated():
    assert CurvatureSettings(lr=0.1, statistics_every=7).refresh_every == 7
    assert CurvatureSettings(lr=0.1, statistics_every=7, inverse_every=14).refresh_every == 14


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_typed_keywords_and_refuses_others(name):
    kind = METHODS[name].optimizer
    for parameter in inspect.signature(kind).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.annotation is not typing.Any
        if parameter.kind is parameter.VAR_KEYWORD:
            (keywords,) = typing.get_args(parameter.annotation)
            assert keywords in (Settings, ProductSettings)
    model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="no setting 'dampingg'; did you mean 'damping'"):
        kind(model, dampingg=0.1)
    optimizer = kind(model, damping=0.7, kl_clip=None, seed=3)
    assert optimizer.settings.damping == optimizer.damping == 0.7
    assert optimizer.settings.kl_clip is None
    assert optimizer.settings.seed == 3


def test_defaults_that_differ_by_method_give_way_to_what_is_stated():
    model = nn.Linear(3, 2)
    assert optim.KPSVD(model).settings.max_rows == 512
    assert optim.KFACCorrected(model).settings.max_rows == 512
    assert optim.Deflation(model, max_rows=7).settings.max_rows == 7
    assert optim.KFAC(model).settings.max_rows == 2048
    exact = optim.ExactNG(model).settings
    assert (exact.damping, exact.statistics_every, exact.refresh_every) == (10.0, 1, 1)
    assert optim.ExactNG(model, damping=2.0, statistics_every=3).settings.refresh_every == 3


def test_a_method_is_one_row_for_training_studies_and_tests():
    assert {method.name for method in METHODS.values()} == set(METHODS)
    for name, method in METHODS.items():
        assert issubclass(method.optimizer, NaturalGradient)
        assert NATURAL[name] is method.optimizer
        assert CONTESTANTS[name].label == LABELS[name] == method.label
        assert peak_learning_rate(OptimizerConfig(name), nn.Linear(1, 1)) == method.lr
        assert getattr(optim, method.optimizer.__name__) is method.optimizer
        assert name in AUTOENCODER
    assert OptimizersConfig().optimizers is None  # all
    assert {plan.facts["optimizer"] for plan in optimizer.plan(OptimizersConfig())} == set(LABELS)
    assert set(LABELS) == {"adamw", "muon", *METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_documented(name):
    method = METHODS[name].optimizer.__name__
    assert f"::: smallfry.optim.{method}\n" in (ROOT / "docs/api/optim.md").read_text()
    assert f"`{method}" in (ROOT / "docs/natural_gradient.md").read_text()
    assert name in OptimizerConfig.__doc__


def test_the_preconditioner_alone_is_saved_loaded_and_applied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = optim.EKFAC(model, burn_in=0)
    torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
    optimizer.step()
    first = optimizer.preconditioner
    second = optim.Preconditioner(
        optimizer.blocks,
        first.approximation,
        optimizer.settings,
        first.collectives,
    )
    second.load_state_dict(first.state_dict())
    grads = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    found = second.directions(grads)
    for name, direction in first.directions(grads).items():
        assert torch.equal(found[name], direction)
    block = optimizer.blocks[0]
    matrix = block.to_matrix(grads)
    assert torch.equal(
        second.apply({block.name: matrix})[block.name], first.solve(block.name, matrix)
    )
    second.refresh([], inverse=True)  # of the same statistics
    assert second.counters["inverses"] == first.counters["inverses"] + 1
    assert second.lambdas == pytest.approx(first.lambdas)
