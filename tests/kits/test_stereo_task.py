"""The task of stereo: truth, losses and scores by loops, decoding, and a run with its exits."""

import base64
import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

import smallfry
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import DataError, UsageError
from smallfry.kits.stereo.exits import cut
from smallfry.kits.stereo.losses import disparity_loss, semantic_loss, terms, total
from smallfry.kits.stereo.metrics import (
    Errors,
    full_disparity,
    full_labels,
    mean_iou,
    score,
)
from smallfry.kits.stereo.models import FACTORS, StereoOutput
from smallfry.kits.stereo.task import Stereo
from smallfry.kits.stereo.truth import at_exit, class_weights, pack, unpack
from smallfry.tasks import HasRecipe, Pictured, create_task, find_task
from smallfry_runtime.decoders.stereo import decode, enlarge
from smallfry_runtime.runtime import Runtime

SIZE, CLASSES = (32, 64), 3
NAMES = ("sky", "road", "tree")


def rows(count=2, scale=0.0, offset=0.0):
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        disparity = random.uniform(1, 20, SIZE) * (random.random(SIZE) < 0.8)
        labels = random.integers(-1, CLASSES, SIZE)
        hidden = random.random(SIZE) < 0.2
        found.append(pack(disparity, hidden, labels, CLASSES, scale, offset))
    return torch.from_numpy(np.stack(found))


def outputs(count=2, seed=0):
    random = torch.Generator().manual_seed(seed)
    found = []
    for factor in FACTORS:
        size = (SIZE[0] // factor, SIZE[1] // factor)
        for _ in range(2):
            found.append(20 / factor * torch.rand(count, *size, generator=random))
        found.append(torch.randn(count, CLASSES, *size, generator=random))
    return StereoOutput(*found)


TRUTH, OUTPUTS = unpack(rows()), outputs()


def test_truth_is_unpacked_as_it_was_packed():
    disparity = np.array([[0.0, 2.5], [3.0, 4.0]])
    hidden = np.array([[False, True], [False, False]])
    packed = pack(disparity, hidden, np.array([[0, -1], [1, 2]]), 3, 70.0, 1.5)
    truth = unpack(torch.from_numpy(packed)[None])
    assert truth.disparity[0].tolist() == disparity.tolist()
    assert truth.known[0].tolist() == [[False, True], [True, True]]
    assert truth.hidden[0].tolist() == hidden.tolist()
    assert truth.labels[0].tolist() == [[0, -1], [1, 2]]
    assert (truth.scale.item(), truth.offset.item()) == (70.0, 1.5)
    with pytest.raises(DataError, match="needs pairs of views with disparities"):
        unpack(torch.zeros(3, 40))
    with pytest.raises(DataError, match=r"--data stereo-folder --data\.root DIR"):
        Stereo().targets(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize(
    ("kappa", "wanted"),
    [
        (1.12, (0.535700431, 0.737005081, 1.081245282, 1.646049206)),
        (2.0, (0.874584907, 0.962138633, 1.046907526, 1.116368934)),
    ],
)
def test_weights_of_classes_are_the_golden_ones(kappa, wanted):
    found = class_weights(np.array([0.5, 0.3, 0.15, 0.05]), kappa)
    assert np.abs(found - wanted).max() < 1e-9
    assert found.sum() == pytest.approx(4)
    with pytest.raises(UsageError, match="kappa is above 1"):
        class_weights(np.array([1.0]), 1.0)


@pytest.mark.parametrize("factor", FACTORS)
def test_truth_of_an_exit_is_of_blocks(factor):
    found = at_exit(TRUTH, factor)
    for b in range(2):
        for i in range(SIZE[0] // factor):
            for j in range(SIZE[1] // factor):
                block = np.s_[b, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
                known = TRUTH.known[block]
                assert found.known[b, i, j] == (2 * known.sum() >= factor**2)
                mean = TRUTH.disparity[block][known].double().mean() / factor
                assert found.disparity[b, i, j].item() == pytest.approx(mean.item(), rel=1e-5)
                labels = TRUTH.labels[block]
                counts = torch.bincount(labels[labels >= 0], minlength=CLASSES)
                assert found.labels[b, i, j] == (counts.argmax() if counts.sum() else -1)


def test_losses_are_means_over_known_pixels():
    found, wanted = torch.rand(2, 3, 4) * 4, torch.rand(2, 3, 4) * 4
    known = torch.rand(2, 3, 4) < 0.7
    losses = disparity_loss(found, wanted, known)
    for b in range(2):
        error = (found - wanted).abs()[b][known[b]]
        each = torch.where(error < 1, error**2 / 2, error - 0.5)
        assert losses[b].item() == pytest.approx(each.mean().item(), rel=1e-6)
    assert disparity_loss(found, wanted, known & False).tolist() == [0, 0]


def test_cross_entropy_is_weighted_and_grows_with_unlabelled_pixels():
    logits, weights = torch.randn(2, 3, 4, 5), torch.tensor([[0.5, 1.0, 1.5], [1.0, 1.0, 1.0]])
    labels = torch.randint(-1, 3, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    found = semantic_loss(logits, labels, weights)
    for b in range(2):
        each = F.cross_entropy(
            logits[b : b + 1], labels[b : b + 1], weights[b], ignore_index=-1, reduction="sum"
        )
        labelled = (labels[b] >= 0).sum()
        grown = 1 + 0.1 * (20 - labelled) / labelled
        assert found[b].item() == pytest.approx((each / labelled * grown).item(), rel=1e-5)
    nothing = semantic_loss(logits, labels * 0 - 1, weights)
    assert nothing.tolist() == [0, 0]


def test_the_loss_is_the_weighted_sum_of_its_terms():
    parts = terms(OUTPUTS, TRUTH)
    assert len(parts) == 9
    wanted = torch.zeros(2)
    for exit_weight, factor in zip((0.25, 0.5, 1.0), FACTORS, strict=True):
        wanted += exit_weight * parts[f"disparity{factor}"]
        wanted += 2 * exit_weight * (parts[f"semantics{factor}"] + parts[f"refined{factor}"])
    task = Stereo()
    assert_close(total(OUTPUTS, TRUTH), wanted)
    assert_close(task.losses(OUTPUTS, TRUTH), wanted)
    assert {*task.terms(OUTPUTS, TRUTH)} == {*parts}
    assert task.loss(OUTPUTS, TRUTH).item() == pytest.approx(wanted.mean().item())


def test_an_error_counts_above_three_pixels_and_five_percent():
    wanted = torch.tensor([[[10.0, 10.0, 100.0, 100.0]]])
    found = torch.tensor([[[13.5, 12.0, 104.0, 106.0]]])
    errors = Errors()
    errors.add(found, wanted, torch.zeros(1, 1, 4, dtype=torch.bool))
    assert errors.means() == {"epe": 0, "d1": 0, "bad1": 0}
    errors.add(found, wanted, torch.ones(1, 1, 4, dtype=torch.bool))
    assert errors.means() == {"epe": (3.5 + 2 + 4 + 6) / 4, "d1": 0.5, "bad1": 1.0}


def test_mean_iou_leaves_out_classes_that_are_nowhere():
    counts = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    assert mean_iou(counts) == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert mean_iou(counts * 0) == 0


def test_scores_are_of_each_exit_at_full_size():
    found = Stereo().metrics(OUTPUTS, rows())
    seen = TRUTH.known & ~TRUTH.hidden
    for i, factor in enumerate(FACTORS, 1):
        refined = full_disparity(OUTPUTS[3 * i - 2], factor)
        assert refined.shape == TRUTH.disparity.shape
        error = (refined - TRUTH.disparity).abs()
        assert found[f"epe_{i}"] == pytest.approx(error[seen].mean().item(), rel=1e-5)
        assert found[f"epe_all_{i}"] == pytest.approx(error[TRUTH.known].mean().item(), rel=1e-5)
        labels = full_labels(OUTPUTS[3 * i - 1], factor)
        right = (labels == TRUTH.labels)[TRUTH.labels >= 0].double().mean().item()
        assert found[f"pixels_{i}"] == pytest.approx(right, rel=1e-6)
    assert found["disparity_error"] == found["epe_3"]
    assert found["miou"] == found["miou_3"]
    assert "depth_error" not in found
    assert Stereo().rank(found) == (-found["epe_3"], found["miou_3"])


def test_depths_are_scored_where_the_cameras_are_known():
    truth = unpack(rows(scale=70.0, offset=2.0))
    found = score(OUTPUTS, truth)["depth_error"]
    seen = truth.known & ~truth.hidden
    refined = full_disparity(OUTPUTS.refined4, 4)
    wanted = (70 / (refined + 2).clamp(min=0.5) - 70 / (truth.disparity + 2)).abs()[seen]
    assert found == pytest.approx(wanted.mean().item(), rel=1e-4)


def test_right_pairs_are_off_by_less_than_a_pixel():
    exact = at_exit(TRUTH, 4).disparity
    task = Stereo()
    assert task.right(OUTPUTS, TRUTH).tolist() == [False, False]
    flat = unpack(
        torch.from_numpy(
            np.stack(
                [pack(np.full(SIZE, 8.0), np.zeros(SIZE, bool), np.zeros(SIZE, int), CLASSES)] * 2
            )
        )
    )
    same = OUTPUTS._replace(refined4=torch.full_like(exact, 2.2))
    assert task.right(same, flat).tolist() == [True, True]


def arrays(found):
    return {name: value.numpy() for name, value in found._asdict().items()}


def test_maps_are_decoded_as_pytorch_enlarges_them():
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    wanted = F.interpolate(torch.from_numpy(values), scale_factor=4, mode="bilinear")
    assert np.abs(enlarge(values, 4) - wanted.numpy()).max() < 1e-6
    for number, factor in enumerate(FACTORS, 1):
        found = decode(arrays(OUTPUTS), NAMES, {"exit": number})[1]
        stored = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["disparity_png16"]))))
        disparity = full_disparity(OUTPUTS[3 * number - 2], factor)[1].numpy()
        assert np.abs(stored / 256 - disparity).max() < 0.5 / 256 + 1e-4
        labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["labels_png"]))))
        assert (labels == full_labels(OUTPUTS[3 * number - 1], factor)[1].numpy()).mean() > 0.999
        assert sum(found["shares"].values()) == pytest.approx(1)
    last = Stereo().decode(OUTPUTS, NAMES)
    assert last == decode(arrays(OUTPUTS), NAMES, {"exit": 3})


def test_answers_are_cut_to_the_size_of_each_pair():
    sizes = [(20, 50), SIZE]
    settings = {"focal": 100.0, "baseline": 0.2, "sizes": sizes}
    for number, (height, width) in enumerate(sizes):
        found = decode(arrays(OUTPUTS), NAMES, settings)[number]
        kept = full_disparity(OUTPUTS.refined4, 4)[number, :height, :width].numpy()
        classes = full_labels(OUTPUTS.semantics4, 4)[number, :height, :width].numpy()
        stored = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["disparity_png16"]))))
        assert stored.shape == (height, width)
        assert np.abs(stored / 256 - kept).max() < 0.5 / 256 + 1e-4
        labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["labels_png"]))))
        assert (labels == classes).mean() > 0.999
        wanted = {"least": kept.min(), "median": np.median(kept), "greatest": kept.max()}
        assert found["disparity"] == pytest.approx(wanted, abs=1e-4)
        shares = {name: (classes == k).mean() for k, name in enumerate(NAMES)}
        assert found["shares"] == pytest.approx(shares, abs=2e-3)
        near = np.maximum(kept[classes == 1], 0.5)
        assert found["depth_m"]["road"] == pytest.approx(np.median(20 / near), rel=1e-3)


def test_depths_need_focal_length_and_baseline():
    flat = OUTPUTS._replace(refined4=torch.full((2, 8, 16), 2.0))
    found = decode(arrays(flat), NAMES, {"focal": 100.0, "baseline": 0.2, "offset": 2.0})
    assert {*found[0]["depth_m"].values()} == {2.0}  # 100 × 0.2 / (8 + 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exit": 4}, "exit is 1, 2 or 3, or 0 for the last, got 4"),
        ({"focal": 100.0}, "depths need both focal, in pixels, and baseline"),
        ({"focal": "far"}, "focal, baseline and offset are numbers"),
        ({"depth": True}, "decoding has the settings exit, focal, baseline, offset and sizes"),
    ],
)
def test_wrong_settings_of_decoding_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        decode(arrays(OUTPUTS), NAMES, settings)
    first = {name: v for name, v in arrays(OUTPUTS).items() if name.endswith("16")}
    with pytest.raises(UsageError, match="has 1 exits, and exit 2 was asked for"):
        decode(first, NAMES, {"exit": 2})


def test_the_task_is_found_with_its_recipe():
    kind = find_task("stereo")
    assert kind is Stereo
    assert isinstance(kind, HasRecipe)
    assert isinstance(kind(), Pictured)
    assert kind().outputs(5) == 5
    with pytest.raises(UsageError, match="leave out label_smoothing"):
        create_task(kind.name, 0.1)


def test_pairs_and_exits_are_drawn(tmp_path):
    data = load_data("stereo-planes", options={"pairs": 10}, test=0.3, image_size=(32, 64))
    model = timm.create_model("rts2net_c1", num_classes=4, max_disparity=32).eval()
    with torch.no_grad():
        found = model(data.test.images / 255)
    Stereo().draw(found, data.test, data.classes, tmp_path)
    for name in ("stereo.png", "exits.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("stereo") / "run"
    asked = ["train", "--task", "stereo", "--data.options", "{pairs: 30}", "--epochs", "1"]
    asked += ["--model", "rts2net_c1", "--model.options", "{max_disparity: 32}"]
    asked += ["--data.image_size", "32", "64", "--progress", "quiet", "--run", str(place)]
    assert main(asked) == 0
    return place


def test_the_task_alone_is_a_run(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["task"] == "stereo"
    assert summary["data"]["generated"]["family"] == "stereo-planes"
    assert {"epe_1", "epe_2", "epe_3", "miou"} < {*summary["measured"]["test"]}
    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["epe_3"] == pytest.approx(summary["measured"]["test"]["epe_3"])


def test_views_are_read_from_a_file(run, tmp_path, capsys):
    views = np.random.default_rng(0).integers(0, 256, (6, 32, 64), np.uint8)
    np.save(tmp_path / "views.npy", views)
    asked = ["predict", str(run), str(tmp_path / "views.npy"), "--json"]
    assert main([*asked, "--decoding", "{focal: 90.0, baseline: 0.1}"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"disparity_png16", "labels_png", "depth_m"} < {*answer}
    names = [str(tmp_path / f"{side}.png") for side in ("left", "right")]
    for name, view in zip(names, (views[:3], views[3:]), strict=True):
        Image.fromarray(view.transpose(1, 2, 0)).save(name)
    assert main([*asked[:2], *names, *asked[3:]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("image") == ", ".join(names)
    assert found["disparity_png16"] == answer["disparity_png16"]
    for name, view in zip(names, (views[:3], views[3:]), strict=True):
        Image.fromarray(view.transpose(1, 2, 0)[:20, :50]).save(name)
    assert main([*asked[:2], *names, *asked[3:]]) == 0
    cut_off = json.loads(capsys.readouterr().out)
    for map_of in ("disparity_png16", "labels_png"):
        assert Image.open(io.BytesIO(base64.b64decode(cut_off[map_of]))).size == (50, 20)
    assert main([*asked[:2], names[0]]) == 1
    assert "a left view without its right one" in capsys.readouterr().err
    np.save(tmp_path / "few.npy", views[:3])
    assert main(["predict", str(run), str(tmp_path / "few.npy")]) == 1
    assert "few.npy" in capsys.readouterr().err


@pytest.mark.slow
def test_each_exit_is_exported_and_equals_the_whole(run, tmp_path):
    trained = smallfry.load(run)
    views = np.random.default_rng(0).integers(0, 256, (3, 6, 32, 64), np.uint8)
    whole = Runtime(smallfry.export(run, tmp_path / "whole"))
    pairs = [tmp_path / "left.png", tmp_path / "right.png"]
    for file, view in zip(pairs, (views[0, :3], views[0, 3:]), strict=True):
        Image.fromarray(view.transpose(1, 2, 0)).save(file)
    (answer,) = whole.answer_each(whole.find([*map(str, pairs)], io.BytesIO()))
    assert answer.value == whole.decode(views[:1])[0]
    for number in (1, 2, 3):
        short = cut(trained, number)
        folder = short.save(tmp_path / f"run{number}")
        export = Runtime(smallfry.export(folder, tmp_path / f"exit{number}"))
        first = whole.decode(views, settings={"exit": number})
        for one, other in zip(export.decode(views), first, strict=True):
            assert one["disparity"] == pytest.approx(other["disparity"], abs=1e-4)
            assert one["shares"] == pytest.approx(other["shares"], abs=1e-3)
    for wrong in (0, 4):
        with pytest.raises(UsageError, match="keep 1 to 3"):
            cut(trained, wrong)


def test_exits_are_cut_off_stereo_networks_alone(run):
    trained = smallfry.load(run)
    short = cut(trained, 1)
    kept = short.model.state_dict()
    assert all(torch.equal(value, trained.model.state_dict()[name]) for name, value in kept.items())
    assert short.spec.arguments["exits"] == 1
    with pytest.raises(UsageError, match="trained stereo networks"):
        cut(trained._replace(model=torch.nn.Identity()), 1)
