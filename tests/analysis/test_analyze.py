"""The command writes one page without network, and numbers that agree with the model."""

import csv
import json
import sys
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from html_view import View
from torch import nn

import smallfry
from smallfry import compress
from smallfry.analysis import (
    Answer,
    WatchCollapse,
    ask_all,
    collect,
    families,
    layer_signals,
    leakage,
    load_subject,
    register_question,
    step_signals,
    write_answers,
)
from smallfry.analysis.limits import limit_of
from smallfry.analysis.question import find_questions, question_names
from smallfry.cli import main
from smallfry.data import load_data
from smallfry.errors import RunError, UsageError
from smallfry.models.critical import find_activation
from smallfry.training.evaluation import predict
from smallfry.training.run import load_run

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 1}
QUIET = {"references": False, "progress": "quiet"}
QUESTIONS = ["collapse", "criticality", "geometry", "leakage", "limits"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A recursive run, its int8 version, and a plain run with critical initial weights."""
    folder = tmp_path_factory.mktemp("runs")
    smallfry.train(
        model={"name": "vitrm_micro_patch4_8", "options": TINY, "recursion_steps": 2},
        data={"name": "digits", "limit": 300},
        callbacks=[WatchCollapse()],
        **{"epochs": 2, "run": folder / "recursive", **QUIET},
    )
    trained = load_run(folder / "recursive")
    methods = [compress.Quantize(weights=8, activations=8)]
    compress.apply(trained, methods, load_data("digits")).save(folder / "int8")
    plain = ["train", "--model", "plain_mlp", "--init", "--epochs", "1", "--data.limit", "300"]
    options = ["--references", "false", "--progress", "quiet", "--run", str(folder / "plain")]
    assert main([*plain, "--model.options={embed_dim: 32, depth: 8}", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "all"
    call = ["analyze", str(runs / "recursive"), "--against", str(runs / "int8")]
    few = {name: families.FAMILIES[name] for name in ("fire", "recursive", "residual")}
    with pytest.MonkeyPatch.context() as patch:  # all of them take half a minute
        patch.setattr(families, "FAMILIES", few)
        assert main([*call, "--images", "120", "--corruptions", "quick", "--to", str(folder)]) == 0
    leakage.known_traces.cache_clear()
    return folder


def numbers(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["numbers"]


@pytest.mark.slow
def test_the_page_has_a_section_for_each_question_and_asks_no_network(page):
    text = (page / "index.html").read_text()
    view = View(text)
    assert len(view.of("h2")) == len(question_names()) + 1
    sources = [image["src"] for image in view.of("img")]
    assert len(sources) >= 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not view.of("script")
    assert not view.of("link")
    assert view.of("svg")
    assert "default-src 'none'" in text
    assert {f"{name}.json" for name in QUESTIONS} <= {file.name for file in page.iterdir()}


@pytest.mark.slow
def test_accuracy_from_geometry_is_that_of_the_models_exactly(page, runs):
    found = numbers(page, "geometry")
    assert found["predictions_that_differ_from_the_model"] == 0
    subject = load_subject(str(runs / "recursive"), [str(runs / "int8")], images=120).subject
    for name, trained in {"recursive": subject.trained, **subject.others}.items():
        logits = predict(trained.model, subject.test, trained.normalize).logits
        accuracy = float((logits.argmax(1) == subject.test.labels).double().mean())
        assert found["models"][name]["accuracy"] == accuracy
        taken = collect(trained, subject.test.images, subject.test.labels)
        torch.testing.assert_close(
            taken.features @ taken.weight.T + taken.bias, logits.double(), atol=2e-5, rtol=1e-5
        )


@pytest.mark.slow
def test_samples_are_in_a_table_whose_margins_decide(page):
    with (page / "geometry.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 19 * len({row["image"] for row in rows})
    clean = [row for row in rows if row["severity"] == "0"]
    assert all((float(r["margin"]) > 0) == (r["label"] == r["prediction"]) for r in clean)
    found = numbers(page, "geometry")
    foggy = [
        r for r in rows if (r["corruption"], r["severity"], r["model"]) == ("fog", "5", "int8")
    ]
    accuracy = sum(r["label"] == r["prediction"] for r in foggy) / len(foggy)
    assert found["accuracy"]["fog 5"]["int8"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_signals_by_layer_and_step_are_those_of_a_plain_computation(page, runs):
    trained = load_run(runs / "recursive")
    found = numbers(page, "criticality")
    assert len(found["steps"]["accuracy"]) == 8  # four times the trained steps
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    images = torch.randn(11, 5, dtype=torch.float64)
    first, second = layer_signals(net, images, seed=4)
    hidden = net[0](images)
    assert first.kernel == pytest.approx(float(hidden.detach().square().mean()))
    draw = torch.randn(11, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradient = (draw @ net[2].weight) * (1 - hidden.tanh().square())
    assert first.gradient == pytest.approx(float(gradient.square().mean()))
    assert second.gradient == pytest.approx(float(draw.square().mean()))
    pictures = torch.randn(3, 1, 8, 8)
    taken = step_signals(trained.model, pictures, torch.zeros(3).long(), 3)
    states = [step.state for step in trained.model.recurse(pictures, 3)]
    expected = [[float(part.square().mean().sqrt()) for part in state] for state in states]
    np.testing.assert_allclose(taken.rms, np.array(expected).T, rtol=1e-5)
    np.testing.assert_allclose(taken.correlation.diagonal(), 1)
    change = [(b.z - a.z).flatten() for a, b in pairwise(states)]
    cosine = torch.cosine_similarity(*change, dim=0)
    assert taken.correlation[1, 2] == pytest.approx(float(cosine), rel=1e-4)


@pytest.mark.slow
def test_collapse_is_measured_over_training_and_by_layer(page, runs):
    rows = json.loads((runs / "recursive" / "collapse.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["nc1"] > 0 and 0 <= row["nc4"] <= 1 for row in rows)
    assert rows[0]["nc1"] != rows[1]["nc1"]
    assert (runs / "recursive" / "pictures" / "collapse.png").is_file()
    found = numbers(page, "collapse")
    assert list(found["layers"])[-1] == "features"
    assert found["layers"]["features"] == found["nc1"]


@pytest.mark.slow
def test_a_plain_network_has_a_critical_point(runs, capsys):
    folder = runs / "plain-criticality"
    assert main(["analyze", str(runs / "plain"), "criticality", "--to", str(folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"]["criticality"]
    assert answer["numbers"]["critical"]["activation"] == "tanh"
    assert answer["numbers"]["depth_over_width"] == pytest.approx(2 / 3 * (7 / 32 + 1 / 10))
    assert not (folder / "geometry.json").exists()
    kernels = [each["kernel"] for each in answer["numbers"]["initial weights"]]
    assert len(kernels) == 8
    assert main(["analyze", str(runs / "plain"), "criticality", "--to", str(folder)]) == 0
    (folder / "mine.txt").write_text("mine")
    assert main(["analyze", str(runs / "plain"), "criticality", "--to", str(folder)]) == 1
    assert "mine.txt" in capsys.readouterr().err


def test_limits_of_activations():
    kinds = {name: limit_of(find_activation(name)).kind for name in ("relu", "gelu", "tanh")}
    assert kinds == {"relu": "majority vote", "gelu": "majority vote", "tanh": "singular kernel"}


def test_a_question_is_one_module_and_an_obstacle_stops_no_other(runs, monkeypatch, tmp_path):
    module = ModuleType("smallfry.analysis.quarrel")
    source = "def ask(subject):\n    raise UsageError('this model is too small')\n"
    module.UsageError = UsageError
    exec(source, module.__dict__)
    module.ask.__module__ = module.__name__
    monkeypatch.setattr("smallfry.analysis.question._QUESTIONS", dict(find_questions("limits")))
    register_question(module.ask)
    subject, facts = load_subject(str(runs / "plain"), images=60)
    answers = ask_all(subject)
    assert list(answers) == ["limits", "quarrel"]
    assert isinstance(answers["limits"], Answer)
    text = write_answers(tmp_path / "new", "Title", answers, facts).read_text()
    assert "Not applicable: this model is too small." in text
    with pytest.raises(UsageError, match="too small"):
        ask_all(subject, "quarrel")
    other = ModuleType(module.__name__)
    exec("def ask(subject): pass", other.__dict__)
    other.ask.__module__ = module.__name__
    other.ask.__module__ = "elsewhere.quarrel"
    with pytest.raises(UsageError, match=r"smallfry\.analysis\.quarrel\.ask and elsewhere\."):
        register_question(other.ask)
    assert module.__name__ not in sys.modules


def test_wrong_usage_is_explained(runs, capsys):
    run = str(runs / "plain")
    assert main(["analyze", run, "geometri"]) == 2
    assert "unknown question 'geometri'; did you mean 'geometry'" in capsys.readouterr().err
    assert main(["analyze", run, "--images", "1"]) == 2
    assert main(["analyze", run, "--against", run]) == 2
    assert "different names" in capsys.readouterr().err
    with pytest.raises(RunError):
        load_subject(str(runs / "nothing"))


def test_logits_that_no_linear_layer_gives_are_refused(runs):
    trained = load_run(runs / "plain")
    trained.model.head.register_forward_hook(lambda *arguments: arguments[2])
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images[1:] = 200
    labels = torch.arange(4)
    assert len(collect(trained, images, labels).features) == 4

    class Squared(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def get_classifier(self):
            return self.model.head

        def forward(self, images):
            return self.model(images).square()

    with pytest.raises(UsageError, match="no multiple"):
        collect(trained._replace(model=Squared(trained.model)), images, labels)
    with pytest.raises(UsageError, match="no linear layer as its classifier"):
        collect(trained._replace(model=nn.Flatten()), images, labels)


@pytest.mark.slow
def test_the_family_and_the_repetitions_of_a_recursive_model_leak(page):
    found = numbers(page, "leakage")
    assert found["posterior"]["operators"]["recursive"] > 0.5
    assert found["repetitions"] >= 2
    assert set(found["accuracy"]) == {"operators", "memory", "totals"}
    assert sum(found["posterior"]["totals"].values()) == pytest.approx(1)
