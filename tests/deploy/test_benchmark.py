import json
import shutil

import numpy as np
import pytest
import torch

from smallfry.cli import main
from smallfry.deploy import Manifest, Runtime, benchmark, contestants
from smallfry.deploy.benchmark import BenchmarkConfig, measure
from smallfry.deploy.memory import Memory
from smallfry.errors import ExportError, RunError, UsageError
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run
from smallfry_runtime.files import with_digest

pytestmark = pytest.mark.slow

QUICK = {"seconds": 0.02, "batch_sizes": (1, 3)}


@pytest.fixture(autouse=True)
def _memory_unmeasured(monkeypatch):
    """Each measurement starts a process; test_memory.py has its own."""
    monkeypatch.setattr(benchmark, "measure_memory", lambda *_: Memory(100, {1: 200, 3: 300}))


@pytest.fixture(scope="module")
def tested(run):
    return load_like(load_run(run), run)[1]


def by_form(found):
    return {figures.form: figures for figures in found.figures}


@pytest.fixture(scope="module")
def of_the_run(run):
    """A run in PyTorch, compiled by a compiler that does nothing, and exported on the fly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **_: model)
        patch.setattr(benchmark, "measure_memory", lambda *_: None)
        forms = ("eager", "compiled", "float32", "exit")
        return measure([str(run)], BenchmarkConfig(forms=forms, **QUICK))


@pytest.mark.slow
def test_a_run_is_measured_in_all_its_forms(run, of_the_run):
    found = by_form(of_the_run)
    assert list(found)[:3] == ["PyTorch eager", "PyTorch compiled", "ONNX float32"]
    assert any("float32, exit at drop 0" in form for form in found)
    assert any("int8, exit at drop 0" in form for form in found)
    assert of_the_run.left_out == []
    wanted = json.loads((run / "summary.json").read_text())["measured"]
    for figures in list(found.values())[:3]:
        assert figures.accuracy == pytest.approx(wanted["test"]["accuracy"])
        assert figures.macro_f1 == pytest.approx(wanted["test"]["macro_f1"])
        assert figures.agreement == 1
        assert figures.parameters == wanted["parameters"]
        assert figures.steps is None
    weights = (run / "best" / "model.safetensors").stat().st_size
    assert found["PyTorch eager"].file_bytes == pytest.approx(weights, rel=0.1)
    assert of_the_run.measured_on == "359 test images of digits"
    for figures in found.values():
        assert all(0 < taken.p50 <= taken.p95 for taken in figures.latency.values())
        assert list(figures.latency) == [1, 3]


def test_early_exit_is_measured_on_the_test_images(of_the_run):
    for form, figures in by_form(of_the_run).items():
        if "exit" in form:
            assert 1 <= figures.steps <= 3
            assert 0 <= figures.agreement <= 1


def test_the_threads_of_the_process_are_as_before(int8):
    torch.set_num_threads(2)
    measure([str(int8)], BenchmarkConfig(**QUICK))
    assert torch.get_num_threads() == 2


def test_an_export_is_tested_on_the_images_that_its_run_was(int8, anytime, tested):
    found = measure([str(int8), str(anytime)], BenchmarkConfig(**QUICK), data="digits")
    assert found.measured_on == "359 test images of digits"  # not those that it was trained on
    answers = Runtime(int8).predict(tested.images.numpy()).probabilities.argmax(axis=1)
    figures = by_form(found)
    right = float((answers == tested.labels.numpy()).mean())
    assert figures["ONNX int8"].accuracy == pytest.approx(right)
    reference = Runtime(anytime).predict(tested.images.numpy()).probabilities.argmax(axis=1)
    assert figures["ONNX int8"].agreement == pytest.approx(float((answers == reference).mean()))
    assert figures["ONNX float32, in parts"].agreement == 1
    assert any("exit at drop 0" in form for form in figures)
    assert figures["ONNX int8"].memory.peaks[3] == 300


def test_without_images_there_is_latency_and_no_early_exit(anytime):
    found = measure([str(anytime)], BenchmarkConfig(**QUICK))
    (figures,) = found.figures
    assert (figures.accuracy, figures.agreement, found.measured_on) == (None, None, None)
    assert figures.latency[3].p50 > 0
    assert found.left_out
    assert all("--data" in left.reason for left in found.left_out)


def test_an_int8_export_alone_is_held_against_nothing(int8):
    found = measure([str(int8)], BenchmarkConfig(**QUICK), data="digits")
    assert found.figures[0].accuracy is not None
    assert found.figures[0].agreement is None


def test_a_failing_compiler_leaves_its_form_out(run, tmp_path, monkeypatch):
    def broken(model, **_):
        raise RuntimeError("\nno working C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    whole = contestants.of_run(str(run), "best", tmp_path, ("compiled",), (1,), 1)
    assert list(whole) == [(run.name, "PyTorch compiled", "no working C++ compiler")]


def test_peers_take_the_same_images_and_classes_and_have_no_accuracy(int8, monkeypatch):
    monkeypatch.setattr(contestants, "PEERS", ("cct_2_3x2_32", "paper_vit_small_patch4_33"))
    config = BenchmarkConfig(forms=("float32",), peers=True, **QUICK)
    found = measure([str(int8)], config, data="digits")
    peer = found.figures[-1]
    assert (peer.model, peer.form) == ("cct_2_3x2_32", "ONNX float32")
    assert not peer.is_trained
    assert peer.accuracy is None
    assert peer.latency[1].p50 > 0
    assert [left.model for left in found.left_out] == ["paper_vit_small_patch4_33"]


def test_exports_of_one_name_are_told_apart(int8, tmp_path):
    shutil.copytree(int8, tmp_path / int8.name)
    found = measure([str(int8), str(tmp_path / int8.name)], BenchmarkConfig(**QUICK))
    assert [figures.model for figures in found.figures] == ["int8", "int8 (2)"]


def with_classes(export, target, classes):
    shutil.copytree(export, target)
    content = json.loads((target / "manifest.json").read_text()) | {"classes": classes}
    (target / "manifest.json").write_text(json.dumps(with_digest(content)))
    return str(target)


def test_models_of_different_classes_are_not_compared(run, int8, tmp_path):
    letters = with_classes(int8, tmp_path / "letters", list("abcdefghij"))
    assert Manifest.read(tmp_path / "letters").classes[0] == "a"
    with pytest.raises(UsageError, match=r"different classes, 10 \(0, 1, 2, …\) and 10 \(a"):
        measure([str(run), letters], BenchmarkConfig(**QUICK))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": (4, 0)}, r"at least 1, got \[4, 0\]"),
        ({"batch_sizes": ()}, "at least 1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 2**31}, "threads must be at most 1024"),
        ({"seconds": 0}, "more than 0"),
        ({"seconds": float("inf")}, "finite"),
        ({"seconds": float("nan")}, "more than 0"),
        ({"forms": ("eagre",)}, "did you mean 'eager'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        BenchmarkConfig(**settings)


def test_what_is_no_model_is_refused(tmp_path, int8):
    with pytest.raises(RunError, match=r"no such file or folder; .*, an export or"):
        measure([str(tmp_path / "nothing")])
    broken = shutil.copytree(int8, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match="truncated or damaged"):
        measure([str(broken)], BenchmarkConfig(**QUICK))


def test_the_command_writes_a_report(int8, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["benchmark", str(int8), "--seconds", "0.02", "--batch_sizes", "1", "3"]
    assert main([*arguments, "--data", "digits", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "ONNX int8" in said
    assert "359 test images of digits" in said
    page = tmp_path / "exports" / "benchmark-int8" / "report.html"
    assert f"report: {page.relative_to(tmp_path)}" in said
    assert page.is_file()
    assert main([*arguments, "--json", "--folder", str(tmp_path / "again")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"][0]["latency"]["3"]["calls"] > 0
    assert told == json.loads((tmp_path / "again" / "summary.json").read_text())
    assert str(int8.parent) not in (tmp_path / "again" / "summary.json").read_text()


def test_the_command_tells_what_is_wrong_before_it_measures(int8, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", pytest.fail)
    assert main(["benchmark", str(int8), "--batch_sizes", "0"]) == 2
    assert "batch sizes must be at least 1" in capsys.readouterr().err
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    assert main(["benchmark", str(int8), "--folder", str(tmp_path)]) == 1
    assert "not a benchmark; use another" in capsys.readouterr().err


def test_a_batch_goes_on_from_the_beginning_after_the_last_image():
    pixels = np.arange(5)
    assert benchmark._batch(pixels, 3, 4).tolist() == [3, 4, 0, 1]
