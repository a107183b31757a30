"""Mistakes of someone who is new to the command: what was wrong, what was expected, what to do."""

import pytest

from smallfry.cli import main

TRAIN = ("train", "--run", "unused")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a text file, and folders of other kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("hello\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.png").touch()


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (
            [*TRAIN, "--data", "nowhere"],
            2,
            ["'nowhere' is neither a folder nor", "expected a folder of images", "such as digits"],
        ),
        ([*TRAIN, "--data", "cifr10"], 2, ["expected a folder", "did you mean 'cifar10'?"]),
        ([*TRAIN, "--data", "note.txt"], 2, ["a known data set but a file; expected a folder"]),
        ([*TRAIN, "--data", "empty"], 1, ["empty: expected one folder per class with images"]),
        (
            [*TRAIN, "--config", "note.txt"],
            2,
            ["such as 'epochs: 3', got hello"],
        ),
        ([*TRAIN, "--epochs", "-1"], 2, ["epochs must be at least 1, got -1"]),
        ([*TRAIN, "--optimizer.lr", "-1"], 2, ["optimizer.lr must be positive, got -1"]),
        ([*TRAIN, "--optimizer.bias_rate", "0"], 2, ["bias_rate must be positive, got 0"]),
        ([*TRAIN, "--methods", "hesso"], 2, ["expected list, got 'hesso'", "'[hesso]'"]),
        ([*TRAIN, "--self_tune", "dropout"], 2, ["a list has brackets: '[dropout]'"]),
        (
            [*TRAIN, "--self_tune", "[dropuot]"],
            2,
            ["self_tune can't tune 'dropuot'; did you mean 'dropout'?\n"],
        ),
        ([*TRAIN, "--self_tune", "[zzz]"], 2, ["there are augment, dropout, label_smoothing"]),
        (
            [*TRAIN, "--model.options", "{embed_dims: 64}"],
            2,
            ["unexpected keyword argument 'embed_dims'; did you mean 'embed_dim'?"],
        ),
        (
            [*TRAIN, "--model.options", "{zzz: 1}"],
            2,
            ["unexpected keyword argument 'zzz'; there are ", "latent_steps, latents"],
        ),
        (["compress", "empty"], 2, ["required: methods; smallfry compress --help"]),
        (["predict", "empty"], 2, ["required: inputs; smallfry predict --help"]),
        (["evaluate", "note.txt"], 1, ["note.txt: is a file; expected a run folder, a checkpoint"]),
        (["evaluate", "photos"], 1, ["photos: the folder holds cat; expected a run folder"]),
        (
            ["predict", "nowhere", "x.png"],
            1,
            [
                "nowhere: there is no such file or folder; expected a run folder, a checkpoint in "
                "one, a shared folder, an export or hf_hub:USER/NAME\n"
            ],
        ),
        (["predict", "note.txt", "x.png"], 1, ["note.txt: is a file; ", ", an export or hf_hub:"]),
        (["predict", "empty", "x.png"], 1, ["empty: the folder is empty; ", ", an export or hf_"]),
        (["predict", "", "x.png"], 1, ["the name of the model is empty; expected a run folder"]),
        (["benchmark", "nowhere"], 1, ["nowhere: there is no such file or", ", an export or hf_"]),
        (["evaluate", "nowhere"], 1, ["a checkpoint in one, a shared folder or hf_hub:USER/NAME"]),
        (["analyze", "empty", "leakage"], 1, ["empty: the folder is empty; expected a run folder"]),
        (["share", "empty", "--to", "new"], 1, ["empty: the folder is empty; expected a run "]),
        ([*TRAIN, "--model", ""], 2, ["unknown model ''; smallfry models lists those of smallfry"]),
        ([*TRAIN, "--model", "zzzz"], 2, ["unknown model 'zzzz'; smallfry models lists those"]),
        ([*TRAIN, "--optimizer", ""], 2, ["unknown optimizer ''\n"]),
        ([*TRAIN, "--data", ""], 2, ["data.name is empty: expected a data set or a folder"]),
        (
            [*TRAIN, "--model.start", ""],
            1,
            ["the name of the model is empty; expected a run folder"],
        ),
        (["train", "--run", ""], 2, ["run is empty: expected a path"]),
        (["train", "--data.root="], 2, ["data.root is empty: expected a path"]),
        (["fit", "--max_kb", "9", "--to", ""], 2, ["to is empty: expected a path"]),
        (["search", "--to", "new", "--space", ""], 2, ["space is empty: expected a YAML file, "]),
        (["", "x"], 2, ["unknown verb ''; there are analyze, benchmark, "]),
        (["serve", "photos"], 1, ["not an export", "smallfry export RUN --to DIR writes one"]),
        (["serve", "nowhere"], 1, ["no such export folder; smallfry export RUN --to DIR"]),
        (["models", "vitmr*"], 2, ["matches 'vitmr*'; smallfry models lists them all"]),
        (
            ["evolve", "--problem", "maze", "--to", "photos"],
            1,
            ["photos: not an evolution folder, it holds cat; use another --to"],
        ),
        (
            ["fit", "--data", "digits", "--max_kb", "9", "--to", "photos"],
            1,
            ["photos: not a fit folder, it holds cat"],
        ),
        (
            ["evolve", "--problem", "zzz", "--to", "new"],
            2,
            ["no problem 'zzz'; there are ", "maze", "(gym:NAME is an environment of Gymnasium)"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_explained_with_what_to_do(words, code, parts, capsys, tmp_path):
    assert main(words) == code
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "unused").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("search.json", "space.yaml"),
        ("fit.json", "plan.json"),
        ("evolution.json", "generations.jsonl"),
        ("analysis.json", "index.html"),
    ],
)
def test_what_smallfry_wrote_beside_photos_is_no_class_of_theirs(names, tmp_path, capsys):
    other = tmp_path / "photos" / "other"
    other.mkdir()
    for name in (*names, "page.png"):
        (other / name).touch()
    assert main(["train", "--data", "photos"]) == 1
    assert f"ignored {other}, written by smallfry" in capsys.readouterr().err
