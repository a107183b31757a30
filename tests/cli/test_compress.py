"""``smallfry compress``."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from smallfry.cli import main

RUN = Path(__file__).parents[1] / "fixtures" / "format_2" / "run"
ROUND = "[{round_weights: {bits: 8}}]"
TUNED = ["--methods", "[{magnitude: {divisible: 2}}]", "--epochs", "1"]
HESSO = "{hesso: {sparsity: 0.4, divisible: 2, begin: 0, end: 0.8, periods: 2}}"
FAST = "{optimizer.name: adamw, augment.mixup: 0.0, batch_size: 32}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(shutil.copytree(RUN, tmp_path / "run"))


@pytest.mark.slow
def test_a_compressed_run_is_evaluated_exported_and_compressed_again(run, capsys):
    methods = "[{low_rank: {keep: 0.9, smallest: 64, include: ['*.mlp.*']}}]"
    assert main(["compress", run, "--methods", methods, "--to", "small"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "smallfry evaluate small" in out
    assert main(["compress", "small", "--methods", ROUND, "--to", "smaller", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file_bytes"]["after"] < found["file_bytes"]["before"]
    assert found["agreement"] > 0.9
    assert [list(each) for each in found["methods"]] == [["low_rank"], ["round_weights"]]
    assert json.loads(Path("smaller/compression.json").read_text())["macs"] == found["macs"]
    assert main(["evaluate", "smaller", "--json"]) == 0
    assert main(["export", "smaller", "--to", "export"]) == 0


def test_methods_come_from_a_file_too(run, capsys):
    Path("small.yaml").write_text("methods:\n- round_weights:\n    bits: 4\n")
    assert main(["compress", run, "--config", "small.yaml"]) == 0
    small = Path(f"{run}-small")
    assert (small / "best/manifest.json").is_file()
    assert f"page:    {small}/compression.html" in capsys.readouterr().out
    page = (small / "compression.html").read_text()
    assert "<h1>Compressed: run-small</h1>" in page
    assert "weights, bytes" in page
    assert (small / "pictures/layers.png").is_file()
    layers = json.loads((small / "compression.json").read_text())["layers"]
    (head,) = (each for each in layers if each["name"] == "head")
    assert head["bytes"] == {"before": 4 * 170, "after": 160 + 4 * 10 + 4 * 10}


@pytest.mark.slow
def test_a_shared_model_is_compressed_into_a_shared_folder(run, capsys):
    assert main(["share", run, "--to", "shared"]) == 0
    given = ["compress", "shared", "--data", "digits", "--methods", "[{quantize: {weights: 4}}]"]
    assert main(given) == 0
    assert "smallfry evaluate shared-small" in capsys.readouterr().out
    config = json.loads(Path("shared-small/config.json").read_text())
    assert [list(each) for each in config["smallfry"]["methods"]] == [["quantize"]]
    assert Path("shared-small/compression.json").is_file()
    assert main(["evaluate", "shared-small", "--data", "digits", "--json"]) == 0
    exported = ["--data", "digits", "--precision", "own_bits", "--to", "export"]
    assert main(["export", "shared-small", *exported]) == 0
    assert main(given) == 1
    assert "shared-small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "[round_wights]"], "did you mean 'round_weights'"),
        (["--methods", "[{round_weights: {bit: 8}}]"], "did you mean 'bits'"),
        (["--methods", "[]"], "at least one"),
        ([], "methods"),
        (["--methods", "[round_weights, low_rank]"], "no linear layer or convolution left"),
        (["--methods", "[hesso]"], "'hesso' acts during training: give a budget, --epochs N"),
        (["--methods", ROUND, "--distill", "0.5"], "need a budget"),
        (["--methods", ROUND, "--epochs", "1", "--minutes", "1"], "excludes"),
        (["--methods", ROUND, "--epochs", "0"], "at least 1"),
        (["--methods", ROUND, "--epochs", "1", "--distill", "2"], "0 to 1"),
        ([*TUNED, "--tuning", "{optimiser.lr: 1}"], "did you mean 'optimizer.lr'"),
        ([*TUNED, "--tuning", "{epochs: 3}"], "the command sets it"),
        ([*TUNED, "--tuning", "{optimizer.name: adamv}"], "did you mean"),
        (["--methods", "[{hesso: {sparsity: 2}}]", "--epochs", "1"], r"must be in [0, 1)"),
    ],
)
def test_what_can_not_be_meant_is_refused_and_nothing_is_written(run, capsys, words, message):
    assert main(["compress", run, *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path(f"{run}-small").exists()


def test_a_folder_that_is_taken_is_refused_before_the_work(run, capsys):
    Path("mine").mkdir()
    Path("mine/file").write_text("of mine")
    assert main(["compress", run, "--methods", ROUND, "--to", "mine"]) == 1
    assert "is no run folder" in capsys.readouterr().err


def test_images_of_other_classes_are_refused_and_nothing_is_written(run, capsys):
    for name in ("cat", "dog"):
        Path("pets", name).mkdir(parents=True)
        for number in range(5):
            Image.new("L", (8, 8), 50 * number).save(Path("pets", name, f"{number}.png"))
    for words in (["compress", run, "--methods", ROUND], ["evaluate", run]):
        assert main([*words, "--data", "pets"]) == 1
        assert "has 2 (cat, dog, …); give data with its own classes" in capsys.readouterr().err
    assert not Path(f"{run}-small").exists()


@pytest.mark.slow
def test_mixed_precision_is_reported_and_drawn(run, capsys):
    methods = "[{quantize: {budget: 5, choices: [4, 5, 8], activations: 8}}]"
    assert main(["compress", run, "--methods", methods, "--to", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (report,) = found["reports"]
    assert report["mixed"]["average_bits"] <= 5
    assert {each["bits"] for each in report["layers"]} <= {4, 5, 8}
    assert json.loads(Path("small/compression.json").read_text())["reports"] == [report]
    assert Path("small/pictures/bits.png").is_file()
    assert Path("small/pictures/profile.png").is_file()
    assert Path("small/compression.html").read_text().count("<img") == 3
    assert found["file_bytes"]["after"] < found["file_bytes"]["before"]


@pytest.mark.slow
def test_a_budget_that_can_not_be_met_writes_nothing(run, capsys):
    methods = "[{quantize: {budget: 1.5}}]"
    assert main(["compress", run, "--methods", methods, "--to", "small"]) == 2
    assert "1.5 bits per weight" in capsys.readouterr().err
    assert not Path("small").exists()


def figures(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_a_method_that_trains_has_a_budget_in_epochs(run, capsys):
    words = ["--methods", f"[{HESSO}, round_weights]", "--epochs", "2", "--to", "small", "--json"]
    assert main(["compress", run, *words, "--tuning", FAST, "--distill", "0.5"]) == 0
    found = figures(capsys)
    assert found["macs"]["after"] < found["macs"]["before"]
    assert found["zeros"] is None  # every layer is rounded
    assert [next(iter(each)) for each in found["methods"]] == ["hesso", "round_weights"]
    config = yaml.safe_load(Path("small/config.yaml").read_text())
    assert config["epochs"] == 2
    assert config["batch_size"] == 32
    assert config["distillation"]["weight"] == 0.5
    assert config["optimizer"]["lr"] == pytest.approx(0.1 * 0.1)  # a tenth of kfac's
    assert json.loads(Path("small/compression.json").read_text())["macs"] == found["macs"]
    assert main(["evaluate", "small", "--json"]) == 0
    assert main(["train", "--resume", "small"]) == 0


@pytest.mark.slow
def test_what_is_cut_once_is_tuned_after_it_and_rounded_at_the_end(run, capsys):
    methods = "[{magnitude: {sparsity: 0.3, divisible: 2}}, round_weights]"
    words = ["--methods", methods, "--epochs", "1", "--to", "small", "--json"]
    assert main(["compress", run, *words, "--tuning", FAST]) == 0
    found = figures(capsys)
    assert [next(iter(each)) for each in found["methods"]] == ["magnitude", "round_weights"]
    manifest = json.loads(Path("small/best/manifest.json").read_text())
    assert [each["kind"] for each in manifest["model"]["transforms"]] == ["resize", "bits"]
    assert manifest["training"]["step"] > 0
    assert main(["evaluate", "small", "--json"]) == 0


@pytest.mark.slow
def test_reports_of_all_methods_around_a_tuning_are_on_the_page(run, capsys):
    low_rank = "{low_rank: {keep: 0.5, allocation: divergence, smallest: 500}}"
    methods = f"[{low_rank}, round_weights, {{pack: {{entropies: [static]}}}}]"
    words = ["--methods", methods, "--epochs", "1", "--to", "small", "--json"]
    assert main(["compress", run, *words, "--tuning", FAST]) == 0
    found = figures(capsys)
    assert [each["method"] for each in found["reports"]] == ["low_rank", "quantize", "pack"]
    assert json.loads(Path("small/methods.json").read_text()) == found["reports"][1:]
    assert found["file_bytes"]["after"] == Path("small/best/model.packed").stat().st_size
    assert "Sensitivity of each layer: low_rank" in Path("small/compression.html").read_text()


@pytest.mark.slow
def test_a_budget_in_minutes_becomes_epochs(run, capsys, monkeypatch):
    monkeypatch.setattr("smallfry.cli._tuning.MEASURED", 0.5)  # seconds
    words = ["--methods", f"[{HESSO}]", "--minutes", "0.02", "--to", "small", "--json"]
    assert main(["compress", run, *words, "--tuning", FAST]) == 0
    assert yaml.safe_load(Path("small/config.yaml").read_text())["epochs"] >= 1
    assert main(["evaluate", "small", "--json"]) == 0
    capsys.readouterr()
    words = ["--methods", "[{snip: {sparsity: 0.9}}]", "--epochs", "1", "--to", "sparse", "--json"]
    assert main(["compress", run, *words, "--tuning", FAST]) == 0
    zeros = figures(capsys)["zeros"]
    assert 0.5 * zeros["weights"] < zeros["zeros"] < zeros["weights"]
    assert zeros["zero_macs"] < zeros["macs"]
    assert zeros["smallest_bytes"] < zeros["dense_bytes"]


def test_a_tuning_that_can_not_begin_leaves_nothing(run, capsys):
    words = [*TUNED, "--tuning", "{optimizer.name: adamv}", "--to", "small"]
    assert main(["compress", run, *words]) == 2
    assert not Path("small").exists()
