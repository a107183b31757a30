"""Candidates: the zoo in widths, their costs, and the choice of those near a budget."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from smallfry.data import load_data
from smallfry.deploy.targets import find_target
from smallfry.errors import RunError, UsageError
from smallfry.fitting import costs as costs_module
from smallfry.fitting import planning
from smallfry.fitting.config import Budget, FitConfig
from smallfry.fitting.costs import Costs, build, measure_costs
from smallfry.fitting.plan import read_plan
from smallfry.fitting.planning import (
    NothingFits,
    choose_candidates,
    find_pretrained,
    make_plan,
    needed,
)
from smallfry.fitting.recipe import fitting_batch, recipe
from smallfry.fitting.zoo import FAMILIES, Entry, scaled, zoo

TINY = "loopnet_70k"


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=60)


@pytest.fixture
def measured(monkeypatch):
    """Costs by parameters instead of exports, and the names that were measured."""
    names = []

    def measure(entry, data, target):
        names.append(entry.name)
        trained = build(entry, data)
        parameters = sum(p.numel() for p in trained.model.parameters())
        kb = {"float32": 4 * parameters / 1000 + 6, "int8": parameters / 1000 + 6}
        return Costs(parameters, 10, kb, {"float32": 0.2, "int8": 0.1})

    monkeypatch.setattr(planning, "measure_costs", measure)
    return names


# Zoo


def test_all_names_of_the_zoo_are_registered_and_unique():
    entries = zoo()
    assert len({entry.name for entry in entries}) == len(entries)
    assert len({(entry.model, str(entry.options)) for entry in entries}) == len(entries)
    assert {entry.family for entry in entries} == {family.name for family in FAMILIES}
    assert all(timm.is_model(entry.model) for entry in entries)


@pytest.mark.parametrize("entry", [e for e in zoo() if e.width < 1], ids=lambda e: e.name)
def test_narrower_models_have_fewer_parameters_and_run(entry):
    small = timm.create_model(entry.model, **entry.options).eval()
    full = timm.create_model(entry.model)
    count = [sum(p.numel() for p in model.parameters()) for model in (small, full)]
    assert count[0] < 0.9 * count[1]
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_named_candidates_come_in_all_known_widths_and_others_in_one():
    names = [entry.name for entry in zoo(["resnet8_mlperf_tiny", "resnet_micro", "resnet18"])]
    assert names[:2] == ["resnet8_mlperf_tiny", "resnet8_mlperf_tiny-0.7"]
    assert names[-2:] == ["resnet_micro", "resnet18"]
    assert replace(zoo(["resnet18"])[0], start="a").name == "resnet18-from-a"


def test_unknown_candidates_and_widths_are_refused():
    with pytest.raises(UsageError, match="unknown model 'loopnet_70'; did you mean"):
        zoo(["loopnet_70"])
    with pytest.raises(UsageError, match="resnet18 has one width"):
        scaled("resnet18", 0.5)


# Costs


@pytest.mark.slow
def test_costs_are_of_the_exported_model_and_are_measured_once_a_machine(
    digits, monkeypatch, tmp_path
):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path))
    entry = zoo([TINY])[-1]
    found = measure_costs(entry, digits, find_target("onnx"))
    assert found.kb["float32"] > found.kb["int8"] > found.parameters / 1000
    assert found.overhead_kb == pytest.approx(found.kb["int8"] - found.parameters / 1000)
    assert found.overhead_kb < found.four_bit_kb < found.kb["int8"]
    assert min(found.ms.values()) > 0
    monkeypatch.setattr(costs_module, "build", lambda *_: pytest.fail("measured again"))
    assert measure_costs(entry, digits, find_target("onnx")) == found
    (file,) = (tmp_path / "fit").iterdir()
    with pytest.raises(pytest.fail.Exception):  # other classes are other models
        measure_costs(entry, replace(digits, classes=digits.classes[:9]), find_target("onnx"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "ms": {"int8": -1}}))
    with pytest.raises(pytest.fail.Exception):
        measure_costs(entry, digits, find_target("onnx"))


# Recipe


def test_small_data_sets_have_smaller_batches_at_lower_rates(digits):
    assert [fitting_batch(512, n) for n in (45_000, 1_295, 320, 3)] == [512, 64, 16, 16]
    entry, config = zoo([TINY])[0], FitConfig(device="cpu", max_kb=20)
    made = recipe(entry, config, digits, threads=1, epochs=20)
    assert (made.batch_size, made.epochs, made.threads) == (16, 20, 1)
    assert made.optimizer.lr == pytest.approx((16 / 1024) ** 0.5)
    started = recipe(entry, config, digits, threads=1, start=Path("runs/a"))
    assert started.model.start == "runs/a"
    assert started.optimizer.lr == pytest.approx(0.3 * made.optimizer.lr)
    changes = {"lr": 2.0, "augment": "strong", "model": "x"}
    strong = recipe(entry, config, digits, threads=1, changes=changes)
    assert strong.optimizer.lr == pytest.approx(2 * made.optimizer.lr)
    assert (strong.augment.mixup, strong.augment.cutout) == (0.2, 2)
    large = replace(digits, image_size=64)
    assert recipe(entry, config, large, threads=1).augment.crop_padding == 8


def test_depthwise_networks_stay_in_float32(digits):
    entry = zoo(["mobilenetv3_small_100"])[0]
    config = FitConfig(device="cpu")
    assert recipe(entry, config, digits, threads=1, precision="bf16-mixed").precision == "32-true"


# Choice of candidates


def test_candidates_are_near_the_budget_and_few_need_more_than_int8(digits, measured):
    names = (TINY, "loopnet_300k", "resnet8_mlperf_tiny", "cct_2_3x2_32", "vitrm_micro_patch4_8")
    config = FitConfig(max_kb=30, minutes=3, candidates=names)
    chosen, left_out = choose_candidates(config, digits, {}, lambda _: None)
    over = [costs.kb["int8"] / 30 for _, costs in chosen]
    assert len(chosen) == 4
    assert sum(each > 1 for each in over) <= 1
    assert max(over) <= 1.6
    assert {"loopnet", "resnet"} == {entry.family for entry, _ in chosen}
    assert "times the budget, by its weights" in left_out["vitrm_micro_patch4_8"]
    assert "can't be built" in left_out["loopnet_300k"]
    assert set(left_out).isdisjoint(entry.name for entry, _ in chosen)
    assert len(left_out) + len(chosen) == len(zoo(names))
    assert not {TINY, "loopnet_300k", "vitrm_micro_patch4_8"} & {*measured}  # far too large


def test_models_that_the_minutes_are_too_short_for_come_last(digits, measured, monkeypatch):
    names = ("resnet8_mlperf_tiny", "vitrm_micro_patch4_8", TINY)
    config = FitConfig(max_kb=500, minutes=1, threads=1, device="cpu", candidates=names)

    def families(quick):
        monkeypatch.setattr(planning, "_is_quick", lambda macs, *_: quick(macs))
        chosen, _ = choose_candidates(config, digits, {}, lambda _: None)
        return [entry.family for entry, _ in chosen]

    assert families(lambda macs: True) == ["resnet", "vitrm", "loopnet", "resnet"]
    assert families(lambda macs: macs < 1_000_000) == ["resnet", "loopnet", "resnet", "loopnet"]
    assert families(lambda macs: False)[1] == "vitrm"


def test_the_quick_take_a_thousand_steps_by_a_rough_speed(digits):
    config = FitConfig(minutes=1, threads=1, device="cpu")  # 30 seconds, batches of 16 images
    assert planning._is_quick(18_000_000, config, digits)
    assert not planning._is_quick(20_000_000, config, digits)
    assert planning._is_quick(20_000_000, replace(config, threads=2), digits)


def test_an_impossible_budget_names_the_nearest_and_what_it_would_need(digits, measured):
    config = FitConfig(max_kb=1.0, candidates=(TINY,))
    with pytest.raises(NothingFits, match=r"no candidate is near 1 kB: .*allow --max_kb") as error:
        choose_candidates(config, digits, {}, lambda _: None)
    entry, costs = error.value.nearest
    assert float(str(error.value).split("--max_kb ")[1]) >= costs.kb["int8"]
    assert measured == [entry.name] == [f"{TINY}-0.25"]


def test_candidates_that_take_no_such_images_are_left_out_and_none_is_an_error(digits):
    config = FitConfig(max_kb=1000, candidates=("simplenet_cifar_310k",))
    with pytest.raises(UsageError, match="no candidate can be built for these images: simplenet"):
        choose_candidates(config, digits, {}, lambda _: None)


@pytest.mark.parametrize(
    ("kb", "ms", "text"),
    [
        (30, 1, "--max_kb 30"),
        (10, 3, "--max_ms 3"),
        (30.04, 3.001, "--max_kb 30.2 and --max_ms 3.02"),
        (1, 1, "nothing more"),
    ],
)
def test_what_would_have_to_give_is_as_much_as_the_model_needs(kb, ms, text):
    assert needed(kb, ms, Budget(20, 2)) == text


# Pretrained models


def test_pretrained_models_of_other_sizes_or_of_the_same_data_are_left_out(
    digits, tmp_path, monkeypatch
):
    entry = zoo([TINY])[0]
    trained = build(entry, digits)
    other = trained.manifest | {"data": {"name": "letters", "fingerprint": "1"}}
    models = {
        "same": trained._replace(manifest=trained.manifest | {"data": {"name": "digits"}}),
        "large": trained._replace(image_size=32),
        "fine": trained._replace(manifest=other),
    }
    monkeypatch.setattr(planning, "load_trained", lambda path: models[Path(path).name])
    config = FitConfig(pretrained=tuple(tmp_path / name for name in models))
    found, left_out = find_pretrained(config, digits)
    assert {*found} == {"fine"}
    assert "validation images would overrate" in left_out["from same"]
    assert "takes images of 1×32×32" in left_out["from large"]
    chosen, _ = _chosen_with(found, digits, monkeypatch)
    assert chosen[0][0].name == f"{TINY}-from-fine"


def _chosen_with(starts, digits, monkeypatch):
    costs = Costs(10, 10, {"float32": 4.0, "int8": 1.0}, {"float32": 0.1, "int8": 0.1})
    monkeypatch.setattr(planning, "measure_costs", lambda *_: costs)
    config = FitConfig(max_kb=1000, candidates=(TINY,))
    return choose_candidates(config, digits, starts, lambda _: None)


def test_a_pretrained_model_that_is_not_there_is_an_error(digits, tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        find_pretrained(FitConfig(pretrained=(tmp_path / "nowhere",)), digits)


# Plan


def test_a_plan_has_the_speeds_of_what_can_be_trained(digits, measured, monkeypatch, tmp_path):
    seconds = {"loopnet_70k-0.42": 0.5, "loopnet_70k-0.25": 1e9}

    def epoch(entry, config, data, threads, precision, start):
        if entry.name == "loopnet_70k-0.35":
            raise RuntimeError("out of luck\nand more")
        return seconds.get(entry.name, 1.0) * (0.5 if precision is None else 1)

    monkeypatch.setattr(planning, "_epoch_seconds", epoch)
    lines = []
    config = FitConfig(max_kb=14, minutes=6, threads=2, device="cpu", candidates=(TINY,))
    plan = make_plan(config, digits, lines.append)
    names = [each.name for each in plan.candidates]
    assert "loopnet_70k-0.42" in names
    assert plan.left_out["loopnet_70k-0.35"] == "out of luck"
    assert "an epoch takes" in plan.left_out["loopnet_70k-0.25"]
    assert plan.counts[0] == len(names)
    assert 0.3 * 720 < plan.seconds < 720
    assert all(each.precision is None for each in plan.candidates)  # lower was faster
    assert plan.tuning_seconds > 0  # as one of them needs more than int8
    assert any("CPU seconds per epoch" in line for line in lines)
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


def test_a_first_candidate_that_fails_in_any_way_is_left_out_by_name(digits, measured, monkeypatch):
    def epoch(entry, config, data, threads, precision, start):
        if entry.name == TINY:
            raise MemoryError
        return 2.0 if precision is None else 1.0  # lower is slower here

    monkeypatch.setattr(planning, "_epoch_seconds", epoch)
    config = FitConfig(max_kb=90, minutes=6, threads=2, device="cpu", candidates=(TINY,))
    lines = []
    plan = make_plan(config, digits, lines.append)
    assert plan.left_out[TINY] == "MemoryError"
    assert f"{TINY} is left out: MemoryError" in lines
    assert TINY not in [each.name for each in plan.candidates]
    assert {each.precision for each in plan.candidates} == {"32-true"}


def test_a_candidate_whose_costs_can_not_be_measured_is_left_out_by_name(
    digits, measured, monkeypatch
):
    measure = planning.measure_costs

    def costs(entry, data, target):
        if entry.name == TINY:
            raise RuntimeError
        return measure(entry, data, target)

    monkeypatch.setattr(planning, "measure_costs", costs)
    config, lines = FitConfig(max_kb=90, minutes=6, candidates=(TINY,)), []
    chosen, left_out = choose_candidates(config, digits, {}, lines.append)
    assert TINY not in [entry.name for entry, _ in chosen]
    assert left_out[TINY] == "RuntimeError"
    assert f"{TINY} is left out: RuntimeError" in lines


def test_what_can_not_be_read_among_the_models_that_are_there_is_left_out(
    digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(planning, "PRETRAINED", tmp_path)
    (tmp_path / "README.md").write_text("models")
    (tmp_path / "empty").mkdir()
    found, left_out = find_pretrained(FitConfig(), digits)
    assert found == {}
    assert "is a file" in left_out["from README.md"]
    assert "the folder is empty" in left_out["from empty"]


def test_if_nothing_can_be_trained_the_first_reason_is_the_error(digits, measured, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(planning, "_precision", lambda *_: None)
    monkeypatch.setattr(planning, "_epoch_seconds", fail)
    with pytest.raises(UsageError, match=r"can be trained: loopnet_70k[-.\d]*: no such device"):
        make_plan(FitConfig(max_kb=20, candidates=(TINY,)), digits, lambda _: None)


def test_entries_with_weights_are_random_but_equal_each_time(digits):
    entry = Entry(TINY, TINY, 0.25, "loopnet", scaled(TINY, 0.25))
    one, two = (build(entry, digits).model.state_dict() for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
