"""The command as a person meets it: exit codes, messages, output."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import smallfry.cli._messages
from smallfry.cli import main
from smallfry.cli import models as models_verb
from smallfry.cli._main import OUT_OF_MEMORY
from smallfry.cli._parser import expand_home, read
from smallfry.costing import cost
from smallfry.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
TINY = (
    "--model.options={embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}"
)
NOT_QUIET = ["train", TINY, "--epochs=2", "--data.limit=200", "--references=false", "--run"]
FAST = [TINY, "--epochs=1", "--data.limit=200", "--references=false", "--progress=quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run that the tests only read."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *FAST, "--run", str(folder)]) == 0
    return folder


def command(*arguments, **options):
    call = [sys.executable, "-m", "smallfry.cli", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, **options)


def shown(capsys, *arguments):
    """What a command shows that does nothing else: its help or a configuration."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def pictures(folder: Path, count: int, mode="L") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(list(folder.name.encode()))
    files = [folder / f"{i}.png" for i in range(count)]
    for file in files:
        pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(file)
    return files


# train


def test_training_prints_its_result_and_where_it_is(tmp_path, capsys):
    assert main(["train", *FAST, "--references=true", "--run", str(tmp_path / "r")]) == 0
    output = capsys.readouterr().out
    for part in ("test accuracy", "RBF support vector machine", "logistic regression", "pictures"):
        assert part in output
    assert str(tmp_path / "r") in output


def test_the_printed_configuration_is_complete_and_runs(tmp_path, capsys):
    printed = shown(capsys, "train", *FAST, "--print_config")
    configuration = yaml.safe_load(printed)
    assert set(configuration) >= {field.name for field in fields(TrainConfig)}
    file = tmp_path / "config.yaml"
    file.write_text(printed)
    assert main(["train", "--config", str(file), "--run", str(tmp_path / "r")]) == 0


def test_a_run_can_be_repeated_from_its_own_configuration(run, tmp_path):
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--run", str(again)]) == 0
    same = "best/model.safetensors"
    assert (again / same).read_bytes() == (run / same).read_bytes()


@pytest.mark.usefixtures("pictures_drawn")
def test_a_folder_of_photographs_is_enough(tmp_path, capsys):
    for name in ("cat", "dog"):
        pictures(tmp_path / "photos" / name, 10, "RGB")
    options = ["--data", str(tmp_path / "photos"), "--data.image_size=16", "--batch_size=4"]
    fast = [option for option in FAST if "limit" not in option]
    assert main(["train", *options, *fast, "--run", str(tmp_path / "r")]) == 0
    assert main(["predict", str(tmp_path / "r"), str(tmp_path / "photos" / "cat")]) == 0
    assert capsys.readouterr().out.count("cat/") == 10


def test_every_option_has_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, "train", "--help")
    for field in fields(TrainConfig):
        assert f"--{field.name}" in text
    lines = text.splitlines()
    bare = [line for line in lines if line.startswith("  --") and len(line.split()) <= 2]
    for line in bare:  # the help of a long option stands on the next line
        following = lines[lines.index(line) + 1]
        assert following.startswith("      "), line


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_a_valid_configuration(recipe, capsys):
    assert "optimizer:" in shown(capsys, "train", "--config", str(recipe), "--print_config")


@pytest.mark.slow
def test_sigterm_saves_and_resume_ends_the_run(tmp_path):
    folder = tmp_path / "r"
    arguments = ["train", TINY, "--epochs=400", "--data.limit=200", "--progress=plain"]
    call = [sys.executable, "-m", "smallfry.cli", *arguments, "--run", str(folder)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert f"go on with: smallfry train --resume {folder}" in errors
    assert "Traceback" not in errors
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("epochs: 400", "epochs: 2"))
    assert main(["train", "--resume", str(folder)]) == 0
    assert (folder / "summary.json").exists()


def test_an_ended_run_is_lengthened_even_to_the_default_number_of_epochs(run, tmp_path, capsys):
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    assert main(["train", "--resume", str(longer), "--epochs", "2", "--progress=plain"]) == 0
    assert "changed settings: epochs 1 → 2" in capsys.readouterr().out
    assert yaml.safe_load((longer / "config.yaml").read_text())["epochs"] == 2
    assert json.loads((longer / "summary.json").read_text())["measured"]["epochs"] == 2
    options = read(["train", "--resume", "x", "--epochs", "50"]).options
    assert options.given == {"epochs": 50}  # although it is the default


@pytest.mark.slow
def test_what_is_printed_to_be_pasted_is_quoted(run, tmp_path, capsys):
    spaced = tmp_path / "my run"
    shutil.copytree(run, spaced)
    (spaced / "summary.json").unlink()
    assert main(["train", "--resume", str(spaced)]) == 0
    assert f"smallfry predict '{spaced}' FILE" in capsys.readouterr().out.replace("\n", "")
    assert main(["train", *FAST, "--run", str(spaced)]) == 1
    assert f"--resume '{spaced}'" in capsys.readouterr().err
    assert main(["share", str(spaced), "--to", str(tmp_path / "my model")]) == 0
    assert f"smallfry predict '{tmp_path}/my model' FILE" in capsys.readouterr().out
    assert main(["export", str(spaced), "--to", str(tmp_path / "my export")]) == 0
    assert f"smallfry predict '{tmp_path}/my export' FILE" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_letters_gets_escapes(run, encoding, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, TextIOWrapper(BytesIO(), encoding))
    assert main(["train", "--resume", str(run)]) == 0
    assert main(["predict", str(run), "caf\u00e9\u65e5.png"]) == 1
    sys.stdout.flush()
    sys.stderr.flush()
    assert b"FILE\\u2026" in sys.stdout.buffer.getvalue()
    assert b"\\u65e5.png" in sys.stderr.buffer.getvalue()


def test_the_home_folder_may_stand_after_an_equals_sign(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["share", str(run), "--to=~/model"]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert expand_home(["~", "~/x", "a~/x", "--to=~/y", "~nobody-here/x", "--x=a~"]) == [
        *(str(tmp_path), f"{tmp_path}/x", "a~/x", f"--to={tmp_path}/y"),
        *("~nobody-here/x", "--x=a~"),
    ]


def test_a_second_run_in_one_folder_fails(run, capsys):
    assert main(["train", *FAST, "--run", str(run)]) == 1
    assert "--resume" in capsys.readouterr().err


# evaluate


def test_evaluation_gives_the_figures_of_the_summary(run, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = json.loads((run / "summary.json").read_text())["measured"]["test"]
    assert {key: found[key] for key in measured} == pytest.approx(measured)
    assert found["images"] == 359
    assert main(["evaluate", str(run), "--split", "validation", "--checkpoint", "last"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_naming_the_runs_own_data_does_not_let_training_images_in(run, capsys):
    assert main(["evaluate", str(run), "--data", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["images"]) == ("test", 359)


def test_a_run_on_a_relative_folder_is_evaluated_from_anywhere(tmp_path, monkeypatch, capsys):
    for name in ("cat", "dog"):
        pictures(tmp_path / "photos" / name, 10)
    monkeypatch.chdir(tmp_path)
    fast = [option for option in FAST if "limit" not in option]
    options = ["--data", "photos", "--data.image_size=16", "--batch_size=4"]
    assert main(["train", *options, *fast, "--run", "r"]) == 0
    monkeypatch.chdir("/")
    assert main(["evaluate", str(tmp_path / "r"), "--json"]) == 0
    assert '"images": 4' in capsys.readouterr().out


def test_other_data_is_evaluated_whole_if_its_classes_are_the_models(run, tmp_path, capsys):
    for digit in range(10):
        pictures(tmp_path / "mine" / str(digit), 3)
    assert main(["evaluate", str(run), "--data", str(tmp_path / "mine"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["images"]) == ("all", 30)
    for name in ("ten", "eleven"):
        pictures(tmp_path / "others" / name, 3)
    assert main(["evaluate", str(run), "--data", str(tmp_path / "others")]) == 1
    assert "the model has 10 classes" in capsys.readouterr().err


# predict


def test_predictions_of_files_folders_and_globs_as_json_lines(run, tmp_path, capsys):
    files = pictures(tmp_path / "in", 3, "RGBA")
    inputs = [files[0], tmp_path / "in", tmp_path / "in" / "*.png"]
    assert main(["predict", str(run), *map(str, inputs), "--json", "--top_k", "4"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["image"] for answer in answers] == list(map(str, [files[0], *files, *files]))
    for answer in answers:
        shares = [guess["probability"] for guess in answer["top"]]
        assert len(shares) == 4
        assert shares == sorted(shares, reverse=True)
        assert answer["class"] == answer["top"][0]["class"]
        assert 0 <= answer["halting"] <= 1
    assert answers[0]["top"] == answers[1]["top"]


def test_top_k_is_at_most_the_number_of_classes_and_adds_up(run, tmp_path, capsys):
    file = pictures(tmp_path, 1)[0]
    assert main(["predict", str(run), str(file), "--json", "--top_k", "99"]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    assert len(top) == 10
    assert sum(guess["probability"] for guess in top) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_standard_input_is_an_image_or_a_list_of_files(run, tmp_path, capsys, monkeypatch):
    file = pictures(tmp_path, 1)[0]
    arguments = ["predict", str(run), "-", "--json"]
    call = [sys.executable, "-m", "smallfry.cli", *arguments]
    as_image = subprocess.run(call, input=file.read_bytes(), capture_output=True, check=True)
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(f"{file}\n".encode())))
    assert main(arguments) == 0
    image, listed = json.loads(as_image.stdout), json.loads(capsys.readouterr().out)
    assert image["image"] == "<standard input>"
    assert image["top"] == listed["top"]


def test_an_unreadable_image_is_told_and_the_others_are_classified(run, tmp_path, capsys):
    files = pictures(tmp_path, 2)
    (tmp_path / "0.png").write_bytes(b"no image")
    inputs = [*map(str, files), str(tmp_path / "gone.png")]
    assert main(["predict", str(run), *inputs]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(str(files[1]))
    assert "0.png: not an image" in captured.err
    assert "gone.png: there is no such file" in captured.err


def test_prediction_sees_what_evaluation_sees(run, tmp_path, capsys):
    from smallfry.data import load_data
    from smallfry.training.evaluation import predict
    from smallfry.training.run import load_run

    trained, data = load_run(run), load_data("digits", limit=200)
    buffer = BytesIO()
    Image.fromarray(data.test.images[5, 0].numpy()).save(buffer, "PNG")
    (tmp_path / "digit.png").write_bytes(buffer.getvalue())
    wanted = predict(trained.model, data.test, trained.normalize).logits[5].softmax(0).max()
    assert main(["predict", str(run), str(tmp_path / "digit.png"), "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    assert top[0]["probability"] == pytest.approx(wanted.item(), abs=1e-5)


# models


@pytest.mark.slow
def test_models_lists_what_they_cost(capsys):
    assert main(["models", "vitrm_*", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    small = next(row for row in rows if row["model"] == "vitrm_small_patch4_32")
    assert small["parameters"] == 3_624_971
    assert small["macs"] == pytest.approx(1.4541e9, rel=1e-3)
    assert small["paper"] == "Akazan et al. 2026, arXiv 2603.19503"
    assert main(["models", "dhvt_tiny*"]) == 0
    shown = capsys.readouterr().out
    assert "6,008,650" in shown
    assert "Lu et al. 2022, arXiv 2210.05958" in shown
    assert "Apache-2.0" in shown
    assert main(["models", "tinynet_e", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 2_042_972
    assert main(["models", "thrifty", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "vitrm_thrifty_patch4_32"
    assert main(["models", "nothing*"]) == 2


def test_models_measures_few_recursion_steps_of_many():
    with torch.device("meta"):
        model = timm.create_model("trm_sudoku4_micro", recursion_steps=6)
        image = torch.zeros(1, *timm.get_pretrained_cfg("trm_sudoku4_micro").input_size)
        assert models_verb.measure(model, image) == cost(model, image)
        assert model.recursion_steps == 6


# Wrong usage: one line, the right name, the right code


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "benchmark, completion, compress, demo, evaluate, evolve, export, fit, models"),
        (["trian"], 2, "did you mean 'train'"),
        (["train", "--epoch", "3"], 2, "train has no option 'epoch'; did you mean 'epochs'"),
        (["train", "--data.nmae=x"], 2, "did you mean 'data.name'"),
        (["train", "--data.limit", "x"], 2, "data.limit: expected int or null, got 'x'"),
        (["evaluate", "x", "--split", "tst"], 2, "did you mean 'test'"),
        (["train", "--epochs", "three"], 2, "epochs: expected int, got 'three'"),
        (["train", "--objective", "crossentropy"], 2, "did you mean 'cross_entropy'"),
        (["train", "--epochs", "0"], 2, "epochs must be at least 1"),
        (["train", "--model", "vitrm_smal"], 2, "did you mean 'vitrm_small_patch4_32'"),
        (["train", "--data", "cifra10"], 2, "did you mean 'cifar10'"),
        (["train", "--data", "cifar10", "--data.root", "/nowhere"], 1, "no such folder '/nowhere'"),
        (["train", "--data", "curves"], 2, "curves has no classes to distinguish"),
        (["train", "--data", "faces"], 2, "faces has no classes to distinguish"),
        (["train", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "--resume", "nowhere"], 1, "nowhere: there is no such run folder"),
        (["train", "--resume", "x", "--batch_size", "3"], 2, "batch_size can't change any more"),
        (["train", "--resume", "x", "--optimizer.lr", "1"], 2, "optimizer.lr can't change"),
        (["evaluate", "nowhere"], 1, "nowhere: there is no such file or folder"),
        (["predict", "nowhere", "x.png"], 1, "nowhere: there is no such file or folder"),
        (["predict", "nowhere"], 2, "inputs"),
        (["predict", "nowhere", "x.png", "--top_k", "0"], 2, "top_k must be at least 1"),
    ],
)
def test_mistakes_get_one_line_and_a_code(arguments, code, message, capsys):
    assert main(arguments) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1


def test_wrong_keys_in_a_file_are_named(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("data: {nmae: digits}\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "did you mean 'data.name'" in capsys.readouterr().err
    file.write_text("data: [unclosed\n")
    assert main(["train", "--config", str(file)]) == 2


@pytest.mark.slow
def test_debug_shows_the_traceback(capsys):
    debugged = command("train", "--resume", "nowhere", "--debug")
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr
    assert main(["train", "--resume", "nowhere"]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_terminal_the_output_is_plain(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    plain = command(*NOT_QUIET, tmp_path / "plain", env=environment)
    assert plain.stdout.count("\nepoch ") == 2
    assert "\x1b" not in plain.stdout


def test_in_ci_the_output_is_the_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert main([*NOT_QUIET, str(tmp_path / "quiet")]) == 0
    said = capsys.readouterr().out
    assert "epoch 1/2" not in said
    assert "test accuracy" in said


@pytest.mark.parametrize(
    "text",
    [
        "objective: 5",
        "data: digits.yaml",
        "config: true",
        "resume: .nan",
        "data: {split_seed: 99999999999999999999}",
        "ema: {decay: 1" + "0" * 400 + "}",
        "data: {mean: [.nan], std: [1.0]}",
        "model: {latent_steps: 2147483648}",
        "workers: 1000000",
        "threads: 9223372036854775808",
        "threads: 2147483647",
        "augment: {crop_padding: 2147483647}",
        "batch_size: 1" + "0" * 400,
        "augment: {randaugment_ops: 2147483647}",
        "checkpoint_seconds: .nan",
        "schedule: {warmup_epochs: .nan}",
        "data: {name: null}",
        "optimizer: {options: null}",
        "device: null",
        "seed: null",
        "model: {drop_rate: .nan}",
        'data: {root: "a\\0b"}',
        'run: "a\\0b"',
        'model: {options: {"a\\0b": 1}}',
        "seed: " + "9" * 5000,
        "run: " + "[" * 100_000,
        "model: {options: {x: 0x" + "f" * 5000 + "}}\nepochs: 0",
    ],
    ids=lambda text: text[:30],
)
def test_settings_that_can_not_be_are_told_in_a_line(tmp_path, text, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert "an error inside smallfry" not in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data.name", "x" * 5000],
        ["train", "--data.image_size", "9" * 5000],
        ["train", "--resume", "9" * 5000],
        ["train", "--run", "x" * 5000],
        ["train", "--config", "x" * 5000],
        ["train", "--data.name", "cifar10", "--data.root", "x" * 5000],
        ["evaluate", "x" * 5000],
        ["predict", "x" * 5000, "y"],
        ["share", "x" * 5000, "--to", "y"],
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_names_of_any_length_are_told_in_a_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main(words)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert "an error inside smallfry" not in error
    assert len(error) < 1_200
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_read_is_told_without_a_report(monkeypatch, capsys):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "run/config.yaml")

    monkeypatch.setattr("smallfry.training.train.train", refuse)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "smallfry: 'run/config.yaml': Permission denied\n"


def test_a_configuration_that_is_no_text_is_told(tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(b"\xf2\x00")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "settings can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "no memory"),
        *map(RuntimeError, ("can't start new thread", "can't allocate lock")),
        RuntimeError("can't allocate read lock"),  # of an open file
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_full_memory_is_told_with_a_way_out(error, monkeypatch, capsys):
    def full(*arguments):
        raise error

    monkeypatch.setattr("smallfry.training.train.train", full)
    assert main(["train"]) == 1
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("failures", [1, 2], ids=["once", "to the end"])
def test_memory_that_is_full_while_the_error_is_reported(failures, monkeypatch, capfd):
    def full(*arguments):
        raise MemoryError

    def say(*arguments):
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise MemoryError
        spoken(*arguments)

    spoken = smallfry.cli._messages.say
    monkeypatch.setattr("smallfry.training.train.train", full)
    monkeypatch.setattr("smallfry.cli._messages.say", say)
    assert main(["train"]) == 1
    assert capfd.readouterr().err == f"smallfry: {OUT_OF_MEMORY}\n"
    failures = 1
    with pytest.raises(MemoryError):
        main(["train", "--debug"])
