"""Compressed forms by what the budget lacks, their verification, and the choice among them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smallfry.data import Split
from smallfry.deploy.targets import find_target, targets
from smallfry.errors import UsageError
from smallfry.fitting import verify
from smallfry.fitting.compressing import finalists
from smallfry.fitting.config import Budget
from smallfry.fitting.costs import Costs
from smallfry.fitting.rungs import run_name
from smallfry.fitting.variants import find_variants, harder, tuned_epochs, tuning
from smallfry.fitting.verify import Verified, choose, find_exit, measure, nearest, score
from smallfry.search import RUNG, Trial
from smallfry.search.evaluation import value_of
from smallfry.training.config import OptimizerConfig, TrainConfig
from smallfry.training.method import from_dict
from smallfry_runtime.early_exit import Point

ALL = ("float32", "int8", "own_bits")
COSTS = Costs(70_000, 12_000_000, {"float32": 286.0, "int8": 78.0}, {"float32": 0.6, "int8": 0.3})


def names(budget, precisions=ALL):
    return [variant.name for variant in find_variants(COSTS, budget, precisions)]


def export(name="a", kb=10.0, ms=1.0, accuracy=0.9, loss=0.3, **more):
    return Verified(name, name, "loopnet", "int8", "int8", kb, ms, accuracy, loss, **more)


# Variants


def test_forms_are_the_simplest_that_may_fit():
    assert names(Budget(300, 1)) == ["int8", "float32"]
    assert names(Budget(80, 1)) == ["int8"]
    assert names(Budget(300, 0.4)) == ["int8"]
    assert names(Budget(60, 1)) == ["pruned-int8", "lsq4"]
    assert names(Budget(40, 1)) == ["pruned-int8"]  # four bits would not do
    assert names(Budget(60, 0.2)) == ["pruned-int8"]  # nor be faster
    assert names(Budget(60, 1), ("float32", "int8")) == ["pruned-int8"]


@given(st.floats(1, 77), st.floats(0.05, 1))
def test_pruning_removes_more_under_a_smaller_budget_and_never_all(kb, ms):
    (variant,) = [v for v in find_variants(COSTS, Budget(kb, ms), ALL) if v.kind == "hesso"]
    sparsity = variant.method["hesso"]["sparsity"]
    assert 0 < sparsity <= 0.85
    (less,) = [v for v in find_variants(COSTS, Budget(kb / 2, ms), ALL) if v.kind == "hesso"]
    assert less.method["hesso"]["sparsity"] >= sparsity
    from_dict(variant.method)  # settings that the method takes


def test_pruning_that_missed_is_repeated_once_with_fewer_channels():
    (first,) = find_variants(COSTS, Budget(40, None), ALL)
    second = harder(first, excess=1.01)
    assert 1 - second.method["hesso"]["sparsity"] == pytest.approx(
        0.85 * (1 - first.method["hesso"]["sparsity"]), abs=2e-3
    )
    assert harder(second, 1.01) is None
    assert harder(first, 1000.0) is None


def test_fine_tuning_starts_from_the_candidate_and_is_taught_by_it(tmp_path):
    config = TrainConfig(optimizer=OptimizerConfig("sgd", 0.4), precision="bf16-mixed")
    pruned, rounded = find_variants(COSTS, Budget(60, None), ALL)
    made = tuning(config, tmp_path / "a", tmp_path / "b", pruned, 7)
    assert (made.model.start, made.distillation.teacher) == (str(tmp_path / "a"),) * 2
    assert (made.epochs, made.run, made.precision) == (7, tmp_path / "b", "32-true")
    assert made.optimizer.lr == pytest.approx(0.2)
    assert made.methods == [pruned.method]
    assert tuning(config, tmp_path, tmp_path, rounded, 1).optimizer.lr == pytest.approx(0.04)
    assert tuned_epochs(pruned, 1.0, 18.0) == 10
    assert tuned_epochs(rounded, 1.0, 0.1) == 1


# Finalists


def space(*fitting):
    def planned(candidate):
        name = candidate["model"]
        return SimpleNamespace(name=name, fits=lambda budget: name in fitting)

    return SimpleNamespace(planned=planned, config=SimpleNamespace(budget=Budget(1, 1)))


def trial(name, rung, value):
    return Trial({"model": name, RUNG: rung}, value)


def test_the_best_go_on_by_their_last_rung_with_one_that_fits():
    trials = [trial("a", 0, 99), trial("b", 0, 90), trial("c", 0, 80), trial("d", 0, None)]
    trials += [trial("a", 1, 85), trial("b", 1, 91)]
    assert [f.run for f in finalists(trials, space("a"))] == ["b", "a"]
    assert [f.run for f in finalists(trials, space("c", "d"))] == ["b", "a", "c"]
    assert [f.run for f in finalists(trials, space())] == ["b", "a"]
    assert finalists([trial("d", 0, None)], space("d")) == []


def test_runs_are_named_by_what_differs():
    assert run_name({"model": "a", RUNG: 2}) == "a"
    assert run_name({"model": "a", "lr": 0.123456789, "augment": "plain"}) == "a-0.123456789-plain"


# Choice


def test_the_most_accurate_within_the_budget_is_chosen_and_of_equals_the_smaller():
    exports = [
        export("large", kb=30, accuracy=0.99),
        export("slow", ms=3, accuracy=0.98),
        export("sure", loss=0.1),
        export("unsure", loss=0.2),
        export("small", kb=9, loss=0.1),
        export("none", kb=None, ms=None, accuracy=None, loss=None, failure="out of memory"),
    ]
    assert choose(exports, Budget(20, 2)).name == "small"
    assert choose(exports[:4], Budget(20, 2)).name == "sure"
    assert choose(exports, Budget(40, 2)).name == "large"
    assert choose(exports, Budget(1, 2)) is None
    assert nearest(exports, Budget(6, 2)).name in ("slow", "small")
    assert nearest(exports, Budget(6, 0.1)).name in ("small", "sure", "unsure", "large")
    assert nearest(exports[-1:], Budget(1, 1)) is None


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 100), st.floats(0, 100))
def test_accuracy_decides_and_the_loss_only_between_equals(one, other, loss, less):
    if one > other + 2e-4:
        assert value_of(one, loss) > value_of(other, less)
    if loss < min(less, 10) - 1e-9:
        assert value_of(one, loss) >= value_of(one, less)


# Measurement


class Fixed:
    """Export that answers with fixed probabilities, sooner at lower thresholds."""

    def __init__(self, probabilities, exits=(), steps=None):
        self.probabilities, self.file_bytes = probabilities, 12_345
        self.manifest = SimpleNamespace(exits=exits, recursion_steps=steps)
        self.thresholds = []

    def predict(self, images, *, threshold=None):
        self.thresholds.append(threshold)
        found = self.probabilities[: len(images)]
        return SimpleNamespace(probabilities=found)


SPLIT = Split(
    torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), torch.tensor([0, 1, 1, 0])
)
SHARES = np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1], [0.5, 0.5]], np.float32)
DATA = SimpleNamespace(validation=SPLIT, channels=1, image_size=8)
EXITS = (Point(0.2, 0.7, 1.0), Point(0.6, 0.9, 2.0), Point(1.01, 0.9, 4.0))


def test_accuracy_and_loss_are_of_the_probabilities():
    found = score(SHARES, SPLIT)
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.6, 0.1, 0.5]).mean(), rel=1e-5)


def test_an_export_is_measured_by_what_its_runtime_answers(monkeypatch):
    monkeypatch.setattr(verify, "latency", lambda *_: 0.25)
    found = measure(Fixed(SHARES), DATA, Budget(20, 2))
    assert (found["kb"], found["ms"], found["accuracy"]) == (12.345, 0.25, 0.75)
    assert (found["exit_threshold"], found["exit_steps"]) == (None, None)


@pytest.mark.parametrize(
    ("ms", "threshold"),
    [
        (None, 0.6),  # no accuracy is lost, and half of the steps are saved
        (9.0, 0.6),
        (2.0, 0.6),
        (1.5, 0.2),  # less accurate, but in time
        (0.5, 0.2),  # nothing is: the fewest steps
    ],
)
def test_early_exit_is_without_loss_or_as_the_time_allows(monkeypatch, ms, threshold):
    def latency(answering, data, threshold=None):
        return 1.0 if threshold == 0.0 else 4.0  # one step, four steps

    monkeypatch.setattr(verify, "latency", latency)
    found = find_exit(Fixed(SHARES, EXITS, 4), DATA, Budget(None, ms))
    assert found.threshold == threshold


def test_a_recursive_export_is_measured_with_its_early_exit(monkeypatch):
    monkeypatch.setattr(verify, "latency", lambda *_: 1.0)
    answering = Fixed(SHARES, EXITS, 4)
    found = measure(answering, DATA, Budget(20, None))
    assert (found["exit_threshold"], found["exit_steps"]) == (0.6, 2.0)
    assert {*answering.thresholds} == {0.6}
    assert found["ms"] > 0


# Targets


def test_onnx_is_a_target_and_an_unknown_one_is_refused():
    assert {*ALL} < {*targets()["onnx"].precisions}
    with pytest.raises(UsageError, match="no device format 'onx'; did you mean 'onnx'"):
        find_target("onx")
