"""The task of places: runs without gradients, folders of traverses, and what is refused."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import DataError, SmallfryError, UsageError
from smallfry.kits.places.models import SpikingPlaces
from smallfry.kits.places.pictures import draw_curves, draw_recalls
from smallfry.kits.places.task import Places
from smallfry.kits.places.traverse import TraverseSettings, draw_traverse
from smallfry.tasks import Explained, FitsItself, HasRecipe, Pictured, create_task, find_task
from smallfry.training.trained_run import TrainedRun

ROUTE = {"places": 8, "calibration": 3, "side": 8}
MODEL = {"presentations": 6, "neurons": 8, "places_per_module": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("places") / "run"
    asked = ["train", "--task", "places", "--data.options", json.dumps(ROUTE)]
    asked += ["--model.options", json.dumps(MODEL), "--progress", "quiet", "--run", str(place)]
    assert main(asked) == 0
    return place


def test_the_task_is_found_with_its_recipe():
    assert find_task("places") is Places
    assert issubclass(Places, FitsItself)
    assert not issubclass(find_task("classification"), FitsItself)
    assert isinstance(Places, HasRecipe)
    assert isinstance(Places(), Pictured)
    assert isinstance(Places(), Explained)
    with pytest.raises(UsageError, match="leave out label_smoothing"):
        create_task("places", 0.1)


def test_a_run_is_fitted_scored_and_drawn(run):
    summary = json.loads((run / "summary.json").read_text())
    measured = summary["measured"]
    assert summary["data"]["test"] == 5
    assert summary["data"]["validation"] == 3
    assert measured["modules"] == 2
    assert {*measured["calibration_recall"]} >= {"0", "5", "200"}
    assert measured["calibration_queries"] == 3
    assert [each["name"] for each in measured["references"]] == ["image difference", "ridge"]
    assert measured["synaptic_events"] > 0
    assert {*measured["test"]} >= {"accuracy", "area", "recall_at_full_precision"}
    for name in ("scores", "precision_recall", "receptive_fields", "hyperactive"):
        assert (run / "pictures" / f"{name}.png").is_file()


def test_a_run_is_evaluated_and_used_as_it_was_fitted(run, tmp_path, capsys):
    trained = smallfry.load(run)
    found = trained.evaluate()
    wanted = json.loads((run / "summary.json").read_text())["measured"]["test"]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    query = draw_traverse(TraverseSettings(**ROUTE), 2)
    for place in (0, 3):
        Image.fromarray(query[place]).save(tmp_path / f"{place}.png")
    answers = trained.decode([tmp_path / "0.png", tmp_path / "3.png"])
    with torch.no_grad():
        scores = trained.model(torch.from_numpy(query[[0, 3], None] / 255))
    for answer, row in zip(answers, scores, strict=True):
        assert answer["score"] == pytest.approx(row.max().item(), abs=1e-6)
    assert main(["predict", str(run), str(tmp_path / "0.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(answers[0]["score"])


@pytest.mark.slow
def test_two_runs_of_a_seed_are_equal(run, tmp_path):
    settings = {"data": {"name": "places-traverse", "options": ROUTE}, "progress": "quiet"}
    settings["model"] = {"name": "modular_snn", "options": MODEL}
    for seed, equal in ((0, True), (1, False)):
        trained = smallfry.train(task="places", seed=seed, run=tmp_path / str(seed), **settings)
        assert isinstance(trained, TrainedRun)
        one, other = (smallfry.load(each).model.weights for each in (run, tmp_path / str(seed)))
        assert torch.equal(one, other) == equal


def test_what_needs_gradients_or_a_graph_is_refused(run, tmp_path, capsys):
    with pytest.raises(SmallfryError, match="no graph to be exported"):
        smallfry.export(run, tmp_path / "export")
    for more, words in (
        (
            ["--methods", "[{quantize: {weights: 8}}]"],
            "fitted without gradients: leave out methods",
        ),
        (["--optimizer", "kfac"], "fitted without gradients: leave out optimizer"),
        (["--epochs", "3"], "fitted at once: leave out epochs"),
        (["--batch_size", "3"], "leave out batch_size"),
        (["--schedule.warmup_epochs", "1"], "leave out schedule"),
        (["--data.limit", "4"], "needs whole traverses"),
        (["--data.image_size", "32"], "images of 8 pixels: set data.options.side"),
        (["--data.root", "."], "does not use data.root: see places-folder"),
    ):
        asked = ["train", "--task", "places", "--data.options", json.dumps(ROUTE), *more]
        assert main([*asked, "--progress", "quiet", "--run", str(tmp_path / "x")]) != 0
        assert words in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UsageError, match="the task places fits modular_snn alone"):
        Places().fit(torch.nn.Identity(), load_data("places-traverse", options=ROUTE))
    with pytest.raises(UsageError, match="places have square grey images"):
        SpikingPlaces(img_size=(8, 16))


def test_modules_are_kept_in_the_network():
    torch.manual_seed(3)
    model = timm.create_model("modular_snn", num_classes=6, img_size=8, **MODEL)
    assert [buffer.tolist() for name, buffer in model.named_buffers() if name == "threshold"] == [0]
    images = torch.randint(0, 256, (2, 6, 8, 8))
    modules, found = model.fit(images, images[0, :0], torch.arange(0))
    assert found is None
    again = model.modules_of_places
    assert again.settings == modules.settings
    for name in ("weights", "theta", "assignment", "activity", "delays"):
        assert np.array_equal(getattr(again, name), getattr(modules, name))
    other = timm.create_model("modular_snn", num_classes=6, img_size=8, **MODEL)
    other.load_state_dict(model.state_dict())
    pixels = images[0, :, None] / 255
    assert torch.equal(other(pixels), model(pixels))
    assert model(pixels.float()).dtype == torch.float32


def folder_of(place, lengths):
    for number, length in enumerate(lengths):
        folder = place / f"traverse{number}"
        folder.mkdir(parents=True)
        drawn = draw_traverse(TraverseSettings(places=8, calibration=1, side=24), number)
        for i in range(length):
            Image.fromarray(drawn[i]).save(folder / f"{i:03}.png")
    return place


def test_folders_of_traverses_are_read(tmp_path):
    place = folder_of(tmp_path / "route", (8, 8, 8))
    data = load_data("places-folder", place, options={"side": 8})
    assert data.input_shape == (1, 8, 8)
    assert data.classes == tuple(map(str, range(8)))
    assert data.train.labels.tolist() == [*range(8)] * 2
    assert data.validation.labels.tolist() == [4, 5, 6, 7]
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    assert "traverse 2, place 1" in data.locate("test", 1)
    other = load_data(
        "places-folder", place, options={"query": "traverse0", "calibration": 2, "side": 8}
    )
    assert torch.equal(other.test.images[:4], data.train.images[:4])
    assert other.test.labels.tolist() == [*range(6)]


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ((8, 7, 8), {}, r"unequal length \(traverse0 8, traverse1 7, traverse2 8\)"),
        ((8,), {}, "needs a folder for each traverse"),
        ((8, 8), {"query": "night"}, "the query 'night' at least; it has traverse0, traverse1"),
        ((8, 8), {"calibration": 8}, "calibration is 0 to 7"),
        ((1, 1), {}, "two places are the least"),
    ],
)
def test_wrong_folders_of_traverses_are_refused(tmp_path, lengths, options, words):
    with pytest.raises((DataError, UsageError), match=words):
        load_data("places-folder", folder_of(tmp_path / "route", lengths), options=options)


def test_a_damaged_image_and_a_missing_folder_are_refused(tmp_path):
    place = folder_of(tmp_path / "route", (2, 2))
    (place / "traverse1" / "001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"001\.png.*a traverse needs all its images"):
        load_data("places-folder", place)
    with pytest.raises(UsageError, match=r"give data\.root"):
        load_data("places-folder")


def test_curves_of_methods_are_drawn(tmp_path):
    scores = np.random.default_rng(0).random((6, 4))
    truth = np.arange(6) % 4
    draw_curves({"modules": scores, "image difference": -scores}, truth, tmp_path / "a.png")
    draw_recalls({0: 0.5, 5: 0.2, 10: 0.6}, 10, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 1
