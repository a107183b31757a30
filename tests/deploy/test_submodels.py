"""Sub-models of a nested run: measured, chosen under budgets, exported, switched at run time."""

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from smallfry.cli import main
from smallfry.compress import LowRank, SortedNet, apply
from smallfry.costing import macs
from smallfry.deploy import submodels
from smallfry.deploy.export import export
from smallfry.deploy.submodels import (
    Row,
    best_under,
    extracted,
    front,
    measure,
    read_table,
    write_table,
)
from smallfry.errors import ExportError, RunError, UsageError
from smallfry.training.config import DataConfig, ModelConfig, TrainConfig
from smallfry.training.evaluation import predict, score
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run
from smallfry.training.train import train
from smallfry.transforms.nested import SubModel, nest_of
from smallfry_runtime.__main__ import main as runtime_main
from smallfry_runtime.manifest import MANIFEST, Manifest
from smallfry_runtime.runtime import Runtime
from smallfry_runtime.shared import restore
from smallfry_runtime.variants import Variant, best_within, read_variants

HALF = SubModel(width=0.5)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A run with two sub-models, trained for two seconds on digits."""
    folder = tmp_path_factory.mktemp("runs") / "nested"
    train(
        TrainConfig(
            data=DataConfig(limit=400),
            model=ModelConfig(name="gated_mlp"),
            methods=[SortedNet(widths=(0.5, 1.0))],
            epochs=1,
            threads=1,
            references=False,
            run=folder,
            progress="quiet",
        )
    )
    return folder


@pytest.fixture(scope="module")
def rows(nested):
    """Figures of all sub-models, by the command."""
    assert main(["evaluate", str(nested), "--submodels", "--json"]) == 0
    found = read_table(load_run(nested), nested)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def exported(nested, rows, tmp_path_factory):
    """An export of both, with figures that put them in order."""
    trained = load_run(nested)
    ordered = [row._replace(ms=3.0 - i, accuracy=0.9 - i / 10) for i, row in enumerate(rows)]
    write_table(ordered, trained, nested)
    folder = export(nested, tmp_path_factory.mktemp("exports") / "nested", submodels=2)
    write_table(rows, trained, nested)
    return folder


def edited(exported, tmp_path, change):
    folder = tmp_path / "edited"
    shutil.copytree(exported, folder)
    manifest = change(Manifest.read(folder))
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def slow_and_fast(manifest):
    """Give the sub-models latencies of 3 and 2 ms and falling accuracies."""
    ordered = sorted(manifest.submodels, key=lambda each: -each.macs)
    figures = zip(ordered, (3.0, 2.0), (0.9, 0.8), strict=True)
    return replace(manifest, submodels=tuple(v._replace(ms=ms, accuracy=a) for v, ms, a in figures))


def test_figures_are_those_of_the_extracted_models(nested, rows):
    trained = load_run(nested)
    _, split, _ = load_like(trained, nested, split="validation")
    assert [row.submodel for row in rows] == [SubModel(), HALF]
    for row in rows:
        small = extracted(trained, row.submodel)
        said = predict(small.model, split, small.normalize)
        assert row.accuracy == score(said)["accuracy"]
        assert row.parameters == sum(p.numel() for p in small.model.parameters())
        assert row.macs == macs(small.model, torch.zeros(1, 1, 8, 8))
        assert row.ms > 0
    for larger, smaller in pairwise(rows):
        assert smaller.macs < larger.macs
        assert smaller.bytes < larger.bytes
    with pytest.raises(UsageError, match="hold some out"):
        measure(trained, split.take(torch.arange(0)))


def test_an_extracted_sub_model_is_a_run_that_can_be_compressed(nested, tmp_path):
    small = extracted(load_run(nested), HALF)
    again = load_run(small.save(tmp_path / "half"))
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(again.model(images), small.model(images))
    with pytest.raises(UsageError, match="no sub-models"):
        nest_of(again.model)
    data, _, _ = load_like(small, nested, split="train")
    rank = apply(small, [LowRank(keep=0.5, include=("blocks.1.fc2",))], data)
    assert [each.kind for each in rank.spec.transforms] == ["resize", "replace"]


ROWS = [
    Row(SubModel(), 0.9, 100, 10, 1000, 3.0),
    Row(SubModel(width=0.5), 0.8, 50, 5, 500, 1.0),
    Row(SubModel(width=0.75), 0.8, 75, 7, 700, 2.0),
    Row(SubModel(width=0.25), 0.6, 25, 3, 300, 1.5),
]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({}, 0),
        ({"macs": 99}, 1),
        ({"ms": 2.5}, 1),
        ({"bytes": 400}, 3),
        ({"macs": 100, "bytes": 1000, "ms": 3}, 0),
    ],
)
def test_the_most_accurate_within_the_budgets_is_chosen(budget, expected):
    assert best_under(ROWS, **budget) == ROWS[expected]


def test_a_budget_that_nothing_meets_names_the_least():
    with pytest.raises(UsageError, match=r"within ms 0\.5, bytes 200; the least of each: ms 1, by"):
        best_under(ROWS, ms=0.5, bytes=200)
    with pytest.raises(UsageError, match=r"the fastest, width 0\.5, took 1 ms"):
        best_within([Variant("full", "", 3, 0.9, 9), Variant("width 0.5", "1", 1, 0.8, 5)], 0.5)
    with pytest.raises(UsageError, match="has no sub-models"):
        best_within([], 5)


def test_the_front_has_what_no_other_beats():
    assert front(ROWS) == [ROWS[1], ROWS[0]]


def test_a_table_is_kept_with_the_run_and_is_of_its_weights(nested, tmp_path):
    trained = load_run(nested)
    assert read_table(trained, tmp_path) is None
    write_table(ROWS, trained, tmp_path)
    assert read_table(trained, tmp_path) == ROWS
    other = trained._replace(model=copy.deepcopy(trained.model))
    other.model.head.bias.data += 1
    assert read_table(other, tmp_path) is None
    for damaged in ('{"weights": 3', '{"rows": []}', "[]"):
        (tmp_path / "submodels.json").write_text(damaged)
        with pytest.raises(RunError, match=r"submodels\.json: damaged"):
            read_table(trained, tmp_path)


def test_the_runtime_switches_to_the_best_sub_model_within_a_budget(exported, nested, tmp_path):
    folder = edited(exported, tmp_path, slow_and_fast)
    runtime = Runtime(folder, threads=1)
    assert runtime.within(3.5) is runtime
    trained = load_run(nested)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
    inputs = trained.normalize(torch.from_numpy(pixels))
    by_name = {str(s): s for s in nest_of(trained.model).nested.submodels}
    chosen = runtime.within(2.5)
    small = extracted(trained, by_name[runtime.manifest.submodels[1].name])
    expected = small.model(inputs).softmax(1).detach().numpy()
    assert np.abs(chosen.predict(pixels).probabilities - expected).max() < 1e-5
    assert runtime.within(2.0) is chosen
    assert chosen.file_bytes < runtime.file_bytes
    with pytest.raises(UsageError, match="met by no sub-model"):
        runtime.within(0.5)


def test_the_figures_of_an_export_are_in_its_manifest(exported, rows):
    manifest = Manifest.read(exported)
    full, *others = manifest.submodels
    assert (full.name, full.place) == ("full", "")
    assert {each.name for each in others} == {"width 0.5"}
    assert all(each.macs < full.macs == manifest.model["macs"] for each in others)
    assert all(each.ms > 0 and 0 <= each.accuracy <= 1 for each in manifest.submodels)
    accuracies = [row.accuracy for row in rows]
    assert [each.accuracy for each in manifest.submodels] == pytest.approx(accuracies)


def place(folder):
    return folder / "submodels" / "1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(place(f)), "no such export"),
        (lambda f: (place(f) / "model.onnx.shared").write_bytes(b""), "truncated"),
        (
            lambda f: shutil.copy(f / MANIFEST, place(f)),
            "are missing|can't be read|no such|damaged",
        ),
    ],
)
def test_a_damaged_sub_model_is_refused(exported, tmp_path, damage, message):
    folder = edited(exported, tmp_path, slow_and_fast)
    damage(folder)
    with pytest.raises(ExportError, match=message):
        Runtime(folder).within(2.5)


def test_a_sub_model_shares_the_weights_of_the_full_export(exported, nested, tmp_path):
    part, whole = place(exported) / "model.onnx.shared", exported / "model.onnx"
    alone = export(extracted(load_run(nested), HALF), tmp_path / "alone")
    graph = (alone / "model.onnx").read_bytes()
    floats = sum(len(t.raw_data) for t in onnx.load_from_string(graph).graph.initializer)
    assert part.stat().st_size < len(graph) - 0.9 * floats
    assert restore(part.read_bytes(), whole.read_bytes()) == graph
    assert Manifest.read(place(exported)).storage == "shared"
    pixels = np.random.default_rng(0).integers(0, 17, (7, 1, 8, 8), np.uint8)
    wanted = Runtime(alone).predict(pixels).probabilities
    given = Runtime(place(exported)).predict(pixels).probabilities  # alone, without the full one's
    assert np.array_equal(given, wanted)


def test_a_sub_model_beside_other_weights_is_refused(exported, tmp_path):
    folder = edited(exported, tmp_path, slow_and_fast)
    content = (folder / "model.onnx").read_bytes()
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    (folder / "model.onnx").write_bytes(changed)
    digest = hashlib.sha256(changed).hexdigest()
    manifest = Manifest.read(folder)
    files = {**manifest.files, "model.onnx": digest}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json())
    with pytest.raises(ExportError, match="not the one that this sub-model shares"):
        Runtime(place(folder))


def test_a_sub_model_of_another_export_is_refused(exported, tmp_path):
    folder = edited(exported, tmp_path, slow_and_fast)
    there = place(folder)
    shutil.rmtree(there)
    shutil.copytree(exported, there)
    with pytest.raises(ExportError, match="not the sub-model that was exported"):
        Runtime(folder).within(2.5)


GOOD = {"name": "half", "place": "1", "ms": 1.0, "accuracy": 0.5, "macs": 3}


@pytest.mark.parametrize(
    "content",
    [
        {},
        [GOOD] * 2,
        [GOOD] * 1001,
        [{**GOOD, "place": "../1"}],
        [{**GOOD, "place": "²"}],
        [{**GOOD, "place": 1}],
        [{**GOOD, "name": None}],
        [{**GOOD, "ms": float("nan")}],
        [{**GOOD, "ms": True}],
        [{**GOOD, "more": 1}],
    ],
)
def test_wrong_sub_models_of_a_manifest_are_refused(content):
    with pytest.raises(TypeError):
        read_variants(content)
    assert read_variants([GOOD]) == (Variant(**GOOD),)


def test_the_commands_take_a_budget(exported, nested, tmp_path, capsys):
    folder = edited(exported, tmp_path, slow_and_fast)
    picture = tmp_path / "a.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture)
    assert main(["predict", str(folder), str(picture), "--budget_ms", "2.5", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert runtime_main([str(folder), str(picture), "--budget_ms", "2.5"]) == 0
    assert json.loads(capsys.readouterr().out)["class"] == one["class"]
    assert main(["predict", str(folder), str(picture), "--budget_ms", "0.1"]) == 2
    assert "met by no sub-model" in capsys.readouterr().err
    assert main(["predict", str(nested), str(picture), "--budget_ms", "1"]) == 2
    assert "export the run with --submodels" in capsys.readouterr().err


def test_the_figures_of_all_sub_models_are_printed(nested, rows, capsys, monkeypatch):
    monkeypatch.setattr(submodels, "measure", lambda trained, split: rows)
    assert main(["evaluate", str(nested), "--submodels"]) == 0
    printed = capsys.readouterr().out
    assert all(str(row.submodel) in printed for row in rows)
    assert f"{rows[1].macs}" in printed


def test_a_run_without_sub_models_has_none_to_export(run, tmp_path):
    with pytest.raises(UsageError, match="has no sub-models"):
        export(run, tmp_path / "x", submodels=2)
    assert not (tmp_path / "x").exists()
