"""The short Python interface: train, predict, evaluate, export and save."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from html_view import View
from PIL import Image
from run_helpers import TINY

import smallfry
from smallfry.errors import DataError, RunError, UsageError
from smallfry.training.evaluation import predict
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import load_run
from smallfry.training.trained_run import TrainedRun
from smallfry.training.use import is_several
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.runtime import Runtime

LABELS = np.arange(60) % 2
GREY = np.random.default_rng(0).integers(0, 200, (60, 8, 8), dtype=np.uint8)
GREY[LABELS == 1, ::2] //= 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("use")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLFRY_CACHE", str(folder / "cache"))
        yield smallfry.train(
            data=(GREY, LABELS),
            model={"options": TINY},
            epochs=2,
            batch_size=16,
            references=False,
            progress="quiet",
            run=folder / "run",
        )


def test_the_result_is_the_summary_with_the_model(run):
    assert run == json.loads((run.folder / "summary.json").read_text())
    assert json.loads(json.dumps(run)) == dict(run)
    assert run.model.classes == ("0", "1")
    assert run.model is run.model
    assert run["data"]["train"] + run["data"]["validation"] + run["data"]["test"] == 60


def test_images_of_all_kinds_are_classified_alike(run, tmp_path):
    Image.fromarray(GREY[0]).save(tmp_path / "a.png")
    Image.fromarray(GREY[1]).save(tmp_path / "b.png")
    trained = load_run(run.folder)
    images = torch.tensor(GREY[:2])[:, None]
    logits = trained.model(trained.normalize(images))
    wanted = logits.softmax(1).max(1).values.tolist()
    for given in (
        [tmp_path / "a.png", str(tmp_path / "b.png")],
        tmp_path,
        str(tmp_path / "*.png"),
        GREY[:2],
        GREY[:2, None],
        images,
        [Image.fromarray(each) for each in GREY[:2]],
        [GREY[0], torch.tensor(GREY[1])],
        iter(GREY[:2]),
        [(tmp_path / "a.png").read_bytes(), GREY[1]],
        np.array([str(tmp_path / "a.png"), str(tmp_path / "b.png")]),
    ):
        answers = run.predict(given)
        assert [answer.top[0][1] for answer in answers] == pytest.approx(wanted, abs=1e-5)
    encoded = (tmp_path / "a.png").read_bytes()
    pictures = (Image.fromarray(GREY[0]), tmp_path / "a.png", encoded, io.BytesIO(encoded))
    for one in (GREY[0], GREY[:1], *pictures):
        (answer,) = run.predict(one, top_k=1)
        assert len(answer.top) == 1
        assert answer.top[0][1] == pytest.approx(wanted[0], abs=1e-5)
    assert run.predict([]) == []


def test_three_grey_images_are_three_and_three_channels_of_a_colour_model_one(run):
    wanted = [run.predict(each)[0].top for each in GREY[:3]]
    for given in (GREY[:3], torch.tensor(GREY[:3])):
        found = [each.top for each in run.predict(given)]
        assert [top[0][0] for top in found] == [top[0][0] for top in wanted]
    assert is_several(GREY[:3], arrays=False, channels=1)
    assert not is_several(GREY[:3], arrays=False, channels=3)
    assert is_several(GREY[:2], arrays=False, channels=3)
    assert not is_several(np.zeros((8, 8, 3)), arrays=False, channels=1)


def test_numbers_are_the_models_classes_in_an_evaluation(run):
    second = LABELS == 1
    images = GREY[second] // 2
    scores = run.evaluate((images, LABELS[second]))
    assert scores["images"] == 30
    by_hand = [each.top[0][0] == "1" for each in run.predict(images)]
    assert scores["accuracy"] == pytest.approx(np.mean(by_hand))
    with pytest.raises(DataError, match="labels are 0 to 2, and there are 2 classes"):
        run.evaluate((GREY, np.arange(60) % 3))
    with pytest.raises(UsageError, match="data of the type generator: expected a folder, a pair"):
        run.evaluate(pair for pair in zip(GREY, LABELS, strict=True))


def test_wrong_images_and_numbers_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match="top_k must be at least 1, got 0"):
        run.predict(GREY, top_k=0)
    with pytest.raises(DataError, match="image 0: pixels are float64"):
        run.predict(GREY[0] / 255)
    with pytest.raises(DataError, match=r"image 0: has the shape \(6, 8, 4\), expected h"):
        run.predict(np.zeros((6, 8, 4), np.uint8))
    with pytest.raises(DataError, match="image 0: of the type NoneType; expected a picture of P"):
        run.predict(None)
    with pytest.raises(DataError, match=r"nothing\.png"):
        run.predict(tmp_path / "nothing.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"broken\.png"):
        run.predict(tmp_path / "broken.png")


def test_scores_are_those_of_the_run_and_of_other_data(run):
    scores = run.evaluate()
    assert scores["accuracy"] == run["measured"]["test"]["accuracy"]
    assert (scores["split"], scores["images"]) == ("test", run["data"]["test"])
    assert run.evaluate(split="validation")["images"] == run["data"]["validation"]
    other = run.evaluate((GREY[:10] // 2, LABELS[:10]))
    assert (other["split"], other["images"]) == ("all", 10)
    by_hand = [int(run.predict(each)[0].top[0][0]) for each in GREY[:10] // 2]
    assert other["accuracy"] == pytest.approx(np.mean(np.array(by_hand) == LABELS[:10]))
    with pytest.raises(UsageError, match="split is train, validation or test, not 'all'"):
        run.evaluate(split="all")
    with pytest.raises(UsageError, match="neither a folder nor a known data set"):
        run.evaluate("nowhere")
    with pytest.raises(DataError, match=r"2 classes \(0, 1, …\), .* has 2 \(cat, dog, …\); give"):
        run.evaluate((GREY // 3, ["cat" if label else "dog" for label in LABELS]))


def test_paths_may_start_with_the_home_folder(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.folder.parent))
    assert smallfry.load("~/run").evaluate() == run.evaluate()
    (run.folder.parent / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"~/a\.png: not an image"):
        run.predict("~/a.png")


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"lr": 0.1}, "train has no setting 'lr'; did you mean optimizer={'lr': …}?"),
        ({"image_size": 32}, "did you mean data={'image_size': …}?"),
        ({"epoch": 3}, "train has no setting 'epoch'; did you mean 'epochs'?"),
    ],
)
def test_a_misplaced_setting_is_named_in_its_group(settings, hint):
    with pytest.raises(UsageError, match=re.escape(hint)):
        smallfry.train(**settings)


@pytest.mark.slow
def test_the_model_is_exported(run, tmp_path):
    exported = Runtime(run.export(tmp_path / "export"))
    inputs = [InputImage(str(i), Image.fromarray(GREY[i])) for i in range(5)]
    outputs = exported.classify(inputs, top_k=1)
    found = [each.top[0][0] for each in run.predict(GREY[:5])]
    assert [answer.top[0][0] for answer in outputs] == found


def test_the_model_is_saved_into_a_free_folder(run, tmp_path):
    saved = run.save(tmp_path / "saved")
    found = [each.top for each in run.predict(GREY[:5])]
    assert [each.top for each in load_run(saved).predict(GREY[:5])] == found
    with pytest.raises(RunError, match="there is a run in this folder already"):
        run.save(tmp_path / "saved")


def test_a_result_stays_usable_in_another_working_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.folder.parent)
    result = TrainedRun({**run, "run": "run"})
    trained = load_run("run")
    monkeypatch.chdir(tmp_path)
    assert result.folder == run.folder
    assert result.evaluate() == trained.evaluate() == run.evaluate()
    assert trained.save("saved") == Path("saved")


def test_a_notebook_shows_scores_and_pictures(run):
    view = View(run._repr_html_())
    assert "accuracy" in view.texts
    assert [each["alt"] for each in view.of("img")] == [
        "learning curves",
        "confusion matrix",
        "mistakes",
    ]
    assert all(each["src"].startswith("data:image/png") for each in view.of("img"))


def test_predictions_agree_with_evaluation(run):
    trained = run.model
    _, images, _ = load_like(trained, run.folder)
    wanted = predict(trained.model, images, trained.normalize).logits.argmax(1).tolist()
    found = [int(each.top[0][0]) for each in trained.predict(images.images)]
    assert found == wanted
