"""Packed graphs, their rule by brute force, scores without classes, and the picture of a graph."""

import numpy as np
import pytest
import torch
from PIL import Image

from smallfry.data import load_data
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
from smallfry.kits.graphs.packing import EDGE_CHANNELS, pack, unpack
from smallfry.kits.graphs.pictures import EDGES, FILLS, draw_graph
from smallfry.kits.graphs.task import Graphs
from smallfry_runtime.decoders.graphs import decode

load_kit("graphs")


def test_a_graph_may_have_no_edges_or_a_full_set_of_slots():
    features = np.arange(6.0).reshape(3, 2)
    for none in ([], np.zeros((0, 3), np.int64)):
        empty = unpack(torch.from_numpy(pack(features, none, 2, 1))[None], 1)
        assert empty.without_gaps().edge_index.shape == (2, 0)
        assert empty.features[0].tolist() == features.tolist()
    full = np.array([[i % 3, i // 2, i % 2] for i in range(6)])
    found = unpack(torch.from_numpy(pack(features, full, 2, 2))[None], 2).without_gaps()
    rows = torch.cat([found.edge_index, found.edge_type[None]]).T
    assert rows.tolist() == full.tolist()


@pytest.mark.parametrize(
    ("features", "edges", "words"),
    [
        (np.ones((3, 1)), [[0.5, 1, 0]], "are whole numbers"),
        (np.ones((3, 1)), [[np.nan, 1, 0]], "are whole numbers"),
        (np.ones((3, 1)), [[0, 1]], r"not \(3, 1\) and \(1, 2\)"),
        (np.ones(3), [[0, 1, 0]], r"not \(3,\) and \(1, 3\)"),
        (np.ones((3, 1)), [0, 1, 0], r"not \(3, 1\) and \(3,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_edges_that_are_none_are_refused(features, edges, words):
    with pytest.raises(DataError, match=words):
        pack(features, edges, 2, 1)


def test_whole_numbers_in_floats_are_edges():
    found = pack(np.ones((3, 1)), [[0.0, 2.0, 1.0]], 1, 2)
    assert found[:4, 0, 0].tolist() == [0, 2, 1, 1]


def by_loops(edges, types, marked):
    """Classify persons by the words of the rule."""
    found = []
    for node, kind in enumerate(types):
        given = [(s, r) for s, t, r in edges if t == node]
        near = any(r == 2 and types[s] == 1 and marked[s] for s, r in given)
        far = any(
            r == 3 and any(t == s and q == 1 and types[i] == 2 and marked[i] for i, t, q in edges)
            for s, r in given
        )
        word = "near" if near else "far" if far else "apart"
        found.append(CLASSES.index(word) if kind == 0 else -1)
    return found


@pytest.mark.parametrize("number", range(6))
def test_classes_of_generated_graphs_follow_the_words_of_the_rule(number):
    settings = Heterographs(nodes=20 + number, degree=4, relations=5, marked=0.4, seed=number)
    packed, labels = heterograph(settings, "validation", number)
    graph = unpack(torch.from_numpy(packed)[None], 5).without_gaps()
    edges = list(zip(*graph.edge_index.tolist(), graph.edge_type.tolist(), strict=True))
    types, marked = packed[4:7, :, 0].argmax(0), packed[7, :, 0] > 0
    assert by_loops(edges, types.tolist(), marked.tolist()) == labels.tolist()
    assert len({*edges}) == len(edges) <= settings.nodes * settings.degree
    ends = signatures(settings)
    assert all((types[s], types[t]) == tuple(ends[r]) for s, t, r in edges)


def test_marks_of_all_or_none_leave_few_classes():
    none = [heterograph(Heterographs(marked=0.0), "test", i)[1] for i in range(5)]
    assert {*np.concatenate(none).tolist()} == {-1, CLASSES.index("apart")}
    every = np.concatenate([heterograph(Heterographs(marked=1.0), "test", i)[1] for i in range(5)])
    assert CLASSES.index("near") in every
    assert ((every == -1).reshape(5, 60).sum(1) == 40).all()  # two of three are no persons
    types, no = np.array([0, 1]), np.zeros((0, 3), np.int64)
    assert classes_by_rule(no, types, np.ones(2, bool)).tolist() == [0, -1]


def test_relations_are_drawn_by_their_rank():
    ranges, ends = np.array([[0, 4000]]), np.zeros((4, 2), np.int64)
    drawn = draw_edges(np.random.default_rng(0), ranges, ends, 20_000, 0.0)
    shares = np.bincount(drawn[:, 2]) / len(drawn)
    wanted = 1 / np.arange(1, 5)
    assert shares == pytest.approx(wanted / wanted.sum(), abs=0.02)
    assert drawn[:, :2].min() >= 0
    assert drawn[:, :2].max() < 4000
    assert (np.diff(drawn[:, 0]) < 0).any()  # shuffled


@pytest.mark.parametrize(
    "name",
    [
        "graphs-rules",
        "operators-darcy",
        "operators-helmholtz",
        "symbolic-panels",
        "equivariant-digits",
        "splats-torus",
    ],
)
def test_seeds_below_zero_are_refused_of_all_generators(name):
    with pytest.raises(UsageError, match=r"data\.options\.seed is a whole number from 0, got -1"):
        load_data(name, options={"seed": -1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 8}, "nodes is 9 to 100,000, got 8"),
        ({"degree": 0}, "degree is 1 to 1,000, got 0"),
        ({"skew": -0.5}, "skew is 0 to 4, got -0.5"),
        ({"skew": float("nan")}, "skew is 0 to 4, got nan"),
        ({"relations": True}, "relations must be of type int, got True"),
        ({"nodes": 30.0}, "nodes must be of type int, got 30.0"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        load_data("graphs-rules", options=options)


def test_damaged_samples_in_the_cache_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLFRY_CACHE", str(tmp_path))
    options = {"samples": 10, "nodes": 9, "degree": 2}
    first = load_data("graphs-rules", options=options)
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 6 if len(first.validation) else 4
    for number, file in enumerate(files):
        content = file.read_bytes()
        file.unlink()  # which a mapped file outlives
        file.write_bytes((content[:-7], b"", b"\x93NUMPY", b"PK\x03\x04")[number % 4])
    again = load_data("graphs-rules", options=options)
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.test.images, first.test.images)


# Task


def test_the_loss_of_a_graph_without_classes_is_zero_and_has_no_gradient():
    outputs = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.tensor([[-1, -1, -1, -1], [0, -1, 2, -1]])
    losses = Graphs().losses(outputs, labels)
    assert losses[0] == 0
    losses.sum().backward()
    assert (outputs.grad[0] == 0).all()
    assert (outputs.grad[1][:, [1, 3]] == 0).all()
    assert outputs.grad[1][:, [0, 2]].abs().min() > 0
    assert not Graphs().right(outputs, labels)[0]


def test_macro_f1_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, 8, generator=random)
    labels = torch.randint(-1, 3, (5, 8), generator=random)
    kept = labels >= 0
    scores = Graphs().metrics(outputs, labels)
    found = outputs.argmax(1)[kept]
    assert scores["macro_f1"] == pytest.approx(f1_score(labels[kept], found, average="macro"))
    assert scores["node_accuracy"] == pytest.approx((found == labels[kept]).double().mean().item())


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_the_decoder_equals_pytorchs_softmax(kind):
    logits = (20 * np.random.default_rng(0).normal(size=(3, 4, 5))).astype(kind)
    names = ["a", "b", "c", "d"]
    shares = torch.from_numpy(logits).double().softmax(1)
    for sample, wanted in zip(decode(logits, names), shares, strict=True):
        best, place = wanted.max(0)
        assert [each["class"] for each in sample["nodes"]] == [names[i] for i in place]
        found = [each["probability"] for each in sample["nodes"]]
        assert found == pytest.approx(best.tolist(), abs=2e-3 if kind is np.float16 else 6e-5)
    assert decode(logits[:0], names) == []


# Picture


def near(pixels, colour, reach=12):
    """Count the pixels of a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - wanted).max(-1) <= reach).sum())


def test_the_picture_of_a_graph_shows_its_edges_and_its_mistakes(tmp_path):
    # a person, a marked group, an item
    features = np.concatenate([np.eye(3), [[0], [1], [0]]], axis=1)
    names, labels = list(CLASSES), torch.tensor([2, -1, -1])
    plain = torch.from_numpy(pack(features, [], 2, 4))
    edge = torch.from_numpy(pack(features, [[1, 0, 2]], 2, 4))
    shown = {}
    for word, given, found in (
        ("right", edge, [2, 0, 0]),
        ("wrong", edge, [1, 0, 0]),
        ("bare", plain, [2, 0, 0]),
    ):
        draw_graph(given, labels, torch.tensor(found), names, tmp_path / f"{word}.png")
        shown[word] = np.asarray(Image.open(tmp_path / f"{word}.png").convert("RGB"))
    reds = {word: near(pixels, "#ff0000") for word, pixels in shown.items()}
    assert reds["wrong"] > reds["right"] + 50  # a second ring, beside the legend's
    assert reds["right"] == reds["bare"]
    orange = {word: near(pixels, FILLS[2], 30) for word, pixels in shown.items()}
    assert FILLS[2] == EDGES[2]
    assert orange["right"] > orange["bare"] + 50  # the edge
    assert near(shown["wrong"], FILLS[1]) > near(shown["right"], FILLS[1]) + 50  # the node's fill
    assert EDGE_CHANNELS == 4
