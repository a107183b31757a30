import json
import shutil

import numpy as np
import pytest
from graph_ranges import call_ranges
from PIL import Image

from smallfry.cli import main
from smallfry.deploy import Runtime
from smallfry.deploy import export as exporting
from smallfry.deploy.export import Traced, calibration_images
from smallfry.deploy.quantization_report import (
    PICTURE,
    REPORT,
    Span,
    coarseness,
    print_report,
    spans_of,
)
from smallfry.deploy.quantize import CallRange, measured_ranges
from smallfry.report.quantization import draw_ranges
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run


@pytest.fixture(scope="module")
def report(int8):
    return json.loads((int8 / REPORT).read_text())


@pytest.fixture(scope="module")
def images(run):
    """What the ranges were measured on."""
    trained = load_run(run)
    data = load_like(trained, run, split="train")[0]
    return calibration_images(Traced(trained, {}, "whole", {}, data))


def graphs_of(export):
    return {file.stem: file.read_bytes() for file in sorted(export.glob("*.onnx"))}


def test_the_report_says_what_eight_bits_cost(run, int8, report):
    assert report["precision"] == "int8"
    assert report["eight_bits"]["bytes"] == (int8 / "model.onnx").stat().st_size
    assert report["eight_bits"]["bytes"] < report["float32"]["bytes"]
    tested = json.loads((run / "summary.json").read_text())["measured"]["test"]
    for name in ("accuracy", "macro_f1"):
        assert report["float32"][name] == pytest.approx(tested[name])
    assert report["measured_on"] == "359 test images of digits"
    assert 0.9 < report["agreement"] <= 1
    difference = abs(report["float32"]["accuracy"] - report["eight_bits"]["accuracy"])
    assert difference <= 1 - report["agreement"] + 1e-6
    for name in ("float32", "eight_bits"):
        assert 0 < report[name]["latency_ms"]["p50"] <= report[name]["latency_ms"]["p95"]


def test_the_report_names_no_folder_of_the_machine(run, int8, report):
    assert str(run.parent) not in (int8 / REPORT).read_text()
    assert report["provenance"]["versions"]["smallfry"]


@pytest.mark.slow
def test_the_report_stands_beside_the_export_and_goes_with_it(
    run, whole, int8, tmp_path, monkeypatch
):
    assert Image.open(int8 / PICTURE).size[0] > 1000
    Runtime(int8)
    copy = tmp_path / "export"
    shutil.copytree(int8, copy)
    monkeypatch.setattr(exporting, "trace_graphs", lambda *_: graphs_of(whole))
    exporting.export(run, copy, "whole")
    assert sorted(file.name for file in copy.iterdir()) == ["manifest.json", "model.onnx"]


def is_alike(ours, theirs):
    """Whether two ranges of a weight's inputs differ by at most a step of their eight bits."""
    grain = (theirs.high - theirs.low) / 255
    low, high = abs(min(ours.low, 0) - theirs.low), abs(max(ours.high, 0) - theirs.high)
    return ours.weight == theirs.weight and max(low, high) <= grain * (1 + 1e-6)


def test_ranges_are_those_that_the_quantizer_took(whole, int8, images):
    measured = measured_ranges(graphs_of(whole), images)["model"][0]
    taken = call_ranges((int8 / "model.onnx").read_bytes())
    assert len(measured) == len(taken)
    left = list(taken)
    for ours in measured:  # calls of a weight, in another order
        alike = [theirs for theirs in left if is_alike(ours, theirs)]
        assert alike, ours
        left.remove(alike[0])


def test_both_forms_have_the_same_ranges(whole, anytime, images):
    found = []
    for export_folder in (whole, anytime):
        spans = spans_of(measured_ranges(graphs_of(export_folder), images, 3), 3)
        found.append({span[:4]: span[4:] for span in spans})
    whole, anytime = found
    assert len(whole) == 4 * 3 * 2  # products × recursion steps × applications of one layer
    assert whole.keys() == anytime.keys()
    for key, limits in whole.items():
        if key[0] == "attn.qkv":  # one graph projects x in every step, the other once for all
            assert anytime[key][0] <= limits[0] + 1e-3
            assert anytime[key][1] >= limits[1] - 1e-3
            continue
        np.testing.assert_allclose(anytime[key], limits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("within", ["", ".layer"])  # of an adapter
def test_an_application_ends_with_the_last_product_of_the_block(within):
    names = ["qkv", "qkv", "fc2"] + ["qkv", "fc2"] * 3
    calls = [
        CallRange(f"m.blocks.0.at.{name}{within}.weight.transposed", i, -1.0 - i, i)
        for i, name in enumerate(names)
    ]
    spans = spans_of({"model": [[CallRange("patch_embed.weight", 0, 0, 1), *calls]]}, 2)
    assert [(s.product, s.step, s.application) for s in spans] == [
        ("at.qkv", 1, 1), ("at.fc2", 1, 1), ("at.qkv", 1, 2), ("at.fc2", 1, 2),
        ("at.qkv", 2, 3), ("at.fc2", 2, 3), ("at.qkv", 2, 4), ("at.fc2", 2, 4),
    ]  # fmt: skip
    assert spans[0][4:] == (-2.0, 1)  # of both parts


def test_a_model_without_a_shared_block_has_no_spans():
    assert spans_of({"model": [[CallRange("conv1.weight", 0, 0.0, 1.0)]]}, 1) == []


def test_one_scale_is_as_coarse_as_all_ranges_together_are_wide():
    spans = [Span("p.q", 0, 1, i, low, high) for i, (low, high) in enumerate([(-1, 1), (0, 4)])]
    assert coarseness(spans) == [
        {"product": "p.q", "layer": 0, "median": (5 / 2 + 5 / 4) / 2, "worst": 5 / 2}
    ]


@pytest.mark.slow
def test_dynamic_ranges_have_a_report_without_ranges(run, tmp_path, capsys):
    target = tmp_path / "export"
    arguments = ["export", str(run), "--to", str(target), "--form", "whole"]
    assert main([*arguments, "--precision", "int8_dynamic"]) == 0
    said = capsys.readouterr().out
    assert "answers as in float32" in said
    assert "359 test images of digits" in said
    assert "ranges" not in json.loads((target / REPORT).read_text())
    assert not (target / PICTURE).exists()


def test_without_test_images_the_report_says_so(int8, tmp_path, report, capsys):
    for name in ("float32", "eight_bits"):
        report[name] = {k: v for k, v in report[name].items() if k not in ("accuracy", "macro_f1")}
    told = {k: v for k, v in report.items() if k not in ("agreement", "measured_on")}
    (tmp_path / REPORT).write_text(json.dumps(told))
    print_report(tmp_path)
    said = capsys.readouterr().out
    assert "no test images were at hand" in said
    assert "–" in said


@pytest.mark.parametrize("products", [1, 3])
def test_ranges_are_drawn_for_any_number_of_products(tmp_path, products):
    spans = [
        Span(f"mlp.fc{p}", layer, 1 + at // 2, at + 1, -1.0 - at, 2.0 * layer)
        for p in range(products)
        for layer in range(2)
        for at in range(4)
    ]
    draw_ranges(spans, tmp_path / "picture.png")
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("L")).std() > 5
