"""Figures of the studies' sections, panels and grids, against statistics of their outcomes."""

from dataclasses import replace
from statistics import fmean, stdev

import pytest

from smallfry.report.runs import Outcome
from smallfry.studies import batch_size, equal_time, optimizer, pareto, recursion
from smallfry.studies.config import (
    BatchSizeConfig,
    OptimizersConfig,
    ParetoConfig,
    RecursionConfig,
)
from smallfry.studies.equal_time import is_on_front
from smallfry.studies.folder import read_measured
from smallfry.studies.recipes import Planned
from smallfry.studies.reported_vision import ACCURACY, MILLIONS, RIVALS
from smallfry.studies.study_models import STUDY_MODELS
from smallfry.training.config import DataConfig, TrainConfig

DIGITS = {"data": DataConfig("digits"), "epochs": 4, "device": "cpu"}


def ended(plan, test, minutes=2.0, history=None, **measured):
    """A run with these scores in percent, and its history of epochs."""
    scores = {"accuracy": test / 100}
    told = {"test": scores, "best_epoch": 1, "select_on": "validation", "epochs": 4, "macs": 3e6}
    told |= {"training_seconds": 60 * minutes, "parameters": 1000, "seed": plan.facts["seed"]}
    row = {"epoch": 1.0, "seconds": 30.0, "validation_accuracy": test / 100}
    summary = {"measured": told | measured, "data": {"name": "digits", "test": 359}}
    return Outcome(plan.name, plan.facts, summary, [row] if history is None else history)


def failed(plan, failure="out of memory: CUDA"):
    return Outcome(plan.name, plan.facts, None, [], failure)


@pytest.fixture
def drawn(monkeypatch):
    """Panels and grids instead of their pictures."""
    found = []

    def keep(shown, file, same_y=False):
        found.extend(shown)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"\x89PNG")

    for module in (batch_size, optimizer, pareto, equal_time):
        monkeypatch.setattr(module, "draw_panels", keep)
    monkeypatch.setattr(recursion, "draw_grids", keep)
    return found


def points(panel):
    return {s.label: (list(s.x), list(s.y)) for s in panel.series}


# Batch size


def test_means_and_deviations_by_batch_size_are_those_of_the_seeds(drawn, tmp_path):
    config = BatchSizeConfig(models=("vit_micro",), batch_sizes=(16, 64), **{**DIGITS, "seeds": 3})
    scores = {(16, 0): 81.0, (16, 1): 84.0, (16, 2): 90.0, (64, 0): 70.0, (64, 1): 71.0}
    outcomes = []
    for plan in batch_size.plan(config):
        score = scores.get((plan.facts["batch_size"], plan.facts["seed"]))
        outcomes.append(failed(plan) if score is None else ended(plan, score))
    (section,) = batch_size.sections(config, outcomes, tmp_path)
    small, large = section.measured
    assert small["test_percent"] == pytest.approx(85)
    assert small["deviation"] == pytest.approx(stdev([81, 84, 90]))
    assert (small["runs"], large["runs"]) == (3, 3)
    assert large["test_percent"] == pytest.approx(70.5)
    theirs, ours = drawn
    assert points(ours) == {"ViT micro": ([16, 64], [pytest.approx(85), pytest.approx(70.5)])}
    assert ours.series[0].error == pytest.approx([stdev([81, 84, 90]), stdev([70, 71])])
    assert points(theirs)["ViT-L"] == (
        *([64, 128, 256, 512], [80.8, 73.4, 82.0, 83.2]),  # without the size beyond memory
    )
    html = "".join(section.html)
    assert "1 of 3 failed" in html
    assert "<b>85.00 ± 4.58</b>" in html


# Recursion


def test_grids_have_accuracy_and_minutes_and_a_frame_around_what_was_chosen(drawn, tmp_path):
    config = RecursionConfig(
        *(), vitrm="vitrm_micro", latent_steps=(1, 3, 6), supervision_steps=(2, 4),
        recursion_steps=(1, 5), **DIGITS,
    )  # fmt: skip
    score = {(1, 2, 1): 71, (1, 4, 1): 72, (3, 2, 1): 79, (3, 4, 1): 74, (6, 2, 1): 75}
    score |= {(3, 2, 5): 90, (3, 4, 5): 78}
    outcomes = []
    for plan in recursion.plan(config):
        kind = tuple(
            plan.facts[n] for n in ("latent_steps", "supervision_steps", "recursion_steps")
        )
        chosen = {"validation_accuracy": score.get(kind, 0) / 100}
        rows = [{"supervision_steps": steps, **chosen} for steps in (2.0, 1.0)]
        done = ended(plan, score.get(kind, 0), minutes=kind[0], history=rows)
        outcomes.append(done if kind in score else failed(plan, "nan"))
    assert len(outcomes) == 8
    (section,) = recursion.sections(config, outcomes, tmp_path)
    plane, times, chained = drawn
    assert plane.values == [
        *([pytest.approx(71), pytest.approx(72)], [pytest.approx(79), pytest.approx(74)]),
        [pytest.approx(75), None],
    ]
    assert times.values == [[1, 1], [3, 3], [6, None]]
    assert chained.values == [
        [pytest.approx(79), pytest.approx(74)],
        [pytest.approx(90), pytest.approx(78)],
    ]
    assert (plane.ringed, times.ringed, chained.ringed) == ((1, 0), None, (1, 0))
    assert (plane.rows[1], chained.rows[1], chained.columns[1]) == ((1, 3, 6), (1, 5), (2, 4))
    rows = {tuple(list(row.values())[:3]): row for row in section.measured}
    assert [kind for kind, row in rows.items() if row["chosen"]] == [(3, 2, 5)]
    assert rows[3, 2, 1]["steps_a_batch"] == 1.5
    assert rows[6, 4, 1]["test_percent"] is None
    assert rows[6, 4, 1]["steps_a_batch"] is None


def test_the_middle_is_combined_with_all_recursion_steps_and_nothing_runs_twice():
    config = RecursionConfig(
        *(), vitrm="vitrm_micro", latent_steps=(2, 4, 8, 16), supervision_steps=(1, 1),
        recursion_steps=(3, 1, 3), **DIGITS,
    )  # fmt: skip
    kinds = [(p.config.model.latent_steps, p.config.objective.supervision_steps,
              p.config.model.recursion_steps) for p in recursion.plan(config)]  # fmt: skip
    assert kinds == [(2, 1, 3), (4, 1, 3), (8, 1, 3), (16, 1, 3), (8, 1, 1)]


# Optimizers


def test_times_are_over_that_of_adamw_and_curves_are_of_the_chosen_rate(drawn, tmp_path):
    config = OptimizersConfig(
        vitrm="vitrm_micro", optimizers=("adamw", "muon"), lr_factors=(1.0, 3.0),
        **{**DIGITS, "seeds": 2},
    )  # fmt: skip
    minutes = {("adamw", 1.0): 2.0, ("adamw", 3.0): 50.0, ("muon", 1.0): 50.0, ("muon", 3.0): 5.0}
    score = {("adamw", 1.0): 80.0, ("adamw", 3.0): 60.0, ("muon", 1.0): 70.0, ("muon", 3.0): 85.0}
    outcomes = []
    for plan in optimizer.plan(config):
        kind = plan.facts["optimizer"], plan.facts["lr_factor"]
        share = score[kind] / 100
        rows = [
            {"epoch": e, "seconds": 60.0 * e, "validation_accuracy": share + e / 1000}
            for e in (1.0, 2.0)
        ]
        outcomes.append(ended(plan, score[kind] + plan.facts["seed"], minutes[kind], rows))
    best, rates = optimizer.sections(config, outcomes, tmp_path)
    adamw, muon = best.measured
    assert (adamw["lr_factor"], muon["lr_factor"]) == (1.0, 3.0)
    assert (adamw["minutes_over_adamw"], muon["minutes_over_adamw"]) == (1.0, 2.5)
    assert muon["test_percent"] == pytest.approx(85.5)
    assert muon["selected_percent"] == pytest.approx(85.1)
    assert muon["deviation"] == pytest.approx(stdev([85, 86]))
    epochs, seconds, by_rate = drawn
    assert points(epochs)["Muon"] == ([1, 2], pytest.approx([85.1, 85.2]))
    assert points(seconds)["AdamW"] == ([1, 2], pytest.approx([80.1, 80.2]))
    assert points(by_rate)["AdamW"] == ([1, 3], pytest.approx([80.1, 60.1]))
    assert "".join(rates.html).count("<b>") == 2


def test_without_adamw_there_is_no_ratio_of_times(drawn, tmp_path):
    config = OptimizersConfig(
        vitrm="vitrm_micro", optimizers=("muon",), lr_factors=(1.0,), **DIGITS
    )
    (plan,) = optimizer.plan(config)
    best, _ = optimizer.sections(config, [ended(plan, 80)], tmp_path)
    assert best.measured[0]["minutes_over_adamw"] is None
    assert len(drawn) == 2  # one rate has no curve
    none, _ = optimizer.sections(config, [failed(plan, "nan")], tmp_path)
    assert none.measured[0]["lr_factor"] is none.measured[0]["minutes"] is None


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_usual_rates_are_multiplied_and_decay_stays_the_same_a_step(factor):
    config = OptimizersConfig(vitrm="vitrm_micro", lr_factors=(factor,), **DIGITS)
    for plan in optimizer.plan(config):
        found, name = plan.config.optimizer, plan.facts["optimizer"]
        if name in ("adamw", "muon"):
            assert found.options.get("damping") is None
            continue
        method = optimizer.METHODS[name]
        assert found.lr == pytest.approx(method.lr * factor)
        assert found.options["damping"] == max(1.0, method.least_damping)
        assert found.clip is found.betas is None


# Pareto


def pareto_of(tmp_path, monkeypatch, data="digits", missing=()):
    config = ParetoConfig(
        models=("vitrm_micro", "resnet_micro"), **{**DIGITS, "data": DataConfig(data), "seeds": 2}
    )
    timed = {"median_ms": 1.25, "low_ms": 1.0, "high_ms": 2.0}
    calls = []

    def measure(trained, device, rounds, threads):
        calls.append((list(trained), rounds, threads))
        return dict.fromkeys(trained, timed)

    monkeypatch.setattr(pareto, "measure_latency", measure)
    monkeypatch.setattr(pareto, "load_run", lambda path: path.name)
    outcomes = [
        failed(p) if p.name in missing else ended(p, 80 + p.facts["seed"], macs=2e6)
        for p in pareto.plan(config)
    ]
    return config, outcomes, calls


def test_costs_and_accuracy_are_drawn_against_each_other(drawn, tmp_path, monkeypatch):
    config, outcomes, calls = pareto_of(tmp_path, monkeypatch)
    (section,) = pareto.sections(config, outcomes, tmp_path)
    assert calls == [(["vitrm_micro", "resnet_micro"], 50, 1)]
    row = section.measured["models"][1]
    assert (row["model"], row["parameters"], row["macs"], row["runs"]) == (
        "resnet_micro",
        1000,
        2e6,
        2,
    )
    assert row["test_percent"] == pytest.approx(80.5)
    assert row["latency"]["median_ms"] == 1.25
    reported, *ours = drawn
    label = STUDY_MODELS["resnet_micro"].label
    expected = [0.001, 2.0, 1.25]
    assert [points(panel)[label] for panel in ours] == [
        ([x], [pytest.approx(80.5)]) for x in expected
    ]
    given = points(reported)
    assert given["ViTRM small"] == (
        [MILLIONS["cifar10"]["vitrm_small"]],
        [ACCURACY["cifar10"]["vitrm_small"][128]],
    )
    cct = [r for r in RIVALS["cifar10"] if r.label.startswith("CCT")]
    assert given["CCT-7/3×1 (300, 1500, 5000 epochs)"] == ([3.76] * 3, [r.accuracy for r in cct])
    assert "1.25 (1.00 .. 2.00)" in "".join(section.html)
    pareto.sections(config, outcomes, tmp_path)
    assert len(calls) == 1


def test_latency_is_measured_once_all_have_ended_of_those_that_did(drawn, tmp_path, monkeypatch):
    config, outcomes, calls = pareto_of(
        tmp_path, monkeypatch, missing=("vitrm_micro-s0", "vitrm_micro-s1")
    )
    pareto.sections(config, outcomes[:3], tmp_path)
    assert calls == []
    (section,) = pareto.sections(config, outcomes, tmp_path)
    assert calls == [(["resnet_micro"], 50, 1)]
    assert section.measured["models"][0]["parameters"] is None
    for changes in ({"latency_rounds": 7}, {"latency_rounds": 7, "latency_threads": 2}):
        pareto.sections(replace(config, **changes), outcomes, tmp_path)
    assert [call[1:] for call in calls] == [(50, 1), (7, 1), (7, 2)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", '{"models": 1}', "\xff", '{"rounds": 50, "threads": 1}']
)
def test_damaged_latencies_are_measured_again(drawn, tmp_path, monkeypatch, content):
    config, outcomes, calls = pareto_of(tmp_path, monkeypatch)
    (tmp_path / "latency.json").write_bytes(content.encode("latin-1"))
    pareto.sections(config, outcomes, tmp_path)
    assert len(calls) == 1
    assert read_measured(tmp_path / "latency.json")["rounds"] == 50


# Equal time


def test_a_row_has_means_of_what_is_known():
    plans = [Planned(f"net-s{n}", {"model": "net", "seed": n}, TrainConfig()) for n in range(4)]
    group = [
        ended(plans[0], 80, 2.0, cpu_seconds=120.0, test_flips={"accuracy": 0.82}, epochs=3),
        ended(plans[1], 82, 4.0, cpu_seconds=240.0, epochs=5),
        ended(plans[2], 87, 6.0, test_flips={"accuracy": 0.9}, epochs=7),
        failed(plans[3]),
    ]
    timed = {
        "int8_points": -0.5,
        "int8": {"median_ms": 0.2, "bytes": 900},
        "float32": {"bytes": 3000},
    }
    row = equal_time._row(group, timed)
    assert row["runs"] == 4
    assert row["test"] == pytest.approx(fmean([80, 82, 87]))
    assert row["deviation"] == pytest.approx(stdev([80, 82, 87]))
    assert row["flips"] == pytest.approx(86)
    assert (row["epochs"], row["minutes"], row["cpu_minutes"]) == (5, 4, 3)
    assert (row["int8_ms"], row["int8_bytes"], row["int8_points"]) == (0.2, 900, -0.5)
    assert (row["float32_ms"], row["float32_bytes"], row["error"]) == (None, 3000, None)


def test_a_model_that_always_failed_has_no_parameters_and_no_point(drawn, tmp_path):
    plans = [Planned(f"{m}-s0", {"model": m, "seed": 0}, TrainConfig()) for m in ("good", "bad")]
    config = ParetoConfig(**DIGITS, minutes=1.0)
    outcomes = [ended(plans[0], 90), failed(plans[1])]
    section = equal_time._section(config, outcomes, tmp_path, {}, {})
    good, bad = section.measured["models"]
    assert (good["parameters"], bad["parameters"]) == (1000, None)
    html = "".join(map(str, section.html))
    row = html[html.index("bad") : html.index("</tr>", html.index("bad"))]
    assert "<td>0</td>" not in row
    assert "out of memory" in row
    assert row.count("–") == 11
    assert [list(points(panel)) for panel in drawn] == [["good"], ["good"], [], [], []]
    assert drawn[0].series[0].x == [0.001]


def test_the_front_is_what_no_other_dominates():
    rows = {f"m{c}{a}": {"cost": c, "test": a} for c in range(4) for a in range(4)}
    for name, own in rows.items():
        beaten = any(
            (o["cost"] <= own["cost"] and o["test"] >= own["test"]) and o != own
            for o in rows.values()
        )
        assert is_on_front(name, "cost", rows) is not beaten
    assert [name for name in rows if is_on_front(name, "cost", rows)] == ["m03"]
