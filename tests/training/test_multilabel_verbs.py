"""Reports, attacks, sharing, benchmarks and compression of models of several classes per image."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from html_view import View
from several_labels import GIVEN, NAMES, write_columns, write_links, write_pairs
from torch.distributions import Bernoulli, kl_divergence

import smallfry
from smallfry.cli import main
from smallfry.cli._parser import read
from smallfry.compress.report import compare
from smallfry.data import load_data
from smallfry.deploy.benchmark import measure
from smallfry.deploy.benchmark_config import BenchmarkConfig
from smallfry.deploy.pretrained import from_pretrained, save_pretrained
from smallfry.errors import RunError, UsageError
from smallfry.report.batch import _classes
from smallfry.report.mistakes_page import label_mistakes
from smallfry.tasks.multilabel import MultiLabel
from smallfry.training.attack import PGD, accuracy_under_attack
from smallfry.training.evaluation import (
    predict,
    score,
    score_probabilities,
    targets_of,
    task_of,
)
from smallfry.training.exit_calibration import trace
from smallfry.training.show_batch import show_batch
from smallfry.training.train import train
from smallfry_runtime.manifest import Manifest
from smallfry_runtime.runtime import Runtime

QUICK = BenchmarkConfig(forms=("eager",), batch_sizes=(1,), seconds=0.02, peers=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pairs = write_pairs(tmp_path_factory.mktemp("pairs") / "images", count=80)
    place = pairs[0][0].parent
    write_columns(place / "columns.csv", pairs)
    return place


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "several"
    data = ("--data", str(folder), "--data.labels=columns.csv", "--data.validation=0.3")
    recursive = (
        *("--objective.name=deep_supervision", "--objective.supervision_steps=2"),
        "--model.recursion_steps=2",
    )
    options = ("--epochs=3", "--optimizer.lr=0.003", "--run", str(place))
    assert main(["train", *data, *GIVEN, *recursive, *options]) == 0
    return place


@pytest.fixture(scope="module")
def data(folder):
    given = {"image_size": (8, 16), "several_labels": True, "validation": 0.3}
    return load_data(str(folder), labels="columns.csv", **given)


@pytest.fixture(scope="module")
def trained(run):
    return smallfry.load(run)


@pytest.fixture(scope="module")
def tested(trained, data):
    return predict(trained.model, data.test, trained.normalize)


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    return smallfry.export(run, tmp_path_factory.mktemp("exports") / "several", form="whole")


@pytest.fixture(scope="module")
def shared(run, tmp_path_factory):
    return save_pretrained(run, tmp_path_factory.mktemp("shared") / "several")


# the first batch


def test_the_first_batch_is_drawn_with_all_classes(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("smallfry.training.show_batch.draw_batch", lambda *a: drawn.append(a))
    words = ["train", "--data", str(folder), "--data.labels=columns.csv", *GIVEN]
    config = read([*words, "--augment.mixup=0", "--augment.cutmix=0"]).options.settings
    show_batch(config, tmp_path / "batch.png")
    images, shares, classes, *_ = drawn[0]
    assert len(images) == len(shares) > 16
    assert shares.shape[1] == len(classes) == 3
    assert set(shares.unique().tolist()) == {0.0, 1.0}
    assert shares.sum(1).max() == 2


def test_show_batch_writes_a_picture(folder, tmp_path):
    file = tmp_path / "batch.png"
    words = ["train", "--data", str(folder), "--data.labels=columns.csv", *GIVEN]
    assert main([*words, "--show_batch", str(file)]) == 0
    assert file.stat().st_size > 3000


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        ([0.0, 1.0, 0.0], "dog"),
        ([1.0, 1.0, 0.0], "cat\ndog"),
        ([1.0, 1.0, 1.0], "cat\ndog +1"),
        ([0.0, 0.0, 0.0], "no class"),
        ([0.7, 0.3, 0.0], "70% cat\n30% dog"),
        ([1.0, 0.4, 0.0], "100% cat\n40% dog"),
        ([0.0, 0.4, 0.0], "40% dog"),
    ],
)
def test_classes_of_an_image_have_shares_where_it_is_mixed(share, shown):
    assert _classes(torch.tensor(share), ["cat", "dog", "owl"]) == shown


# reports


def test_missing_and_wrong_classes_are_grouped_by_class():
    probabilities = torch.tensor([[0.9, 0.2], [0.6, 0.4], [0.1, 0.9]])
    labels = torch.tensor([[0, 1], [0, 1], [0, 1]])
    first, second = label_mistakes(probabilities, probabilities >= 0.5, labels, ["cat", "dog"])
    assert (first.title, first.label) == ("cat, wrong", "cat")
    assert [each.position for each in first.mistakes] == [0, 1]  # the surest first
    assert second.title == "dog, missing"
    assert [each.position for each in second.mistakes] == [0, 1]
    assert second.mistakes[0].confidence == pytest.approx(0.2)
    right = torch.tensor([[1.0, 0.0]])
    assert label_mistakes(right, right >= 0.5, right.long(), ["cat", "dog"]) == []


def test_a_run_and_evaluate_report_each_missing_and_wrong_class(
    run, trained, data, tested, tmp_path, capsys
):
    task = task_of(trained.manifest)
    wrong = int((task.chosen(tested.logits) != data.test.labels.bool()).sum())
    assert main(["evaluate", str(run), "--report", str(tmp_path / "report"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(tmp_path / "report" / "report.html")
    files = {entry.name for entry in (tmp_path / "report").iterdir()}
    pictures = {"classes.png", "precision_recall.png", "mistakes.png"}
    assert files == {"classes.csv", "report.html", *pictures}
    for place in (run, tmp_path / "report"):
        view = View((place / "report.html").read_text())
        shown = [v for v in view.of("img") if v["alt"].endswith((", missing", ", wrong"))]
        assert len(shown) == wrong > 0
        rows = list(csv.DictReader((place / "classes.csv").open()))
        assert [row["class"].lstrip("'") for row in rows] == list(trained.classes)
        assert [float(row["threshold"]) for row in rows] == trained.manifest["thresholds"]
    assert sum("average precision" in each["alt"] for each in view.of("img")) == 1
    assert main(["evaluate", str(run), "--report", str(tmp_path / "report")]) == 0  # replaced


# attacks


def test_an_attack_raises_the_loss_of_the_task(trained, data, tested):
    task = task_of(trained.manifest)
    clean = score(tested, task)["accuracy"]
    rates = [
        accuracy_under_attack(
            trained.model, data.test, trained.normalize, PGD(eps, steps=5), task=task
        )
        for eps in (0.0, 0.3)
    ]
    assert rates[0] == pytest.approx(clean)
    assert rates[1] < clean
    inputs, labels = trained.normalize(data.test.images), data.test.labels

    def loss(x):
        outputs = trained.model(x)
        return task.loss(outputs, targets_of(task, outputs, labels))

    attacked = PGD(8 / 255, steps=5)(inputs, loss, trained.normalize)
    with torch.no_grad():
        assert loss(attacked) > loss(inputs)


def test_evaluate_attacks(run, capsys):
    attack = ("--attack=pgd", "--eps=64/255", "--attack_steps=4")
    assert main(["evaluate", str(run), *attack, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["accuracy_under_attack"] <= found["accuracy"]


# sharing


def test_a_shared_model_answers_with_the_same_classes(shared, trained, folder, data, capsys):
    config = json.loads((shared / "config.json").read_text())["smallfry"]
    assert (config["format"], config["task"]) == (4, "multilabel")
    loaded = from_pretrained(shared)
    files = sorted(map(str, folder.glob("00*.png")))
    assert loaded.predict(files) == trained.predict(files)
    assert loaded.manifest["thresholds"] == trained.manifest["thresholds"]
    task = task_of(trained.manifest)
    clean = score(predict(trained.model, data.test, trained.normalize), task)
    assert main(["evaluate", str(shared), "--data", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "test"  # split as in training
    assert {name: found[name] for name in clean} == pytest.approx(clean)


def test_its_card_has_figures_and_a_use_for_several_classes(shared, run):
    card = (shared / "README.md").read_text()
    test = json.loads((run / "summary.json").read_text())["measured"]["test"]
    assert "Finds which of 3 classes" in card
    assert f"| mean average precision | {test['mean_average_precision']:.2%} |" in card
    assert f"| images with exactly their classes | {test['accuracy']:.2%}" in card
    assert "sigmoid" in card
    assert "softmax" not in card
    assert "mean_average_precision" in card.split("---")[1]
    code = card.split("```python\n")[1].split("```")[0]
    lines = code[code.index("thresholds = ") :].replace('model.pretrained_cfg["label_names"]', "n")
    said: list[str] = []
    scope = {"n": ["a", "b", "c"], "shares": [1.0, 0.0, 1.0], "print": lambda n, _: said.append(n)}
    exec(lines, scope)  # what the card recommends
    assert said == ["a", "c"]


@pytest.mark.slow
def test_a_shared_model_is_shared_again_and_exported(shared, tmp_path):
    again = save_pretrained(shared, tmp_path / "again")
    assert from_pretrained(again).manifest["thresholds"]
    assert "mean average precision" in (again / "README.md").read_text()
    runtime = Runtime(smallfry.export(again, tmp_path / "export", form="whole"))
    assert list(runtime.thresholds) == from_pretrained(shared).manifest["thresholds"]


def test_other_labels_are_read_in_the_same_form(shared, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "images", count=12, seed=5)
    write_columns(tmp_path / "images" / "columns.csv", pairs)
    assert main(["evaluate", str(shared), "--data", str(tmp_path / "images"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["images"]) == ("all", 12)
    write_links(tmp_path / "links", pairs)
    asked = ["evaluate", str(shared), "--data", str(tmp_path / "links"), "--json"]
    assert main(asked) == 0
    labelled = sum(bool(names) for _, names in pairs)
    assert json.loads(capsys.readouterr().out)["images"] == labelled


@pytest.mark.parametrize(
    "change",
    [
        {"thresholds": [0.5, 0.5]},
        {"thresholds": [0.5, "a", 0.5]},
        {"thresholds": [0.5, 0.5, 1.5]},
        {"thresholds": 0.5},
        {"task": "puzzle"},
        {"data": {"name": "x", "splits": "outside"}},
    ],
)
def test_tampered_descriptions_are_refused(shared, tmp_path, change):
    place = shutil.copytree(shared, tmp_path / "copy")
    config = json.loads((place / "config.json").read_text())
    if "data" in change:
        config["smallfry"]["data"]["splits"]["labels"] = "../../secret.csv"
    else:
        config["smallfry"] |= change
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="damaged or incomplete"):
        from_pretrained(place)


def test_a_label_file_elsewhere_is_not_named(run, folder, tmp_path):
    config = read(["train", "--config", str(run / "config.yaml"), "--run", str(tmp_path / "run")])
    settings = config.options.settings
    labels = (folder / "columns.csv").resolve()
    data = replace(settings.data, labels=labels, image_column="image")
    train(replace(settings, data=data, epochs=1))
    place = save_pretrained(tmp_path / "run", tmp_path / "shared")
    text = (place / "config.json").read_text()
    assert str(folder) not in text
    splits = json.loads(text)["smallfry"]["data"]["splits"]
    assert (splits["labels"], splits["image_column"]) == (None, None)
    assert from_pretrained(place).manifest["data"]["splits"] == splits


# benchmarks and compression


@pytest.mark.slow
def test_a_benchmark_scores_exact_classes(run, export, trained, tested):
    task = task_of(trained.manifest)
    found = measure([str(run), str(export)], QUICK)
    eager, onnx = found.figures
    assert (eager.form, onnx.form) == ("PyTorch eager", "ONNX float32")
    expected = score(tested, task)
    assert eager.accuracy == pytest.approx(expected["accuracy"])
    assert eager.macro_f1 == pytest.approx(expected["macro_f1"])
    images = len(tested.labels)  # rounding may move an image over a threshold
    assert onnx.accuracy == pytest.approx(expected["accuracy"], abs=1.5 / images)
    assert onnx.agreement == 1.0
    assert "an image is right with exactly its classes" in found.measured_on


@pytest.mark.slow
def test_models_of_one_and_of_several_classes_are_not_compared(run, export, tmp_path):
    place = shutil.copytree(export, tmp_path / "export")
    manifest = replace(Manifest.read(place), thresholds=())
    (place / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(
        UsageError,
        match="are for multilabel and classification: compare",
    ):
        measure([str(run), str(place)], QUICK)


def test_probabilities_score_as_logits(tested, trained, data):
    task = task_of(trained.manifest)
    probabilities = tested.logits.double().sigmoid().numpy()
    found = score_probabilities(probabilities, data.test.labels, task)
    assert found == pytest.approx(score(tested._replace(halting=None), task), rel=1e-5)


def test_compression_is_compared_by_chosen_classes_and_bernoulli_divergence(trained, data):
    same = compare(trained, trained, data.validation)
    assert (same.agreement, same.divergence) == (1.0, 0.0)
    torch.manual_seed(0)
    other = smallfry.load(Path(trained.origin))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found = compare(trained, other, data.validation)
    logits = [
        predict(each.model, data.validation, each.normalize).logits.double()
        for each in (trained, other)
    ]
    nats = kl_divergence(*(Bernoulli(logits=each) for each in logits)).sum(1).mean()
    assert found.divergence == pytest.approx(nats.item(), rel=1e-9)
    cuts = torch.tensor(trained.manifest["thresholds"])
    chosen = [each.sigmoid() >= cuts for each in logits]
    assert found.agreement == pytest.approx((chosen[0] == chosen[1]).all(1).double().mean().item())
    assert (
        found.accuracy[0]
        == score(
            predict(trained.model, data.validation, trained.normalize), task_of(trained.manifest)
        )["accuracy"]
    )


def test_compress_keeps_thresholds_and_prints_accuracy(run, tmp_path, capsys):
    words = ["compress", str(run), "--methods", "[{round_weights: {bits: 8}}]"]
    assert main([*words, "--to", str(tmp_path / "small"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"]["before"] is not None
    assert found["agreement"] > 0.5
    small = smallfry.load(tmp_path / "small")
    assert small.manifest["thresholds"] == smallfry.load(run).manifest["thresholds"]


@pytest.mark.slow
def test_eight_bits_are_reported_with_accuracy(run, tmp_path):
    export = smallfry.export(run, tmp_path / "int8", form="whole", precision="int8")
    report = json.loads((export / "quantization.json").read_text())
    assert 0 <= report["eight_bits"]["accuracy"] <= 1
    assert report["agreement"] > 0.5


@pytest.mark.filterwarnings("ignore:early-exit thresholds")
def test_early_exits_count_exactly_right_images(trained, data, run, capsys):
    task = task_of(trained.manifest)
    found = trace(trained.model, data.validation, trained.normalize, task=task)
    labels = data.validation.labels
    with torch.no_grad():
        steps = trained.model.recurse(trained.normalize(data.validation.images))
    for right, step in zip(found.right, steps, strict=True):
        chosen = task.chosen(step.logits)
        assert right.tolist() == (chosen == labels.bool()).all(1).tolist()
    assert main(["evaluate", str(run), "--exit_steps=1.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recursion_steps"] <= 2


def test_thresholds_of_a_half_are_those_without_calibration():
    outputs = torch.tensor([[0.1, -0.1]])
    assert MultiLabel().chosen(outputs).tolist() == [[True, False]]
    assert NAMES == ("zero", "=one", "two")
