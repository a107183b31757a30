"""``smallfry compress``."""

import json
import shutil
from pathlib import Path

import pytest

from smallfry.cli import main

RUN = Path(__file__).parents[1] / "fixtures" / "format_2" / "run"
ROUND = "[{round_weights: {bits: 8}}]"


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
    assert Path(f"{run}-small/best/manifest.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "[round_wights]"], "did you mean 'round_weights'"),
        (["--methods", "[{round_weights: {bit: 8}}]"], "did you mean 'bits'"),
        (["--methods", "[]"], "at least one"),
        ([], "methods"),
        (["--methods", "[round_weights, low_rank]"], "no linear layer or convolution left"),
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


def test_mixed_precision_is_reported_and_drawn(run, capsys):
    methods = "[{quantize: {budget: 5, choices: [4, 5, 8], activations: 8}}]"
    assert main(["compress", run, "--methods", methods, "--to", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (report,) = found["reports"]
    assert report["mixed"]["average_bits"] <= 5
    assert {each["bits"] for each in report["layers"]} <= {4, 5, 8}
    assert json.loads(Path("small/compression.json").read_text())["reports"] == [report]
    assert Path("small/pictures/bits.png").is_file()
    assert found["file_bytes"]["after"] < found["file_bytes"]["before"]


def test_a_budget_that_can_not_be_met_writes_nothing(run, capsys):
    methods = "[{quantize: {budget: 1.5}}]"
    assert main(["compress", run, "--methods", methods, "--to", "small"]) == 2
    assert "1.5 bits per weight" in capsys.readouterr().err
    assert not Path("small").exists()
