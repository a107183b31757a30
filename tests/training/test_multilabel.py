"""Several classes per image, from labels to the runtime."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from run_helpers import StopAt, assert_same_run
from several_labels import (
    GIVEN,
    NAMES,
    write_columns,
    write_csv,
    write_lines,
    write_links,
    write_pairs,
)
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multilabel_average_precision,
    multilabel_f1_score,
)

import smallfry
from smallfry.cli import main
from smallfry.cli._parser import read
from smallfry.curvature.likelihoods import Bernoulli
from smallfry.data import load_data
from smallfry.errors import DataError, SmallfryWarning, Stopped, UsageError
from smallfry.tasks.multilabel import LabelTargets, MultiLabel, best_thresholds
from smallfry.training.augment import Augment
from smallfry.training.config import AugmentConfig, DataConfig, TrainConfig
from smallfry.training.evaluation import predict, task_of
from smallfry.training.train import resume, train
from smallfry_runtime.manifest import Manifest
from smallfry_runtime.runtime import Runtime, sigmoid


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "images")


@pytest.fixture(scope="module")
def folder(pairs):
    place = pairs[0][0].parent
    write_columns(place / "columns.csv", pairs)
    write_csv(place / "labels.csv", pairs)
    write_lines(place / "labels.jsonl", pairs)
    return place


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "several"
    data = ("--data", str(folder), "--data.labels=columns.csv", "--data.validation=0.3")
    options = ("--epochs=4", "--optimizer.lr=0.003", "--run", str(place))
    assert main(["train", *data, *GIVEN, *options]) == 0
    return place


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    return smallfry.export(run, tmp_path_factory.mktemp("exports") / "several")


def load(folder, **given):
    given = {"image_size": (8, 16), "several_labels": True, "validation": 0.2, **given}
    return load_data(str(folder), **given)


def classes_by_file(data):
    found = {}
    for name, split in (
        ("train", data.train),
        ("validation", data.validation),
        ("test", data.test),
    ):
        for i, row in enumerate(split.labels.tolist()):
            file = data.locate(name, i).rpartition("/")[2]
            found[file] = {data.classes[c] for c, has in enumerate(row) if has}
    return found


# data


@pytest.mark.parametrize("labels", ["columns.csv", "labels.csv", "labels.jsonl", "links"])
def test_every_form_of_labels_gives_the_same_classes(pairs, folder, tmp_path, labels):
    if labels == "links":
        write_links(tmp_path / "links", pairs)
        data = load(tmp_path / "links")
    else:
        data = load(folder, labels=labels)
    assert set(data.classes) == set(NAMES)
    some = labels in ("labels.csv", "links")  # which can't hold images of no class
    expected = {file.name: set(names) for file, names in pairs if names or not some}
    found = classes_by_file(data)
    assert found == expected
    assert data.train.labels.shape == (len(data.train), 3)
    assert min(len(data.validation), len(data.test)) > 0


def test_pixels_belong_to_their_labels(pairs, folder):
    data = load(folder, labels="columns.csv")
    from PIL import Image

    for i in range(len(data.train)):
        file = data.locate("train", i)
        assert np.array_equal(data.train.images[i][0].numpy(), np.asarray(Image.open(file)))


def test_copies_are_one_image(pairs, tmp_path):
    image, _ = next(each for each in pairs if len(each[1]) == 2)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(image.read_bytes())
    other = next(file for file, _ in pairs if file != image)
    (tmp_path / "dog/other.png").write_bytes(other.read_bytes())
    data = load(tmp_path, validation=0.0, test=0.0)
    assert sorted(data.train.labels.tolist()) == [[0, 1], [1, 1]]


@pytest.mark.parametrize(("text", "separator"), [("a;b", None), ("a,b", None), ("a/b", "/")])
def test_separators_are_found_or_given(pairs, folder, text, separator, tmp_path):
    for number, (file, _) in enumerate(pairs[:4]):
        (tmp_path / f"{number}.png").write_bytes(file.read_bytes())
    rows = [["image", "tags"], ["0", text], ["1", "a"], ["2", "b"], ["3", "b"]]
    with open(tmp_path / "l.csv", "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    given = {"labels": "l.csv", "label_separator": separator, "validation": 0.0, "test": 0.0}
    data = load(tmp_path, **given)
    assert data.classes == ("a", "b")
    assert data.train.labels.tolist() == [[1, 1], [1, 0], [0, 1], [0, 1]]


def test_splits_and_limits_hold_every_class(folder):
    data = load(folder, labels="columns.csv", limit=12)
    assert len(data.train) == 12
    for split in (data.train, data.validation, data.test):
        assert (split.labels.sum(dim=0) > 0).all()
    again = load(folder, labels="columns.csv", limit=12)
    assert again.fingerprint == data.fingerprint
    assert torch.equal(again.train.rows, data.train.rows)


def test_columns_can_be_chosen(folder):
    data = load(folder, labels="columns.csv", label_columns=["two", "zero"])
    assert data.classes == ("two", "zero")


def test_other_data_is_put_into_the_order_of_the_model(folder):
    data = load(folder, labels="columns.csv", label_columns=["two", "zero"])
    with pytest.warns(smallfry.errors.SmallfryWarning, match="left out the classes two"):
        moved = data.relabelled(["zero", "other"])
    assert torch.equal(moved.train.labels[:, 0], data.train.labels[:, 1])
    assert not moved.train.labels[:, 1].any()
    assert torch.equal(moved.test.labels[:, 0], data.test.labels[:, 1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["image,labels", "000,zero", "001,"], "line 3: has no labels"),
        (["image,labels,split", "000,zero,train", "001,four,test"], "class 'four' is not among"),
        (["image,labels,split", "000,zero,train", "001,zer,test"], "did you mean 'zero'"),
        (["image,a,b", "000,1,0", "001,1,0"], "no training image has the class 'b'"),
        (["image,a,b", "000,1,0", "001,1,2"], "line 3: column 'b' must be 0 or 1, not '2'"),
        (["image,a,b", "000,1,0", "001,1,"], "column 'b' must be 0 or 1, not ''"),
        (["image,labels", "000,a", "000,b"], "has a row before"),
        (["image,labels", "000,a", "nothing,b"], "no image 'nothing'"),
    ],
)
def test_wrong_labels_are_named(folder, rows, message):
    (folder / "wrong.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=message):
        load(folder, labels="wrong.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "000", "labels": null}', "has no labels"),
        ('{"image": "000", "labels": [["a"]]}', "expected a list of class names"),
        ('{"image": "000", "labels": []}', "no training image has a class"),
    ],
)
def test_wrong_lines_are_named(folder, line, message):
    (folder / "wrong.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        load(folder, labels="wrong.jsonl")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"labels": "columns.csv", "label_columns": ["tow"]},
            "no column 'tow'; did you mean 'two'",
        ),
        ({"labels": "labels.csv", "label": "clases"}, "no column 'clases'"),
        ({"labels": "labels.csv", "stream": True}, "without data.stream"),
        ({"labels": "labels.csv", "remove_duplicates": True}, "without data.remove_duplicates"),
        ({"label_separator": ";"}, "of the file data.labels"),
    ],
)
def test_options_that_do_not_apply_are_refused(folder, given, message):
    with pytest.raises(UsageError, match=message):
        load(folder, **given)


def test_other_data_has_one_class_an_image(capsys):
    with pytest.raises(UsageError, match="without named data such as digits"):
        load_data("digits", several_labels=True)
    with pytest.raises(UsageError, match=r"data\.several_labels is of the task multilabel"):
        TrainConfig(data=DataConfig("photos", several_labels=True))
    assert TrainConfig(data=DataConfig("photos"), task="multilabel").data.several_labels


# task


def test_the_loss_is_that_of_the_likelihood():
    torch.manual_seed(0)
    outputs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(2, (5, 3))
    targets = MultiLabel().targets(labels, labels.double())
    loss = MultiLabel().loss(outputs, targets)
    expected = F.binary_cross_entropy_with_logits(outputs, labels.double()) * 3
    torch.testing.assert_close(loss, expected)
    # the Fisher matrix of one image's outputs is the Hessian of its loss
    hessian = torch.autograd.functional.hessian(
        lambda o: MultiLabel().loss(o, LabelTargets(labels[:1], labels[:1].double())), outputs[:1]
    )
    columns = torch.cat([c for (c,) in Bernoulli().columns((outputs[:1].detach(),))])
    torch.testing.assert_close(columns.T @ columns, hessian.view(3, 3))


def test_smoothing_moves_targets_towards_a_half():
    outputs, labels = torch.tensor([[3.0, -2.0]]), torch.tensor([[1, 0]])
    found = MultiLabel(label_smoothing=0.2).loss(outputs, LabelTargets(labels, labels.float()))
    soft = torch.tensor([[0.9, 0.1]])
    expected = F.binary_cross_entropy_with_logits(outputs, soft, reduction="sum")
    torch.testing.assert_close(found, expected)


def test_scores_equal_torchmetrics():
    torch.manual_seed(0)
    outputs, labels = torch.randn(40, 4), torch.randint(2, (40, 4))
    task = MultiLabel(thresholds=(0.3, 0.5, 0.6, 0.4))
    found = task.metrics(outputs, labels)
    chosen = (outputs.sigmoid() >= torch.tensor(task.thresholds)).int()
    average = multilabel_average_precision(outputs.sigmoid(), labels, 4)
    assert found["mean_average_precision"] == pytest.approx(average.item())
    for kind in ("macro", "micro"):
        expected = multilabel_f1_score(chosen, labels, 4, average=kind).item()
        assert found[f"{kind}_f1"] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx((chosen == labels).all(1).double().mean().item())
    assert task.right(outputs, LabelTargets(labels, labels)).sum() == round(40 * found["accuracy"])


def test_confident_answers_keep_their_order():
    outputs, labels = torch.tensor([18.0, 25.0, 35.0, 40.0])[:, None], torch.tensor([0, 0, 1, 1])
    assert MultiLabel().metrics(outputs, labels[:, None])["mean_average_precision"] == 1.0
    tied = torch.tensor([20.0, 20.0, 20.0, 20.0])[:, None]
    assert MultiLabel().metrics(tied, labels[:, None])["mean_average_precision"] == 0.5
    few = torch.tensor([0.0, torch.tensor(0.0).nextafter(torch.tensor(1.0))])[:, None]
    assert MultiLabel().metrics(few, labels[1:3, None])["mean_average_precision"] == 1.0


def test_a_threshold_between_neighbouring_probabilities_parts_them():
    low = torch.rand(200, generator=torch.Generator().manual_seed(0))
    shares = torch.stack([low, low.nextafter(torch.tensor(2.0))])
    labels = torch.tensor([[0], [1]]).expand(2, 200)
    cuts = torch.tensor(best_thresholds(shares, labels))
    assert torch.equal(shares >= cuts, labels.bool())


def test_a_class_without_images_does_not_change_the_means():
    outputs, labels = torch.randn(10, 2), torch.zeros(10, 2, dtype=torch.int64)
    assert MultiLabel().metrics(outputs, labels)["mean_average_precision"] == 0.0
    labels[:5, 0] = 1
    alone = MultiLabel().metrics(outputs[:, :1], labels[:, :1])
    both = MultiLabel().metrics(outputs, labels)
    assert both["mean_average_precision"] == alone["mean_average_precision"]
    assert both["macro_f1"] == alone["macro_f1"]


def test_thresholds_have_the_greatest_f1_of_all():
    torch.manual_seed(0)
    shares = (torch.rand(30, 3) * 10).round() / 10  # with equal ones
    labels = torch.randint(2, (30, 3))
    labels[:, 2] = 0
    cuts = best_thresholds(shares, labels)
    assert cuts[2] == 0.5

    def f1(cut, i):
        said = shares[:, i] >= cut
        hits = (said & labels[:, i].bool()).sum()
        return float(2 * hits / (said.sum() + labels[:, i].sum()))

    for i in (0, 1):
        assert f1(cuts[i], i) == max(f1(cut, i) for cut in torch.linspace(0, 1, 101))


def test_single_labels_are_refused():
    with pytest.raises(UsageError, match="data of several classes per image"):
        MultiLabel().targets(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2))


@pytest.mark.parametrize("mixing", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.0}])
def test_mixed_images_have_mixed_labels(mixing):
    config = AugmentConfig(**{"mixup": 0.0, "cutmix": 0.0, **mixing})
    augment = Augment(config, (8, 16), 3, [0.5], [0.5], False, MultiLabel().targets)
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]])
    batch = augment(torch.randint(256, (3, 1, 8, 16), dtype=torch.uint8), labels)
    shares, kept = batch.targets.shares, batch.targets.labels
    assert torch.equal(kept, labels)
    own = (shares - labels.roll(1, 0)) / (labels - labels.roll(1, 0))
    own = own[labels != labels.roll(1, 0)]  # the share of an image in itself
    torch.testing.assert_close(own, own[:1].expand_as(own))
    assert (own[0] == 1) == (mixing == {"mixup": 0.0})


# runs


def test_a_run_learns_and_keeps_calibrated_thresholds(run, folder):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["measured"]["test"]["mean_average_precision"] > 0.4
    assert {*summary["per_class"]} == set(NAMES)
    trained = smallfry.load(run)
    cuts = trained.manifest["thresholds"]
    assert [summary["per_class"][name]["threshold"] for name in trained.classes] == cuts
    data = load(folder, labels="columns.csv", validation=0.3)
    found = predict(trained.model, data.validation, trained.normalize)
    assert cuts == best_thresholds(found.logits.sigmoid(), found.labels)


def test_its_pictures_show_classes_curves_and_mistakes(run, folder, tmp_path):
    trained = smallfry.load(run)
    data = load(folder, labels="columns.csv", validation=0.3)
    found = predict(trained.model, data.test, trained.normalize)
    task_of(trained.manifest).draw(found.logits, data.test, trained.classes, tmp_path)
    for name in ("classes.png", "precision_recall.png", "mistakes.png"):
        assert (tmp_path / name).stat().st_size > 3000


def test_evaluate_scores_with_these_thresholds(run, folder, capsys):
    assert main(["evaluate", str(run), "--json", "--per_class"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    for name, value in summary["measured"]["test"].items():
        assert found[name] == pytest.approx(value)
    for name, row in found["per_class"].items():
        assert row == pytest.approx(summary["per_class"][name])
    assert main(["evaluate", str(run), "--data", str(folder), "--split=train", "--json"]) == 0
    assert "mean_average_precision" in json.loads(capsys.readouterr().out)


def test_predictions_name_the_chosen_classes(run, folder, capsys):
    files = sorted(map(str, folder.glob("00*.png")))
    trained = smallfry.load(run)
    cuts = dict(zip(trained.classes, trained.manifest["thresholds"], strict=True))
    assert main(["predict", str(run), *files, "--json", "--top_k=1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, answer in zip(rows, trained.predict(files, top_k=3), strict=True):
        assert row["classes"] == list(answer.chosen)
        assert set(answer.chosen) == {name for name, share in answer.top if share >= cuts[name]}
        assert {*row["classes"]} <= {each["class"] for each in row["top"]}
        assert len(row["top"]) <= 1 + len(answer.chosen)
        assert "class" not in row
    assert main(["predict", str(run), files[0]]) == 0
    assert "%" in capsys.readouterr().out


def test_a_table_of_predictions_holds_no_formula(run, folder, tmp_path):
    file = tmp_path / "found.csv"
    assert (
        main(
            ["predict", str(run), str(folder / "000.png"), str(folder / "001.png"), f"--csv={file}"]
        )
        == 0
    )
    rows = list(csv.reader(file.read_text().splitlines()))
    assert rows[0][:2] == ["image", "classes"]
    assert sorted(rows[0][-3:]) == sorted(f"p({name})" for name in NAMES)
    assert all(not cell.startswith("=") for row in rows for cell in row)
    assert all(0 <= float(cell) <= 1 for row in rows[1:] for cell in row[-3:])


@pytest.mark.slow
def test_the_runtime_answers_as_pytorch_with_thresholds_in_its_manifest(run, export, folder):
    trained, runtime = smallfry.load(run), Runtime(export)
    assert list(runtime.thresholds) == trained.manifest["thresholds"]
    assert json.loads((export / "manifest.json").read_text())["format"] == 4
    files = sorted(folder.glob("*.png"))[:20]
    ours = trained.predict(list(map(str, files)), top_k=3)
    from smallfry_runtime.inputs import InputImage

    theirs = list(runtime.classify([InputImage(f.name, f, None) for f in files], 3))
    for one, other in zip(ours, theirs, strict=True):
        assert dict(other.top) == pytest.approx(dict(one.top), abs=1e-4)
        near = min(abs(s - c) for (_, s), c in zip(one.top, runtime.thresholds, strict=True))
        assert set(one.chosen) == set(other.chosen) or near < 1e-3
    assert not np.allclose(runtime.predict(files).probabilities.sum(axis=1), 1, atol=1e-2)


def test_a_device_needs_no_torch(export, folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from smallfry_runtime.runtime import Runtime\n"
        f"print(Runtime({str(export)!r}).predict([{str(folder / '000.png')!r}]).probabilities)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sigmoids_do_not_overflow():
    with np.errstate(over="raise"):
        found = sigmoid(np.array([-1e4, -1.0, 0.0, 1.0, 1e4], np.float32))
    expected = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4]).sigmoid().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_server_and_the_demo_answer_with_several_classes(run, export, folder):
    from smallfry.demo.routes import Shown, answer

    image = (folder / "000.png").read_bytes()
    trained = smallfry.load(run)
    expected = trained.predict(str(folder / "000.png"))[0]
    panel = answer([Shown("run", trained)], image, "000.png")["panels"][0]
    shown = panel["views"][panel["answer"]]
    assert shown.count("sf-first") == len(expected.chosen)
    pytest.importorskip("prometheus_client", reason="the serve extra is not installed")
    from smallfry_runtime.inputs import InputImage
    from smallfry_runtime.serving.limits import Limits
    from smallfry_runtime.serving.server import Service

    service = Service(Runtime(export), None, Limits())
    (found,) = service.predict([InputImage("000.png", image, None)])
    service.close()
    assert found.to_dict()["classes"] == list(expected.chosen)


def test_the_manifest_refuses_thresholds_of_other_classes(export):
    from dataclasses import replace

    from smallfry_runtime.manifest import _problem

    manifest = Manifest.read(export)
    for wrong in ((0.5,), (0.5, float("nan"), 0.5), ("a", 0.5, 0.5)):
        assert _problem(replace(manifest, thresholds=wrong)) == "thresholds"


def test_it_resumes_to_the_bit(folder, tmp_path):
    def config(name):
        options = {
            "embed_dim": 16,
            "num_heads": 2,
            "mlp_hidden_dim": 16,
            "depth": 1,
            "latent_steps": 1,
        }
        return TrainConfig(
            data={"name": str(folder), "labels": "columns.csv", "image_size": [8, 16]},
            model={"name": "vitrm_micro_patch4_8", "options": options},
            task="multilabel",
            epochs=2,
            batch_size=16,
            threads=1,
            run=tmp_path / name,
            progress="quiet",
        )

    train(config("whole"))
    with pytest.raises(Stopped):
        train(config("parts"), reporter=StopAt(3))
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    trained = [smallfry.load(tmp_path / name) for name in ("whole", "parts")]
    assert trained[0].manifest["thresholds"] == trained[1].manifest["thresholds"]
    assert task_of(trained[0].manifest).thresholds == tuple(trained[0].manifest["thresholds"])


@pytest.mark.parametrize("optimizer", ["kfac", "ekfac"])
def test_natural_gradient_trains_it(folder, tmp_path, optimizer):
    data = ("--data", str(folder), "--data.labels=columns.csv")
    options = (f"--optimizer.name={optimizer}", "--epochs=1", "--run", str(tmp_path / "run"))
    assert main(["train", *data, *GIVEN, *options]) == 0


def test_without_validation_images_thresholds_are_a_half(folder, tmp_path):
    data = ("--data", str(folder), "--data.labels=columns.csv", "--data.validation=0")
    given = ("--epochs=1", "--select_on=test", "--run", str(tmp_path / "run"))
    settings = read(["train", *data, *GIVEN, *given]).options.settings
    with pytest.warns(smallfry.errors.SmallfryWarning, match="thresholds were not calibrated"):
        train(settings)
    assert "thresholds" not in smallfry.load(tmp_path / "run").manifest
    answer = smallfry.load(tmp_path / "run").predict(str(folder / "000.png"))[0]
    assert set(answer.chosen) == {name for name, share in answer.top if share >= 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--balance.sampler=balanced",), "balance is for classification, not multilabel"),
        (("--objective.name=bias",), "multilabel"),
        (("--adversarial.eps=0.03",), "classification, not multilabel"),
        (("--data.several_labels=true", "--task=classification"), "of the task multilabel"),
    ],
)
def test_what_is_for_one_class_is_refused(folder, tmp_path, capsys, options, message):
    data = ("--data", str(folder), "--data.labels=columns.csv")
    assert main(["train", *data, *GIVEN, *options, "--run", str(tmp_path / "run")]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_teachers_and_analyses_are_for_one_class(run, folder, tmp_path, capsys):
    data = ("--data", str(folder), "--data.labels=columns.csv")
    place = ("--run", str(tmp_path / "run"))
    for words, message in (
        (
            ["train", *data, *GIVEN, f"--distillation.teacher={run}", *place],
            "distillation is for classification",
        ),
        (["analyze", str(run), "collapse"], "one class per image; all other commands take it"),
    ):
        assert main(words) != 0
        assert message in capsys.readouterr().err


def test_images_of_one_class_each_are_a_warning(tmp_path):
    for name in ("cat", "dog"):
        write_pairs(tmp_path / "photos" / name, count=12, seed=ord(name[0]))
    given = ("--data", str(tmp_path / "photos"), "--epochs=1", "--run", str(tmp_path / "run"))
    settings = read(["train", *GIVEN, *given]).options.settings
    with pytest.warns(SmallfryWarning) as found:
        train(settings)
    expected = "photos: every training image has one class, as the task classification takes it; "
    assert [str(each.message) for each in found if expected in str(each.message)]
