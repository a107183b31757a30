"""Options that are given are used, or refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import RunError, UsageError
from smallfry.fitting.config import FitConfig
from smallfry.fitting.costs import Costs
from smallfry.fitting.plan import Plan, Planned
from smallfry.fitting.rungs import FitSpace
from smallfry.fitting.zoo import Entry, scaled
from smallfry.training.config import DataConfig

QUICK = ["--epochs", "1", "--batch_size", "16", "--progress", "quiet", "--references", "false"]
VITRM = (
    "{embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1, "
    "recursion_steps: 2}"
)


@pytest.fixture
def moved(tmp_path, monkeypatch, capsys):
    """A run of a folder of images that is somewhere else now."""
    monkeypatch.chdir(tmp_path)
    digits = load_data("digits", limit=80)
    for number, (image, label) in enumerate(
        zip(digits.train.images, digits.train.labels, strict=True)
    ):
        place = tmp_path / "before" / str(label.item())
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image[0])).save(place / f"{number}.png")
    model = ["--model", "vitrm_micro_patch4_8", "--model.options", VITRM]
    data = ["--data", "before", "--data.image_size", "8", "--data.channels", "1"]
    assert main(["train", *data, *model, *QUICK, "--run", "run"]) == 0
    Path("before").rename("now")
    capsys.readouterr()
    return "run"


@pytest.mark.filterwarnings("ignore:early-exit thresholds were measured on only 10")
def test_an_early_exit_is_calibrated_where_the_data_is_now(moved, capsys):
    asked = ["evaluate", moved, "--data", "now", "--exit_drop", "0.5"]
    assert main([*asked, "--json"]) == 0
    assert "exit_threshold" in json.loads(capsys.readouterr().out)


def test_a_compressed_run_is_written_beside_its_parent(moved, monkeypatch, capsys):
    monkeypatch.chdir("run")
    asked = ["compress", ".", "--methods", "[round_weights]", "--data", "../now"]
    assert main(asked) == 0
    assert Path("../run-small/best").is_dir()
    assert not list(Path().glob("*-small"))


def test_a_named_set_is_compressed_and_tuned_where_it_is_now(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    with_labels = {"EEGsample": random.standard_normal((12, 30, 64)).astype(np.float32)}
    with_labels |= {"substate": np.arange(12) % 2, "subindex": np.arange(12) // 4 + 1}
    Path("before").mkdir()
    np.savez("before/a.npz", **with_labels)
    data = ["--data", "eeg-mat", "--data.root", "before", "--data.options", "{file: a.npz}"]
    quick = ["--epochs", "1", "--batch_size", "4", "--progress", "quiet"]
    assert main(["train", "--task", "eeg", *data, *quick, "--run", "run"]) == 0
    Path("before").rename("now")
    asked = ["compress", "run", "--methods", "[{lsq: {weights: 4}}]", "--epochs", "1"]
    assert main([*asked, "--to", "other"]) != 0
    assert "no such" in capsys.readouterr().err
    assert main([*asked, "--data.root", "now", "--to", "small"]) == 0
    assert smallfry.load("small").manifest["task"] == "eeg"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--exit_drop", "0.5"], "exit_drop and exit_steps need an export's"),
        (["--exit_steps", "1"], "exit_drop and exit_steps need an export's"),
        (["--top_k", "7"], "top_k is for classifiers"),
        (["--decoding", "{nonsense: 1}"], "nonsense"),
    ],
)
def test_options_that_a_puzzle_has_not_are_refused(puzzles, capsys, more, words):
    assert main(["predict", *puzzles, *more]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    place = tmp_path_factory.mktemp("puzzles")
    model = ["--model", "trm_sudoku4_micro", "--data", "sudoku4", "--data.limit", "32"]
    asked = ["train", "--task", "puzzle", *model, *QUICK, "--run", str(place / "run")]
    assert main(asked) == 0
    (place / "p.txt").write_text("1...\n..2.\n.3..\n...4\n")
    return str(place / "run"), str(place / "p.txt")


def test_an_export_has_one_set_of_weights(tmp_path, capsys):
    folder = Path(__file__).parents[1] / "fixtures" / "format_2" / "run"
    run = shutil.copytree(folder, tmp_path / "run")
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    asked = ["predict", str(tmp_path / "out"), str(tmp_path / "x.png")]
    assert main(asked) == 0
    capsys.readouterr()
    assert main([*asked, "--checkpoint", "last"]) == 2
    assert "export the run with --checkpoint last" in capsys.readouterr().err


def test_a_fit_of_several_classes_an_image_is_refused_at_once():
    with pytest.raises(UsageError, match="a fit is for images of one class each"):
        FitConfig(data=DataConfig("photos", several_labels=True), max_kb=100)


def test_a_fit_goes_on_only_with_the_models_that_it_was_planned_with(planned):
    space, starts = planned
    space(starts)
    with pytest.raises(RunError, match="with loopnet_70k of results/models to start from"):
        space({})


@pytest.fixture
def planned():
    data = load_data("digits", limit=60)
    name = "loopnet_70k"
    entry = replace(Entry(name, name, 1.0, "loopnet", scaled(name, 1.0)), start=name)
    costs = Costs(8000, 50_000, {"float32": 30.0, "int8": 9.0}, {"float32": 0.1, "int8": 0.2})
    candidate = Planned(entry, costs, 1.0, "32-true")
    plan = Plan((candidate,), (1,), 6.0, 8.0, 1, data.fingerprint, {})
    config = FitConfig(data=DataConfig("digits"), max_kb=100)
    starts = {name: Path("results/models") / name}
    return lambda found: FitSpace(plan, config, data, found, lambda each: None), starts
