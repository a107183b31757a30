"""The task of reading: its loss and scores, and a run from words to an export."""

import json
from itertools import product
from urllib.request import urlopen

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.testing import assert_close

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.kits.ocr.pictures import confusions
from smallfry.kits.ocr.task import OCR
from smallfry.tasks import HasRecipe, Pictured, create_task, find_task, task_names
from smallfry.training.augment import Normalize
from smallfry.training.recipes import recipe_of, with_recipe
from smallfry_runtime.runtime import Runtime
from smallfry_runtime.serving.server import serving

WORDS = {"words": 60, "alphabet": "digits", "longest": 4, "level": "easy"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("ocr") / "run"
    asked = [
        "train",
        "--task",
        "ocr",
        "--data.options",
        json.dumps(WORDS),
        "--data.image_size",
        "32",
        "64",
    ]
    asked += ["--model", "crnn_dw_s", "--epochs", "1", "--progress", "quiet", "--run", str(place)]
    assert main(asked) == 0
    return place


def test_the_task_is_found_with_its_recipe():
    assert "ocr" in task_names()
    kind = find_task("ocr")
    assert kind is OCR
    assert isinstance(kind, HasRecipe)
    assert isinstance(kind(), Pictured)
    assert recipe_of("ocr").name == "recipe.yaml"
    assert recipe_of("classification") is None
    with pytest.raises(UsageError, match="unknown task 'ocs'"):
        recipe_of("ocs")
    with pytest.raises(UsageError, match="leave out label_smoothing"):
        create_task("ocr", 0.1)
    with pytest.raises(UsageError, match=r"name generated words \(--data ocr-words\)"):
        OCR().targets(torch.zeros(3), torch.zeros(3))


def test_a_recipe_gives_way_to_settings():
    found = with_recipe({"task": "ocr", "epochs": 2, "optimizer": {"lr": 1.0}, "model": "crnn_vgg"})
    assert found["epochs"] == 2
    assert found["optimizer"] == {"lr": 1.0, "weight_decay": 0.01, "clip": 5.0}
    assert found["model"] == "crnn_vgg"
    assert found["data"] == {"name": "ocr-words"}
    other = with_recipe({"task": "ocr", "data": {"name": "ocr-folder", "root": "x"}})
    assert other["data"] == {"name": "ocr-folder", "root": "x"}
    assert with_recipe({"epochs": 2}) == {"epochs": 2}
    assert with_recipe({"task": "puzzle"}) == {"task": "puzzle"}
    with pytest.raises(UsageError, match="task must be a name, not 3"):
        with_recipe({"task": 3})


def test_losses_sum_over_all_paths():
    outputs = torch.randn(3, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 0], [2, 2, 0], [1, 0, 0]])
    logs = outputs.log_softmax(-1)
    wanted = []
    for row, label in zip(logs, labels, strict=True):
        total = 0.0
        for path in product(range(3), repeat=4):
            kept = [s for i, s in enumerate(path) if i == 0 or path[i - 1] != s]
            if [s for s in kept if s] == [s for s in label.tolist() if s]:
                total += float(sum(row[i, s] for i, s in enumerate(path)).exp())
        wanted.append(-np.log(total))
    assert_close(OCR().losses(outputs, labels).double(), torch.tensor(wanted), atol=1e-6, rtol=0)
    assert OCR().loss(outputs, labels).item() == pytest.approx(np.mean(wanted), abs=1e-6)


def sure(*paths, symbols=4):
    return 9 * torch.nn.functional.one_hot(torch.tensor(paths), symbols).float()


def test_scores_count_texts_and_edits():
    outputs = sure([1, 0, 2, 3], [2, 2, 0, 0], [1, 2, 1, 2])
    labels = torch.tensor([[1, 2, 3, 0], [3, 2, 0, 0], [1, 2, 1, 3]])
    found = OCR().metrics(outputs, labels)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["character_error"] == pytest.approx(2 / 9)  # a deletion, a replacement
    assert OCR().right(outputs, labels).tolist() == [True, False, False]
    assert OCR().rank(found) == (found["accuracy"], -found["loss"])
    assert OCR().decode(outputs, ("", "a", "b", "c"))[0]["text"] == "abc"
    assert OCR().outputs(11) == 11
    assert confusions(outputs, labels) == {(3, 2): 1}


def test_the_task_alone_is_a_run(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["task"] == "ocr"
    assert summary["data"]["generated"]["family"] == "ocr-words"
    assert {*summary["measured"]["test"]} == {"loss", "accuracy", "character_error"}
    config = (run / "config.yaml").read_text()
    assert "lr: 0.002" in config
    assert "flip: false" in config


def test_the_worst_texts_are_drawn(tmp_path):
    data = load_data("ocr-words", options=WORDS)
    some = data.test.take(torch.arange(5))
    outputs = torch.randn(5, 16, len(data.classes), generator=torch.Generator().manual_seed(0))
    OCR().draw(outputs, some, data.classes, tmp_path)
    for name in ("texts.png", "characters.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


def test_a_run_is_evaluated_and_read_from(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert scores["loss"] == pytest.approx(summary["measured"]["test"]["loss"])
    image = tmp_path / "word.png"
    Image.new("RGB", (90, 40), "white").save(image)
    assert main(["predict", str(run), str(image), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["image"] == str(image)
    assert {"text", "confidence", "characters"} < {*answer}
    asked = ["--decoding", "{words: ['12', '345']}"]
    assert main(["predict", str(run), str(image), *asked]) == 0
    assert capsys.readouterr().out.split(": ")[1][:3].strip() in ("12", "345")
    assert main(["predict", str(run), str(image), "--csv", str(tmp_path / "a.csv")]) == 2
    assert "csv is for classifiers; take --json" in capsys.readouterr().err
    assert main(["predict", str(run), str(image), "--decoding", "{wide: 3}"]) == 2
    assert "decoding has the settings beam and words" in capsys.readouterr().err
    assert main(["predict", str(run), str(tmp_path / "no.png")]) == 1


def test_words_of_a_folder_are_evaluated(run, tmp_path, capsys):
    place = tmp_path / "words"
    place.mkdir()
    (place / "labels.csv").write_text("file,text\na.png,12\nb.png,21\n")
    for name in ("a.png", "b.png"):
        Image.new("L", (60, 32), 200).save(place / name)
    asked = ["--data", "ocr-folder", "--data.root", str(place), "--json"]
    code = main(["evaluate", str(run), *asked])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert json.loads(captured.out)["images"] == 2


@pytest.mark.slow
def test_a_run_is_exported_and_read_without_pytorch(run, tmp_path, capsys):
    export = smallfry.export(run, tmp_path / "export", precision="int8_dynamic")
    runtime = Runtime(export)
    assert runtime.manifest.task == "ocr"
    report = json.loads((export / "quantization.json").read_text())
    assert {"accuracy", "bytes"} <= {*report["eight_bits"]}
    exact = Runtime(smallfry.export(run, tmp_path / "exact"))
    data = smallfry.load(run)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 32, 64), np.uint8)
    said, wanted = exact.decode(pixels), data.decode(pixels)
    assert [each["text"] for each in said] == [each["text"] for each in wanted]
    assert [e["characters"] for e in said] == [e["characters"] for e in wanted]
    image = tmp_path / "word.png"
    Image.fromarray(pixels[0, 0]).save(image)
    assert main(["predict", str(tmp_path / "exact"), str(image), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == said[0]["text"]
    with serving(exact) as url, urlopen(f"{url}predict", image.read_bytes()) as response:
        assert json.load(response)["predictions"] == [{**answer, "image": "image"}]
    with pytest.raises(UsageError, match="this export is for ocr, and its answers are not classes"):
        exact.predict(pixels)
    timed = ["benchmark", str(export), "--seconds", "0.05", "--batch_sizes", "1"]
    assert main([*timed, "--folder", str(tmp_path / "benchmark")]) == 0
    assert "ONNX" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compact_network_learns_words_by_heart():
    torch.manual_seed(0)
    data = load_data("ocr-words", options=WORDS, image_size=(32, 64), test=0.0)
    some = data.train.take(torch.arange(32))
    images = Normalize(data.mean, data.std)(some.images)
    model = timm.create_model("crnn_dw_s", num_classes=11, img_size=(32, 64))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        OCR().loss(model(images), some.labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        found = OCR().metrics(model(images), some.labels)
    assert found["accuracy"] > 0.9
    assert found["character_error"] < 0.05
