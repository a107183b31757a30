"""The task of masks: loss, scores and pictures by hand, and a run from views to an export."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch.nn import functional as F

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import UsageError
from smallfry.kits.uav.pictures import draw_masks
from smallfry.kits.uav.segmentation import (
    UAVSegmentation,
    confusion,
    intersection_over_union,
    soft_dice,
)
from smallfry.kits.uav.students import masks_of, policy_of
from smallfry.tasks import (
    HasRecipe,
    LimitsAugmentation,
    Pictured,
    ScoredByClass,
    create_task,
    find_task,
)
from smallfry.training.augment import Normalize
from smallfry.training.recipes import recipe_of
from smallfry_runtime.runtime import Runtime

CLASSES = ("other", "floor", "obstacle")
SMALL = ["--data.options", "{views: 40}", "--data.image_size", "24", "32", "--progress", "quiet"]
TASK = UAVSegmentation()


@pytest.fixture
def outputs():
    return torch.randn(4, 3, 6, 8, dtype=torch.float64)


@pytest.fixture
def labels():
    return torch.randint(0, 3, (4, 6, 8))


def test_the_task_is_found_with_its_recipe():
    kind = find_task("uav-segmentation")
    assert kind is UAVSegmentation
    assert isinstance(kind, HasRecipe)
    for protocol in (Pictured, ScoredByClass, LimitsAugmentation):
        assert isinstance(kind(), protocol)
    assert recipe_of("uav-segmentation").name == "recipe_segmentation.yaml"
    assert TASK.outputs(3) == 3
    with pytest.raises(UsageError, match="leave out label_smoothing"):
        create_task("uav-segmentation", 0.1)


def test_the_loss_is_cross_entropy_and_dice_pixel_by_pixel(outputs, labels):
    wanted = []
    for image, label in zip(outputs.softmax(dim=1).numpy(), labels.numpy(), strict=True):
        entropy = -np.mean([np.log(image[label[i, j], i, j]) for i in range(6) for j in range(8)])
        dice = []
        for c in range(3):
            both = sum(image[c, i, j] for i in range(6) for j in range(8) if label[i, j] == c)
            sizes = image[c].sum() + (label == c).sum()
            dice.append((2 * both + 1) / (sizes + 1))
        wanted.append(entropy + 1 - np.mean(dice))
    found = TASK.losses(outputs, labels)
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert TASK.loss(outputs, labels).item() == pytest.approx(np.mean(wanted), abs=1e-6)
    assert soft_dice(outputs, labels).tolist() == pytest.approx(
        [(1 - (w - e)) for w, e in zip(wanted, entropies(outputs, labels), strict=True)], abs=1e-6
    )


def entropies(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none").mean(dim=(1, 2)).tolist()


def test_certain_right_masks_lose_nothing(labels):
    certain = 50 * F.one_hot(labels, 3).permute(0, 3, 1, 2).double()
    assert TASK.loss(certain, labels).item() == pytest.approx(0, abs=1e-6)
    scores = TASK.metrics(certain, labels)
    assert (scores["accuracy"], scores["pixel_accuracy"], scores["mean_iou"]) == (1, 1, 1)


def test_scores_are_those_of_scikit_learn(outputs, labels):
    found = outputs.argmax(dim=1)
    scores = TASK.metrics(outputs, labels)
    flat = labels.flatten().numpy(), found.flatten().numpy()
    assert scores["mean_iou"] == pytest.approx(jaccard_score(*flat, average="macro"))
    assert scores["pixel_accuracy"] == pytest.approx((flat[0] == flat[1]).mean())
    rows = TASK.class_scores(outputs, labels, CLASSES)
    each = jaccard_score(*flat, average=None)
    assert [rows[name]["iou"] for name in CLASSES] == pytest.approx(each)
    for i, name in enumerate(CLASSES):
        hits = ((flat[0] == i) & (flat[1] == i)).sum()
        assert rows[name]["precision"] == pytest.approx(hits / (flat[1] == i).sum())
        assert rows[name]["recall"] == pytest.approx(hits / (flat[0] == i).sum())
        iou = rows[name]["iou"]
        assert rows[name]["f1"] == pytest.approx(2 * iou / (1 + iou))
        assert rows[name]["images"] == 4
    assert TASK.rank(scores) == (scores["mean_iou"], -scores["loss"])


def test_a_class_that_is_nowhere_does_not_count():
    labels = torch.tensor([[[0, 0], [1, 1]]])
    outputs = 9.0 * F.one_hot(torch.tensor([[[0, 1], [1, 1]]]), 3).permute(0, 3, 1, 2)
    table = confusion(outputs.argmax(dim=1), labels, 3)
    assert table.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    unions = intersection_over_union(table)
    assert unions[:2].tolist() == pytest.approx([1 / 2, 2 / 3])
    assert unions[2].isnan()
    assert TASK.metrics(outputs, labels)["mean_iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert TASK.class_scores(outputs, labels, CLASSES)["obstacle"]["iou"] == 0


def test_an_image_is_right_with_95_percent_of_its_pixels():
    labels = torch.zeros(2, 10, 10, dtype=torch.int64)
    said = labels.clone()
    said[0].view(-1)[:5] = 1
    said[1].view(-1)[:6] = 1
    outputs = 9.0 * F.one_hot(said, 3).permute(0, 3, 1, 2)
    assert TASK.right(outputs, labels).tolist() == [True, False]
    assert TASK.metrics(outputs, labels)["accuracy"] == 0.5


def test_other_data_and_models_are_refused(outputs, labels):
    with pytest.raises(UsageError, match=r"a class for each pixel: name generated views"):
        TASK.targets(labels[:, 0, 0], outputs)
    with pytest.raises(UsageError, match=r"such as unet_xs; this one's outputs are \(4, 3\)"):
        TASK.losses(outputs[:, :, 0, 0], labels)
    assert TASK.targets(labels, outputs) is labels
    assert TASK.decode(outputs, CLASSES)[0].keys() == {"shares"}


@pytest.mark.parametrize(
    "setting",
    [
        ["--augment.flip", "true"],
        ["--augment.crop_padding", "4"],
        ["--augment.resized_crop", "0.5", "--augment.crop_padding", "null"],
        ["--augment.mixup", "0.2"],
        ["--augment.cutmix", "1"],
        ["--augment.policy", "trivial"],
        ["--augment.randaugment_ops", "2"],
        ["--augment.sizes", "[16, 24]"],
    ],
)
def test_augmentation_that_would_leave_the_mask_behind_is_refused(setting, tmp_path, capsys):
    asked = ["train", "--task", "uav-segmentation", *SMALL, "--run", str(tmp_path / "run")]
    assert main([*asked, *setting]) == 2
    words = f"would not hold for images changed by {setting[0].removeprefix('--')}: leave it out"
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_mirrored_testing_is_refused(tmp_path, capsys):
    asked = ["train", "--task", "uav-segmentation", *SMALL, "--run", str(tmp_path / "run")]
    assert main([*asked, "--test_flips", "true"]) == 2
    assert (
        "the outputs of uav-segmentation do not hold for mirrored images" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("uav") / "run"
    asked = ["train", "--task", "uav-segmentation", *SMALL, "--epochs", "2", "--batch_size", "8"]
    assert main([*asked, "--run", str(place)]) == 0
    return place


def test_the_task_alone_is_a_run(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["task"] == "uav-segmentation"
    assert summary["data"]["generated"] == {
        **{"family": "uav-rooms", "version": 1, "views": 40, "labels": "truth"},
        **{"pitch": 15.0, "seed": 0},
    }
    assert {*summary["measured"]["test"]} == {"loss", "accuracy", "pixel_accuracy", "mean_iou"}
    assert {*summary["per_class"]} == {*CLASSES}
    config = (run / "config.yaml").read_text()
    assert "crop_padding: 0" in config
    assert "flip: false" in config
    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["loss"] == pytest.approx(summary["measured"]["test"]["loss"])


def test_a_picture_is_segmented_and_measured(run, tmp_path, capsys):
    image = tmp_path / "view.png"
    Image.new("RGB", (32, 24), "brown").save(image)
    camera = "{camera: {focal: 21, cx: 15.5, cy: 11.5, height: 1.0, pitch: 15}, mask: true}"
    assert main(["predict", str(run), str(image), "--json", "--decoding", camera]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {*answer["shares"]} == {*CLASSES}
    assert {*answer["obstacles"]} == {"left", "middle", "right"}
    assert np.shape(answer["mask"]) == (24, 32)
    wrong = ["--decoding", "{camera: {height: 1.0}}"]
    assert main(["predict", str(run), str(image), *wrong]) == 2
    assert "camera has no focal, cx, cy" in capsys.readouterr().err


def test_a_students_masks_are_its_likeliest_classes(run):
    trained = smallfry.load(run)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 32), np.uint8)
    with torch.no_grad():
        wanted = trained.model(trained.normalize(torch.from_numpy(pixels)[None])).argmax(1)[0]
    assert np.array_equal(masks_of(trained)(pixels), wanted.numpy())
    with pytest.raises(UsageError, match="a student of uav-policy is needed, and this model was"):
        policy_of(trained)


def test_masks_are_drawn(tmp_path, run):
    data = load_data("uav-rooms", options={"views": 40}, image_size=(24, 32))
    outputs = torch.randn(len(data.test), 3, 24, 32)
    TASK.draw(outputs, data.test, CLASSES, tmp_path)
    with Image.open(tmp_path / "masks.png") as picture:
        assert picture.width > picture.height > 200
    empty = data.test.take(torch.arange(0))
    draw_masks(empty.images, {"labels": empty.labels}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


@pytest.mark.slow
def test_natural_gradient_takes_the_pixels_likelihood(tmp_path):
    asked = ["train", "--task", "uav-segmentation", *SMALL, "--epochs", "1", "--batch_size", "8"]
    asked += ["--optimizer", "kfac", "--run", str(tmp_path / "run")]
    assert main(asked) == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8", "int8_dynamic"])
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")  # few images
def test_a_run_is_exported_and_decoded_without_pytorch(run, tmp_path, precision):
    export = smallfry.export(run, tmp_path / "export", precision=precision)
    runtime = Runtime(export)
    assert runtime.manifest.task == "uav-segmentation"
    data = load_data("uav-rooms", options={"views": 40}, image_size=(24, 32))
    pixels = data.test.images.numpy()
    found = np.array([each["mask"] for each in runtime.decode(pixels, settings={"mask": True})])
    trained = smallfry.load(run)
    wanted = np.stack([masks_of(trained)(each) for each in pixels])
    assert (found == wanted).mean() > (0.9999 if precision == "float32" else 0.8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::smallfry.errors.SmallfryWarning")  # few images
def test_a_run_is_quantized(run, tmp_path, capsys):
    methods = ["--methods", "[{quantize: {weights: 8, activations: 8}}]"]
    assert main(["compress", str(run), *methods, "--to", str(tmp_path / "int8")]) == 0
    assert main(["evaluate", str(tmp_path / "int8"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    before = json.loads((run / "summary.json").read_text())["measured"]["test"]
    assert scores["mean_iou"] == pytest.approx(before["mean_iou"], abs=0.1)


@pytest.mark.slow
def test_a_small_network_learns_masks_by_heart():
    data = load_data("uav-rooms", options={"views": 20}, test=0.0, image_size=(24, 32))
    some = data.train.take(torch.arange(12))
    images = Normalize((0.5,) * 3, (0.25,) * 3)(some.images)
    model = timm.create_model("unet_xs", img_size=(24, 32))
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(150):
        optimizer.zero_grad()
        TASK.loss(model(images), some.labels).backward()
        optimizer.step()
    with torch.no_grad():
        assert TASK.metrics(model(images), some.labels)["mean_iou"] > 0.95
