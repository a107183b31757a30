"""The four studies of training runs: what they run, and what their pages say."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smallfry.cli import main
from smallfry.errors import UsageError
from smallfry.report.runs import Outcome, accuracy_cell, best_of
from smallfry.report.runs_page import Section, write_page
from smallfry.studies import batch_size, latency, optimizer, pareto, recursion
from smallfry.studies.config import (
    STUDIES,
    BatchSizeConfig,
    OptimizersConfig,
    ParetoConfig,
    RecursionConfig,
)
from smallfry.studies.latency import choose_device, measure_latency
from smallfry.studies.recipes import Planned
from smallfry.studies.reported_vision import ACCURACY, MILLIONS
from smallfry.studies.study import run_study
from smallfry.studies.study_models import PAPER, STUDY_MODELS, StudyModel
from smallfry.training.config import DataConfig
from smallfry.training.run import load_run

NOWHERE, THREE = DataConfig("nowhere"), DataConfig(mean=[0.5] * 3, std=[0.5] * 3)
DIGITS = {"data": DataConfig("digits", limit=60), "epochs": 1, "device": "cpu"}


def ended(plan: Planned, test: float, selected: float | None = None, **more: Any) -> Outcome:
    """A run that ended with these accuracies, in percent."""
    chosen = (test if selected is None else selected) / 100
    measured = {
        "test": {"accuracy": test / 100},
        "best_epoch": 1,
        "select_on": "validation",
        "epochs": 1,
        "training_seconds": 60.0,
        "seed": plan.facts["seed"],
        "parameters": 1000,
        "macs": 2_000_000,
    }
    summary = {"measured": measured | more, "data": {"test": 359}, "provenance": {"commit": "abc<"}}
    row = {"epoch": 1.0, "seconds": 60.0, "validation_accuracy": chosen}
    return Outcome(plan.name, plan.facts, summary, [row])


def cells(html: str) -> dict[str, list[str]]:
    """The first table's body rows, by their first cell."""
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[1:]]
    return {row[0]: row[1:] for row in rows}


def spans(html: str) -> list[tuple[str, int]]:
    found = re.findall(r"<th class=group colspan=(\d+)>(.*?)</th>", html)
    return [(name, int(count)) for count, name in found]


# What is run


def test_by_default_the_studies_are_the_papers() -> None:
    plans = batch_size.plan(BatchSizeConfig())
    assert len(plans) == 7 * 5
    assert {(p.config.epochs, p.config.ema.decay) for p in plans} == {(1000, 0.999), (300, 0.0)}
    assert {p.config.select_on for p in plans} == {"validation"}
    grid = recursion.plan(RecursionConfig())
    assert len(grid) == 5 * 5 + 2 * 5
    assert len({p.name for p in grid}) == len(grid)
    assert {p.config.model.latent_steps for p in grid if p.facts["recursion_steps"] > 1} == {3}
    assert len(optimizer.plan(OptimizersConfig())) == 11 * 3


def test_every_optimizer_decays_alike_per_step() -> None:
    per_step = [
        p.config.optimizer.weight_decay * (p.config.optimizer.lr or 0) / p.facts["lr_factor"]
        for p in optimizer.plan(OptimizersConfig())
    ]
    assert per_step == pytest.approx([3e-4 * 0.05] * len(per_step))


def test_the_micro_models_are_of_one_size() -> None:
    import timm

    for name, entry in STUDY_MODELS.items():
        if "micro" in name:
            options = {**entry.options, "in_chans": 1, "num_classes": 10}
            if timm.get_pretrained_cfg(entry.model).fixed_input_size:
                options["img_size"] = 8
            model = timm.create_model(entry.model, **options)
            assert 100_000 < sum(p.numel() for p in model.parameters()) < 135_000
            assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("batch-size", BatchSizeConfig(models=("vitrm_smal",)), "did you mean 'vitrm_small'"),
        ("batch-size", BatchSizeConfig(models=()), "give at least one"),
        ("batch-size", BatchSizeConfig(batch_sizes=(64, 0)), "batch_sizes: give at least one"),
        ("recursion", RecursionConfig(vitrm="resnet18"), "resnet18 is not a ViTRM"),
        ("optimizer", OptimizersConfig(optimizers=("adam",)), "did you mean 'adamw'"),
        ("optimizer", OptimizersConfig(lr_factors=()), "lr_factors: give at least one"),
        ("pareto", ParetoConfig(seeds=0), "seeds must be at least 1"),
        ("pareto", ParetoConfig(device="cuda:99"), "cuda:99 can't be used here"),
        ("batch-size", BatchSizeConfig(data=NOWHERE), "'nowhere' is neither a folder nor"),
        ("recursion", RecursionConfig(data=NOWHERE), "'nowhere' is neither a folder nor"),
        ("pareto", ParetoConfig(data=NOWHERE, minutes=1.0), "'nowhere' is neither a folder nor"),
        ("pareto", ParetoConfig(data=THREE), "data.mean needs 1 values"),
        ("pareto", ParetoConfig(models=("lost",)), "unknown model 'no_such_model'"),
    ],
)
def test_what_can_not_be_meant_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: Any, said: str
) -> None:
    monkeypatch.setitem(STUDY_MODELS, "lost", StudyModel("Lost", "no_such_model"))
    with pytest.raises(UsageError, match=said):
        run_study(name, config, tmp_path / "study")
    assert not (tmp_path / "study").exists()


# What the pages say


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path


def test_batches_that_could_not_have_their_size_are_no_figures(folder: Path) -> None:
    config = BatchSizeConfig(models=("vitrm_small",), batch_sizes=(64, 128), seeds=1)
    outcomes = [ended(plan, 80.0) for plan in batch_size.plan(config)]
    for outcome in outcomes:
        assert outcome.summary is not None
        outcome.summary["data"]["train"] = 100
    (section,) = batch_size.sections(config, outcomes, folder)
    assert [row["runs"] for row in section.measured] == [1, 0]
    assert cells("".join(section.html))["ViTRM small"][6] == "–"


def test_reported_and_measured_batch_sizes_stand_in_columns_of_their_own(folder: Path) -> None:
    config = BatchSizeConfig(models=("vitrm_small", "vit_large"), batch_sizes=(64, 128), seeds=2)
    outcomes = [
        ended(plan, 80.0 + plan.facts["seed"] + plan.facts["batch_size"] / 64)
        for plan in batch_size.plan(config)
    ]
    oom = "out of memory: CUDA"
    outcomes = [
        o._replace(summary=None, history=[], failure=oom) if o.facts["model"] == "vit_large" else o
        for o in outcomes
    ]
    (section,) = batch_size.sections(config, outcomes, folder)
    html = "".join(section.html)
    assert spans(html)[1][0].startswith("reported, CIFAR-10")
    assert [count for _, count in spans(html)] == [1, 5, 2]
    assert spans(html)[2][0].startswith("measured here, cifar10")
    rows = cells(html)
    assert rows["ViTRM small"][:5] == ["92.6", "93.1", "92.8", "92.1", "91.2"]
    assert rows["ViTRM small"][5:] == ["81.50 ± 0.71", "<b>82.50 ± 0.71</b>"]
    assert rows["ViT-L"][4:] == ["out of memory"] * 3
    assert rows["ViT-S"][5:] == ["–", "–"]  # reported, and not run here
    assert section.reported["percent"] == ACCURACY["cifar10"]
    assert "92.6" not in json.dumps(section.measured)


def test_the_best_cell_is_the_one_that_validates_best_not_the_one_that_tests_best(
    folder: Path,
) -> None:
    config = RecursionConfig(
        latent_steps=(1, 3), supervision_steps=(1, 2), recursion_steps=(1, 2), **DIGITS
    )
    outcomes = [
        ended(p, test=90.0, selected=97.0) if p.name.startswith("n1-sup2") else ended(p, 95.0)
        for p in recursion.plan(config)
    ]
    (section,) = recursion.sections(config, outcomes, folder)
    chosen = [row for row in section.measured if row["chosen"]]
    assert [(c["latent_steps"], c["supervision_steps"]) for c in chosen] == [(1, 2)]
    html = "".join(section.html)
    assert html.count("<b>") == 1
    assert "<b>90.00</b>" in html
    assert html.count("best of its grid") == 1


def test_an_optimizers_rate_is_chosen_by_validation_and_one_that_always_fails_says_so(
    folder: Path,
) -> None:
    config = OptimizersConfig(optimizers=("adamw", "muon", "kfac"), lr_factors=(1.0, 3.0), **DIGITS)
    outcomes = []
    for p in optimizer.plan(config):
        if p.facts["optimizer"] == "muon":
            outcomes.append(Outcome(p.name, p.facts, None, [], "the loss is nan"))
        else:
            three = p.facts["lr_factor"] == 3.0
            outcomes.append(ended(p, test=80.0 if three else 85.0, selected=90.0 + three))
    best, rates = optimizer.sections(config, outcomes, folder)
    rows = cells("".join(best.html))
    assert rows["AdamW"][:4] == ["93.1", "3 ×", "<b>80.00</b>", "91.00"]
    assert rows["Muon"][2] == "failed"
    assert cells("".join(rates.html))["KFAC"] == ["85.00", "<b>80.00</b>"]


def test_a_rate_at_which_seeds_diverge_is_not_chosen_before_one_that_always_ends() -> None:
    plans = optimizer.plan(OptimizersConfig(optimizers=("adamw",), seeds=2, lr_factors=(1.0, 3.0)))
    slow, fast, slow_again, fast_again = plans
    failed = Outcome(fast_again.name, fast_again.facts, None, [], "the loss is not a finite number")
    runs = {1.0: [ended(slow, 90), ended(slow_again, 90)], 3.0: [ended(fast, 95), failed]}
    assert best_of(runs) == 1.0
    assert best_of({3.0: runs[3.0]}) == 3.0


def test_rates_that_differ_in_any_digit_have_runs_of_their_own() -> None:
    factors = (0.3, 0.1234567, 0.1234568, 1.0)
    plans = optimizer.plan(OptimizersConfig(optimizers=("adamw",), lr_factors=factors))
    assert [plan.name for plan in plans] == [
        *("adamw-lr0.3-s0", "adamw-lr0.1234567-s0", "adamw-lr0.1234568-s0", "adamw-lr1-s0")
    ]


def test_equals_are_told_apart_by_their_order() -> None:
    plans = optimizer.plan(OptimizersConfig(optimizers=("adamw",), lr_factors=(3.0, 1.0)))
    assert best_of({plan.facts["lr_factor"]: [ended(plan, 90)] for plan in plans}) == 3.0


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("batch-size", BatchSizeConfig(models=("vitrm_micro",) * 2, batch_sizes=(32, 64, 32))),
        ("recursion", RecursionConfig(latent_steps=(1, 2, 1), supervision_steps=(1, 1))),
        ("optimizer", OptimizersConfig(optimizers=("adamw",) * 2, lr_factors=(1.0, 3.0, 1.0))),
    ],
)
def test_what_is_named_twice_is_one_row_or_column(
    name: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smallfry.studies.study.require_possible", lambda *_: None)
    monkeypatch.setattr("smallfry.studies.study.run_grid", lambda *_: [])
    page = run_study(name, config, tmp_path).read_text()
    for table in re.findall("<table>.*?</table>", page, flags=re.DOTALL):
        rows = [row for row in re.findall("<tr>.*?</tr>", table) if "colspan" not in row]
        assert len({len(re.findall("<t[hd][ >]", row)) for row in rows}) == 1
    twice = [row for row in re.findall("<tr>.*?</tr>", page) if page.count(row) > 1]
    assert twice == []


def test_figures_are_told_with_seed_commit_device_and_protocol() -> None:
    (plan,) = batch_size.plan(BatchSizeConfig(models=("vit_small",), batch_sizes=(64,)))
    done = ended(plan, 93.2)
    failed = Outcome("other", {"seed": 1}, None, [], "<script>")
    page, summary = write_page("t & t", "about", [Section("s", [], None)], [done, failed], 3)
    assert "2 of 3 runs have ended, 1 of them failed" in page
    assert "best epoch by held-out validation, test read once" in page
    assert "One of 359 test images is 0.28 points" in page
    assert "abc&lt;" in page
    assert "<script>" not in page
    assert summary["runs"][0]["measured"]["seed"] == 0
    flattering = done._replace(
        summary={**done.summary, "measured": {**done.summary["measured"], "select_on": "test"}}
    )
    assert "flatters" in write_page("t", "", [], [flattering], 1)[0]


def test_a_cell_tells_runs_that_failed_among_others() -> None:
    plans = batch_size.plan(BatchSizeConfig(models=("vit_small",), batch_sizes=(64,), seeds=2))
    outcomes = [ended(plans[0], 93.2), Outcome("x", plans[1].facts, None, [], "nan")]
    assert "93.20" in accuracy_cell(outcomes)
    assert "1 of 2 failed" in accuracy_cell(outcomes)
    assert accuracy_cell([]) == "–"


def test_reported_figures_are_of_the_papers_models() -> None:
    for data in ACCURACY:
        assert set(ACCURACY[data]) == set(MILLIONS[data]) == set(PAPER)


# Whole


@pytest.mark.slow
def test_pareto_runs_end_to_end_and_measures_latency_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ParetoConfig(models=("vitrm_micro", "resnet_micro"), latency_rounds=4, **DIGITS)
    page = run_study("pareto", config, tmp_path)
    html, summary = page.read_text(), json.loads((tmp_path / "summary.json").read_text())
    assert "http" not in re.sub(r'http-equiv|"data:image[^"]*"', "", html)
    models = summary["measured"]["Accuracy against cost"]["models"]
    assert [m["model"] for m in models] == ["vitrm_micro", "resnet_micro"]
    assert all(0 < m["latency"]["low_ms"] <= m["latency"]["median_ms"] for m in models)
    assert "1 thread, all models in turns" in html
    monkeypatch.setattr(pareto, "measure_latency", pytest.fail)
    run_study("pareto", config, tmp_path)
    with pytest.raises(UsageError, match="have epochs 1, not 2"):
        run_study("pareto", replace(config, epochs=2), tmp_path)


def test_latency_is_measured_with_the_threads_asked_for(tmp_path: Path) -> None:
    config = BatchSizeConfig(models=("resnet_micro",), batch_sizes=(16,), **DIGITS)
    run_study("batch-size", config, tmp_path)
    trained = {"one": load_run(tmp_path / "runs" / "resnet_micro-b16-s0")}
    seen = []
    trained["one"].model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    found = measure_latency(trained, torch.device("cpu"), rounds=3, threads=1)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    assert found["one"]["low_ms"] <= found["one"]["median_ms"] <= found["one"]["high_ms"]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_latency_waits_for_whatever_accelerator(kind: str, monkeypatch: Any) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind)
    )
    assert choose_device("auto") == torch.device(kind)
    elsewhere = torch.zeros(1, device="meta")  # stands for any device but the CPU
    latency._answer(torch.nn.Identity(), elsewhere)
    assert waited == [elsewhere.device]


def test_the_short_form_takes_what_it_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    told = []
    monkeypatch.setattr("smallfry.cli.study.run", lambda options: told.append(options) or 0)
    short = ["study", "optimizer", "--short", "--folder", str(tmp_path)]
    assert main([*short, "--seeds", "1", "--epochs", "3", "--data.limit", "50"]) == 0
    config = told[0].settings
    assert (told[0].study, told[0].folder) == ("optimizer", tmp_path)
    assert (config.data.name, config.data.limit, config.epochs) == ("digits", 50, 3)
    assert config.lr_factors == STUDIES["optimizer"].short["lr_factors"]
    assert main(["study", "optimizer", "--data", "cifar100"]) == 0
    assert told[1].settings == OptimizersConfig(data=DataConfig("cifar100"))
    assert main(["study", "autoencoder", "--short", "--seeds", "2"]) == 0
    assert (told[2].settings.seeds, told[2].settings.seconds, told[2].settings.problem) == (
        2,
        4.0,
        "curves",
    )


def test_a_file_can_not_ask_for_the_short_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("short: true\n")
    assert main(["study", "pareto", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "on the command line: --short" in capsys.readouterr().err
    assert main(["study", "pareti"]) == 2
    assert "did you mean 'pareto'" in capsys.readouterr().err
