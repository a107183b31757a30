"""Generated heterographs, the task of their nodes, networks and runs."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import smallfry
from smallfry.cli import main
from smallfry.data import Split, load_data
from smallfry.errors import DataError, UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.graphs.heterographs import (
    CLASSES,
    Heterographs,
    classes_by_rule,
    draw_edges,
    heterograph,
    signatures,
)
from smallfry.kits.graphs.packing import pack, unpack
from smallfry.kits.graphs.task import Graphs
from smallfry.optim import KFAC
from smallfry.tasks import create_task
from smallfry_runtime.decoders.graphs import decode
from smallfry_runtime.runtime import Runtime

load_kit("graphs")
SMALL = Heterographs(nodes=30, degree=6)
MODELS = ("rgcn_tiny", "rgat_tiny", "hgt_tiny", "gine_tiny")


def drawn(count, settings=SMALL, split="train"):
    pairs = [heterograph(settings, split, number) for number in range(count)]
    return (torch.from_numpy(np.stack(each)) for each in zip(*pairs, strict=True))


# Data


def test_graphs_are_packed_and_unpacked():
    features = np.arange(6).reshape(3, 2)
    edges = [[0, 1, 1], [2, 1, 0]]
    images = torch.from_numpy(np.stack([pack(features, edges, 2, 2)] * 2))
    graphs = unpack(images, 2)
    assert graphs.features.tolist() == [features.tolist()] * 2
    assert graphs.present.sum() == 4
    full = graphs.without_gaps()
    assert full.edge_index.tolist() == [[0, 2, 3, 5], [1, 1, 4, 4]]
    assert full.edge_type.tolist() == [1, 0, 1, 0]
    assert unpack(images - 9, 2).edge_index.min() == 0  # the nearest in range


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ([[0, 1]], r"edges \(edges, 3\)"),
        ([[0, 1, 0]] * 7, "7 edges don't fit 3 nodes of 2 slots"),
        ([[0, 1, 0], [3, 1, 0]], "edge 1 has source 3; it is 0 to 2"),
        ([[0, -1, 0]], "edge 0 has destination -1"),
        ([[0, 1, 2]], "edge 0 has relation 2; it is 0 to 1"),
    ],
)
def test_impossible_graphs_are_refused(edges, words):
    with pytest.raises(DataError, match=words):
        pack(np.ones((3, 1)), edges, 2, 2)


def test_classes_follow_the_rule():
    # persons 0 to 3, groups 4 and 5, items 6 and 7; 5 and 6 are marked
    types, marked = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.zeros(8, bool)
    marked[[5, 6]] = True
    edges = np.array([[5, 0, 2], [4, 1, 3], [6, 4, 1], [5, 2, 0], [4, 0, 3], [5, 3, 3]])
    found = [CLASSES[c] for c in classes_by_rule(edges, types, marked)[:4]]
    assert found == ["near", "far", "apart", "apart"]
    assert (classes_by_rule(edges, types, marked)[4:] == -1).all()
    assert CLASSES[classes_by_rule(edges[:2], types, marked)[1]] == "apart"


def test_samples_depend_on_settings_split_and_number_alone():
    packed, labels = heterograph(SMALL, "train", 3)
    assert np.array_equal(packed, heterograph(SMALL, "train", 3)[0])
    assert packed.shape == (8, 30, 6)
    for other in (
        heterograph(SMALL, "test", 3),
        heterograph(SMALL, "train", 4),
        heterograph(Heterographs(nodes=30, degree=6, seed=1), "train", 3),
    ):
        assert not np.array_equal(packed, other[0])
    graph = unpack(torch.from_numpy(packed)[None], 12).without_gaps()
    types = graph.features[0, :, :3].argmax(1).numpy()
    ends = signatures(SMALL)[graph.edge_type.numpy()]
    assert np.array_equal(types[graph.edge_index.numpy()].T, ends)
    edges = torch.cat([graph.edge_index, graph.edge_type[None]]).numpy().T
    marked = graph.features[0, :, 3].numpy() > 0
    assert np.array_equal(classes_by_rule(edges, types, marked), labels)


def test_skewed_sources_repeat():
    ranges, ends = np.array([[0, 100]]), np.zeros((4, 2), np.int64)
    most = [
        np.bincount(draw_edges(np.random.default_rng(0), ranges, ends, 500, skew)[:, 0]).max()
        for skew in (0.0, 1.0)
    ]
    assert most[1] > 3 * most[0]


def test_data_sets_have_their_splits():
    options = {"samples": 30, "nodes": 12, "degree": 3}
    data = load_data("graphs-rules", options=options, test=0.2, validation=0.25)
    assert [len(data.train), len(data.validation), data.test_count] == [18, 6, 6]
    assert data.input_shape == (8, 12, 3)
    assert data.train.labels.shape == (18, 12)
    assert data.classes == CLASSES
    assert data.generated["relations"] == 12
    assert len(load_data("graphs-rules", options=options, limit=5).train) == 5
    assert len(load_data("graphs-rules", options=options, validation=0.0).validation) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"samples": 3}}, "samples is 10 to"),
        ({"options": {"relations": 3}}, "relations is 4 to"),
        ({"options": {"marked": 1.5}}, "marked is 0 to 1"),
        ({"options": {"node": 40}}, "no 'node'; did you mean 'nodes'"),
        ({"root": "."}, "is generated"),
        ({"image_size": 16}, "no data.image_size"),
    ],
)
def test_impossible_data_is_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        load_data("graphs-rules", **settings)


# Task


def test_scores_are_of_nodes_that_have_a_class():
    task, labels = Graphs(), torch.tensor([[0, 1, -1], [2, -1, -1]])
    outputs = 9 * F.one_hot(torch.tensor([[0, 1, 2], [0, 0, 0]]), 3).transpose(1, 2).float()
    scores = task.metrics(outputs, labels)
    assert scores["accuracy"] == 0.5
    assert scores["node_accuracy"] == pytest.approx(2 / 3)
    assert task.right(outputs, labels).tolist() == [True, False]
    each = F.cross_entropy(
        outputs.transpose(1, 2)[labels >= 0], labels[labels >= 0], reduction="none"
    )
    wanted = torch.stack([each[:2].mean(), each[2]])
    torch.testing.assert_close(task.losses(outputs, labels), wanted)
    assert task.loss(outputs, labels).item() == pytest.approx(scores["loss"])
    assert task.rank(scores) < task.rank({**scores, "node_accuracy": 1.0})
    assert task.outputs(3) == 3
    with pytest.raises(UsageError, match="no label smoothing"):
        create_task("graphs", 0.1)
    with pytest.raises(UsageError, match="class for each node"):
        task.targets(torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1))
    with pytest.raises(UsageError, match="logits for each node"):
        task.losses(torch.zeros(2, 3), labels)


def test_decoding():
    logits = np.log(np.array([[[0.25, 0.5], [0.75, 0.5]]]))
    (graph,) = decode(logits, ["no", "yes"])
    assert graph["nodes"][0] == {"class": "yes", "probability": 0.75}
    assert [
        node["class"] for node in Graphs().decode(torch.tensor(logits), ["no", "yes"])[0]["nodes"]
    ] == [
        "yes",
        "no",
    ]
    with pytest.raises(UsageError, match="no setting 'beam'"):
        decode(logits, ["no", "yes"], {"beam": 3})


def test_pictures(tmp_path):
    images, labels = drawn(3)
    outputs = F.one_hot(labels.clamp(min=0), 3).transpose(1, 2).float()
    Graphs().draw(outputs, Split(images, torch.arange(3), labels), CLASSES, tmp_path)
    for name in ("graph.png", "confusion_matrix.png"):
        assert min(Image.open(tmp_path / name).size) > 200


# Networks


@pytest.mark.parametrize("name", MODELS)
def test_executions_give_the_same_answers(name):
    images, _ = drawn(3)
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(30, 6))
    answers = []
    for execution in ("edges", "compact", "nodes"):
        other = timm.create_model(name, img_size=(30, 6), execution=execution)
        other.load_state_dict(model.state_dict())
        answers.append(other(images))
    for answer in answers:
        torch.testing.assert_close(answer, model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images[1:2]), model(images)[1:2], rtol=1e-4, atol=1e-5)
    model.reset_classifier(5)
    assert model(images).shape == (3, 5, 30)
    assert model.get_classifier() is model.head


@pytest.mark.parametrize("name", MODELS)
def test_natural_gradient_covers_linear_layers(name):
    images, labels = drawn(8)
    model = timm.create_model(name, img_size=(30, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the relations' weights, which it leaves to AdamW
        optimizer = KFAC(model, lr=0.05, likelihood="categorical_mean")
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels.clamp(min=0)).backward()
        optimizer.step()
    assert not {n for n in optimizer.uncovered if "lin." in n or n.startswith(("lift", "head"))}
    assert optimizer.uncovered
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conv": "gcn"}, "conv is one of rgcn, rgat, hgt, gine, not 'gcn'"),
        ({"in_chans": 4}, "4 channels of edges and features, not 4"),
        ({"heads": 3}, "among 3 heads"),
        ({"conv": "hgt", "node_types": 9}, "4 features can't name 9 types"),
    ],
)
def test_impossible_networks_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        timm.create_model("rgcn_tiny", **options)


def test_data_that_a_network_can_not_read_is_refused():
    images, _ = drawn(2)
    with pytest.raises(UsageError, match="relations: 12}"):
        timm.create_model("rgcn_tiny", relations=5).initialize(images.where(images != 99, 0))
    with pytest.raises(UsageError, match=r"were normalised, and lost: give data\.mean"):
        timm.create_model("rgcn_tiny").initialize(images / 3)


# Runs

OPTIONS = {"samples": 300, "nodes": 30, "degree": 6, "marked": 0.2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs") / "run"
    code = main(
        [
            *("train", "--task", "graphs", "--data.options", json.dumps(OPTIONS)),
            *("--epochs", "10", "--run", str(folder), "--threads", "1"),
        ]
    )
    assert code == 0
    return folder


@pytest.mark.slow
def test_a_run_learns_the_rule(run):
    scores = smallfry.load(run).evaluate()
    labels = load_data("graphs-rules", options=OPTIONS).test.labels
    usual = torch.bincount(labels[labels >= 0]).max() / (labels >= 0).sum()
    assert usual < 0.6
    assert scores["node_accuracy"] > 0.85


@pytest.mark.slow
def test_an_export_answers_with_classes(run, tmp_path, capsys):
    runtime = Runtime(smallfry.export(run, tmp_path / "export"))
    trained = smallfry.load(run)
    images = load_data("graphs-rules", options=OPTIONS).test.images
    with torch.no_grad():
        wanted = trained.model(trained.normalize(images)).numpy()
    assert np.abs(runtime.compute(images.numpy()).logits - wanted).max() < 1e-3
    np.save(tmp_path / "a.npy", images.numpy()[0])
    assert main(["predict", str(tmp_path / "export"), str(tmp_path / "a.npy"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    chosen = wanted[0].argmax(0)
    assert [node["class"] for node in answer["nodes"]] == [CLASSES[c] for c in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS[1:])
def test_other_networks_are_trained_and_exported(name, tmp_path):
    smallfry.train(
        task="graphs",
        model={"name": name},
        data={"options": OPTIONS},
        epochs=2,
        threads=1,
        run=tmp_path / "run",
    )
    smallfry.export(tmp_path / "run", tmp_path / "export")
