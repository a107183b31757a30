"""Matrices at their smallest, readers by dense sums, variances of equal numbers, and pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from smallfry.data import Split, load_data
from smallfry.errors import UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.symbolic.interpreter import ProgramGraph, run
from smallfry.kits.symbolic.models import (
    GSSNN,
    PATH,
    Attention,
    GINEConv,
    ProgramReader,
    position_codes,
    slices_of,
)
from smallfry.kits.symbolic.panels import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    RULES,
    PanelSettings,
    draw_panel,
    rows_by,
)
from smallfry.kits.symbolic.pictures import draw_answers, draw_graphs
from smallfry.kits.symbolic.programs import parse
from smallfry.kits.symbolic.search import GraphProgramSpace
from smallfry.kits.symbolic.statistics import analyse_variance, compare_variances

load_kit("symbolic")
EDGE = "(push (add (connect identity)))"
LOOSE = ProgramGraph((0, 1))


# Matrices


@pytest.mark.parametrize("count", [5, 9])
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_a_rule_reach_every_value_and_no_other(rule, count):
    random, seen = np.random.default_rng(0), set()
    for _ in range(300):
        rows = rows_by(rule, count, random)
        seen |= {value for row in rows for value in row}
        if rule == "progression":
            steps = {b - a for a, b, _ in rows} | {c - b for _, b, c in rows}
            assert len(steps) == 1
        if rule == "permutation":
            assert len({*rows}) == 3
    assert seen == {*range(count)}


@pytest.mark.parametrize("size", [32, 50, 64])
def test_panels_have_their_greys_at_any_size(size):
    for number in range(8):
        panel = draw_panel(PanelSettings(size=size), "validation", number)
        assert panel.pixels.shape == (1, size, size)
        assert panel.background in BACKGROUNDS
        corners = panel.pixels[0][[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == panel.background).all()
        for row in range(3):
            for column in range(3):
                y, x = (int((place + 0.5) * size / 3) for place in (row, column))
                assert panel.pixels[0, y, x] == COLOURS[panel.colours[row][column]]
        assert CLASSES[panel.label] == ("constant" if panel.rules[1] == "constant" else "changing")
    assert not {*COLOURS} & {*BACKGROUNDS}


def test_splits_share_no_matrix_and_labels_alternate():
    options = {"samples": 20, "size": 32, "seed": 4}
    data = load_data("symbolic-panels", options=options, test=0.3, validation=0.3)
    parts = (data.train, data.validation, data.test)
    every = [tuple(image.flatten().tolist()) for part in parts for image in part.images]
    assert len({*every}) == len(every) == 20
    for part in parts:
        assert part.labels.tolist() == [i % 2 for i in range(len(part))]


# Networks


@pytest.mark.parametrize("elements", [1, 2, 3, 5, 8, 13])
def test_slices_share_all_numbers_between_the_elements(elements):
    found = slices_of(13, elements)
    own = [{*row.tolist()} for row in found]
    assert found.shape == (elements, 13)
    assert sorted(n for each in own for n in each) == [*range(13)]  # no number twice
    lengths = [len(each) for each in own]
    assert lengths[1:] == [13 // elements] * (elements - 1)
    for row, length in zip(found.tolist(), lengths, strict=True):
        assert row[length:] == row[: 13 - length]  # tiled


def test_codes_have_one_length_and_tell_places_apart():
    codes = position_codes(torch.arange(40), 12)
    assert codes.dtype == torch.float64
    assert codes.square().sum(1).tolist() == pytest.approx([6] * 40)
    apart = torch.cdist(codes, codes) + 9 * torch.eye(40)
    assert apart.min() > 0.1
    assert position_codes(torch.tensor([2]), 2).tolist() == [[np.sin(2), np.cos(2)]]


def test_layers_equal_a_dense_matrix_and_a_node_without_edges_keeps_itself():
    edges = [(0, 1), (1, 0), (2, 0), (2, 0)]  # two alike
    layer = GINEConv(4, 3, 4, edges).double()
    layer.eps.fill_(0.5)
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    features = torch.randn(2, 4, 4, dtype=torch.float64)
    sums = 1.5 * x
    for number, (source, target) in enumerate(edges):
        sums[:, target] += (x[:, source] + features[:, number]).relu()
    torch.testing.assert_close(layer(x, features), layer.nn(sums))
    torch.testing.assert_close(layer(x, features)[:, 3], layer.nn(1.5 * x[:, 3]))
    none = GINEConv(4, 3, 2, [])
    x = torch.randn(1, 2, 4)
    torch.testing.assert_close(none(x, torch.zeros(1, 0, 4)), none.nn(x))


def test_attention_is_that_of_its_formula():
    layer = Attention(6, 2, 5).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(3, 7, 3, 2, 5).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 5**0.5
    wanted = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(wanted))


def test_dropout_of_readers_is_the_same_for_both_directions_of_an_edge():
    """In training a reader of zero features gives the biases' path alone."""
    reader = ProgramReader(run(parse(PATH)), 16)
    numbers = torch.randn(4, 16)
    torch.manual_seed(3)
    first = reader(numbers)
    torch.manual_seed(3)
    assert torch.equal(reader(numbers), first)
    assert not torch.equal(reader(numbers), first)
    assert torch.equal(reader.eval()(numbers), reader(numbers))


@pytest.mark.parametrize("program", [PATH, None])
def test_a_new_classifier_has_the_type_of_the_network(program):
    model = GSSNN(img_size=32, program=program, embed_dim=8, reader_dim=16).double().eval()
    model.reset_classifier(3)
    images = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    found = model(images)
    assert found.shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model.forward_features(images), model(images))
    assert model(images).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"img_size": 0}, "not 0×0"),
        ({"img_size": -8}, "not -8×-8"),
        ({"img_size": (32, 40)}, "not 32×40"),
        ({"program": ""}, "it is empty"),
        ({"program": "(push (add identity))"}, "2 nodes and 0 edges; expected two nodes at least"),
        ({"reader_dim": 18}, "reader_dim is a multiple of 4, not 18"),
    ],
)
def test_networks_of_no_size_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        GSSNN(**{"img_size": 32, **options})


def test_encodings_count_degrees_triangles_and_primitives():
    triangle = (
        "(push (add (connect (next_port (push (add (connect (pop (next_port "
        "(connect identity))))))))))"
    )
    space = GraphProgramSpace([triangle, EDGE])
    found = space.encode({"program": triangle})
    assert found.dtype == np.float32
    assert found[:6].tolist() == [3, 3, 2, 2, 2, 1]
    assert found[6:].tolist() == [1, 2, 0, 0, 2, 2, 1, 3, 0, 0]
    with pytest.raises(UsageError, match="is no program"):
        space.encode({"program": "(pull identity)"})


# Statistics


@pytest.mark.filterwarnings("error")
def test_variances_of_equal_numbers_are_compared_without_a_division_by_zero():
    ratio, p = compare_variances([1.0, 2.0], [3.0, 3.0])
    assert (ratio, p) == (np.inf, 0.0)
    ratio, p = compare_variances([3.0, 3.0], [3.0, 3.0])
    assert np.isnan([ratio, p]).all()
    assert compare_variances([3.0, 3.0], [1.0, 2.0]) == (0.0, 1.0)
    same = analyse_variance([[2.0, 2.0], [2.0]])
    assert (same.between, same.within, same.component) == (0, 0, 0)
    assert np.isnan(same.f)
    apart = analyse_variance([[2.0, 2.0], [3.0, 3.0]])
    assert (apart.f, apart.p) == (np.inf, 0.0)


@pytest.mark.parametrize("groups", [[[1.0], [2.0]], [[1.0, 2.0], []], [], [[1.0, 2.0, 3.0]]])
def test_too_few_numbers_are_refused(groups):
    with pytest.raises(UsageError, match=r"needs two groups .* not \d numbers in \d groups"):
        analyse_variance(groups)


def test_parts_of_variance_sum_to_the_whole():
    random = np.random.default_rng(1)
    groups = [random.normal(size=n) for n in (2, 5, 3)]
    found = analyse_variance(groups)
    both = np.concatenate(groups)
    total = ((both - both.mean()) ** 2).sum()
    assert found.between * 2 + found.within * 7 == pytest.approx(total, rel=1e-12)
    moved = analyse_variance([100 - 3 * group for group in groups])
    assert moved.f == pytest.approx(found.f)
    assert moved.within == pytest.approx(9 * found.within)


# Pictures


def pixels_of(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_graphs_of_single_and_loose_nodes_are_drawn(tmp_path):
    draw_graphs([ProgramGraph()], tmp_path / "one.png")
    draw_graphs([run(parse(EDGE))], tmp_path / "edge.png")
    draw_graphs([LOOSE], tmp_path / "loose.png")
    inks = []
    for name in ("one", "loose", "edge"):
        found = pixels_of(tmp_path / f"{name}.png")
        blue = (found[..., 2] - found[..., 0] > 60).sum()
        inks.append(blue)
    assert inks[1] == pytest.approx(2 * inks[0], rel=0.2)  # two nodes
    assert inks[2] == pytest.approx(inks[1], rel=0.2)
    draw_graphs([run(parse(EDGE))] * 5, tmp_path / "five.png", list("abcde"))
    one, five = (Image.open(tmp_path / f"{name}.png").size for name in ("edge", "five"))
    assert five == (4 * one[0], 2 * one[1])


def test_answers_run_from_the_surest_mistake_to_the_surest_right_one(tmp_path):
    """Matrices of one grey each: the darkest is the one with the greatest mistake."""
    greys = torch.tensor([40, 80, 120, 160, 200])
    images = greys[:, None, None, None].expand(5, 1, 16, 16).to(torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 0])
    right = torch.tensor([-3.0, -1.0, 0.5, 2.0, 4.0])
    logits = torch.zeros(5, 2)
    logits[torch.arange(5), labels] = right
    order = torch.tensor([3, 0, 4, 2, 1])
    split = Split(images[order], torch.arange(5), labels[order])
    draw_answers(logits[order], split, ("changing", "constant"), tmp_path / "a.png")
    found = pixels_of(tmp_path / "a.png")
    middle = found[found.shape[0] // 2]
    flat = (middle.max(1) == middle.min(1)) & (middle[:, 0] < 240)
    runs = [int(value) for value in middle[flat, 0]]
    seen = [value for i, value in enumerate(runs) if i > 3 and runs[i - 3 : i] == [value] * 3]
    assert [*dict.fromkeys(seen)] == greys.tolist()
    assert (found[..., 0] - found[..., 2] > 60).any()  # the titles of mistakes
