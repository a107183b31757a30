"""Readers of program graphs, matrices, searches, and a run from matrices to an export."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from scipy.stats import f_oneway

import smallfry
from smallfry.cli import main
from smallfry.costing import cost
from smallfry.data import Split, load_data
from smallfry.errors import RunError, UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.symbolic.interpreter import ProgramGraph, run
from smallfry.kits.symbolic.models import (
    PATH,
    GINEConv,
    ProgramReader,
    position_codes,
    slices_of,
)
from smallfry.kits.symbolic.panels import (
    COLOURS,
    SHAPES,
    PanelSettings,
    draw_panel,
    rows_by,
)
from smallfry.kits.symbolic.pictures import draw_answers, draw_graphs
from smallfry.kits.symbolic.programs import parse
from smallfry.kits.symbolic.search import (
    SETTINGS,
    GraphProgramSpace,
    ProgramEvolution,
    evolve_programs,
)
from smallfry.kits.symbolic.statistics import analyse_variance, compare_variances
from smallfry.kits.symbolic.task import Symbolic
from smallfry.optim import KFAC
from smallfry.search import Ledger, Trial, replay
from smallfry.search.settings_space import read_settings_space
from smallfry.tasks import find_task
from smallfry.training.recipes import recipe_of
from smallfry_runtime.decoders.symbolic import decode
from smallfry_runtime.runtime import Runtime

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from zoo_golden import assert_summary, filled, images, series

GOLDEN = json.loads((Path(__file__).parent / "golden" / "symbolic.json").read_text())
EDGE = "(push (add (connect identity)))"
FEW = {"samples": 60, "size": 32}
SMALL = {"embed_dim": 16, "reader_dim": 32, "depth": 1, "mlp_dim": 32}

load_kit("symbolic")


# Networks


def golden_layer():
    graph = GOLDEN["graph"]
    layer = GINEConv(5, 5, graph["nodes"], [*zip(graph["src"], graph["dst"], strict=True)])
    weights = {name: filled(name, tensor.shape) for name, tensor in layer.state_dict().items()}
    weights["eps"] = 0.2 * series("eps", 1)
    layer.double().load_state_dict(weights)
    return layer


def test_gine_has_the_values_and_names_of_pytorch_geometric():
    layer = golden_layer()
    assert sorted(layer.state_dict()) == ["eps", "nn.bias", "nn.weight"]
    x, edges = images((12, 5), "x"), images((60, 5), "edge")
    both = layer(torch.stack([x, 2 * x]), torch.stack([edges, edges]))
    assert_summary(both[0], GOLDEN["gine"])
    assert_summary(layer(x[None], edges[None])[0], GOLDEN["gine"])


def test_gine_equals_its_peer_where_that_is_installed():
    peers = pytest.importorskip("torch_geometric.nn")
    layer = golden_layer()
    peer = peers.GINEConv(torch.nn.Linear(5, 5), train_eps=True).double()
    peer.load_state_dict(layer.state_dict())
    pairs = torch.tensor([GOLDEN["graph"]["src"], GOLDEN["graph"]["dst"]])
    torch.manual_seed(1)
    x, edges = torch.randn(12, 5).double(), torch.randn(60, 5).double()
    assert torch.allclose(layer(x[None], edges[None])[0], peer(x, pairs, edges), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "count"),
    [("gssnn_baseline", 3_904_001), ("gssnn", 4_823_809), ("gssnn_tiny_baseline", 65_089)],
)
def test_parameters(name, count):
    model = timm.create_model(name, num_classes=1)
    assert sum(p.numel() for p in model.parameters()) == count
    if name == "gssnn":
        parts = (model.reader, model.head)
        assert sum(p.numel() for part in parts for p in part.parameters()) == 788_481


def test_slices_and_codes():
    assert slices_of(7, 3).tolist() == [
        [0, 1, 2, 0, 1, 2, 0],
        [3, 4, 3, 4, 3, 4, 3],
        [5, 6, 5, 6, 5, 6, 5],
    ]
    assert {*slices_of(64, 5).flatten().tolist()} == {*range(64)}
    codes = position_codes(torch.tensor([0, 3]), 8)
    assert codes[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    wanted = [3 / 10000 ** (i / 3) for i in range(4)]
    assert codes[1].tolist() == pytest.approx([*np.sin(wanted), *np.cos(wanted)], abs=1e-12)
    with pytest.raises(UsageError, match="5 nodes and edges needs as many numbers"):
        slices_of(4, 5)
    with pytest.raises(UsageError, match="a multiple of 4, not 6"):
        ProgramReader(run(parse(EDGE)), 6)


def test_readers_sum_over_edges_in_both_directions():
    """Compare with the equations, written out with loops."""
    graph = run(parse(PATH))
    reader = ProgramReader(graph, 16).double().eval()
    torch.manual_seed(0)
    numbers = torch.randn(2, 16).double()
    features = {
        e: numbers[:, slices_of(16, 5)[e]] + reader.codes[row]
        for row, e in enumerate([*graph.nodes, *(edge.number for edge in graph.edges)])
    }
    x = {node: features[node] for node in graph.nodes}
    for layer in reader.layers:
        sums = {node: value.clone() for node, value in x.items()}
        for edge in graph.edges:
            sums[edge.one] += (x[edge.other] + features[edge.number]).relu()
            sums[edge.other] += (x[edge.one] + features[edge.number]).relu()
        x = {node: layer.nn(value) for node, value in sums.items()}
    wanted = torch.stack([*x.values()]).mean(0)
    assert torch.allclose(reader(numbers), wanted, atol=1e-12)


def test_the_listing_of_edges_does_not_matter_but_numbers_do():
    graph = run(parse("(push (add (connect (next_port (add (connect identity))))))"))
    turned = ProgramGraph(graph.nodes, graph.edges[::-1])
    first, second = graph.edges
    numbered = ProgramGraph(
        graph.nodes, (first._replace(number=second.number), second._replace(number=first.number))
    )
    one, other, third = (
        ProgramReader(each, 16).double().eval() for each in (graph, turned, numbered)
    )
    for reader in (other, third):
        reader.load_state_dict(one.state_dict())
    torch.manual_seed(0)
    numbers = torch.randn(3, 16).double()
    assert torch.allclose(one(numbers), other(numbers), atol=1e-12)
    assert not torch.allclose(one(numbers), third(numbers), atol=1e-6)


def test_programs_shape_a_network_and_its_cost():
    pictures = torch.zeros(1, 1, 64, 64)
    path, edge = (timm.create_model("gssnn_tiny", program=each).eval() for each in (PATH, EDGE))
    assert (len(path.graph.nodes), len(edge.graph.nodes)) == (3, 2)
    assert cost(path, pictures).macs > cost(edge, pictures).macs
    assert path.reset_classifier(0) is None
    assert path(pictures).shape == (1, 64)
    assert edge.get_classifier() is edge.head
    assert edge.forward_head(torch.zeros(1, 64), pre_logits=True).shape == (1, 64)
    assert timm.create_model("gssnn_tiny_baseline")(pictures).shape == (1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"program": "(push identity)"}, "1 nodes and 0 edges; expected two nodes at least"),
        ({"program": "(pushing identity)"}, "no primitive; did you mean 'push'"),
        ({"img_size": 60}, "a multiple of 8 pixels per side, not 60×60"),
        ({"img_size": (64, 32)}, "not 64×32"),
        ({"embed_dim": 30}, "embed_dim is a multiple of 4"),
        ({"reader_dim": 4}, "needs as many numbers"),
    ],
)
def test_impossible_networks_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        timm.create_model("gssnn_tiny", **options)


def test_natural_gradient_covers_encoder_and_reader():
    torch.manual_seed(0)
    model = timm.create_model("gssnn_tiny", img_size=32, **SMALL)
    optimizer = KFAC(model, lr=0.05, likelihood="categorical")
    pictures, labels = torch.randn(16, 1, 32, 32), torch.arange(16) % 2
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pictures), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all("norm" in name for name in optimizer.uncovered)


# Matrices


def test_matrices_follow_their_rules():
    settings, seen = PanelSettings(size=48), set()
    for number in range(60):
        panel = draw_panel(settings, "train", number)
        seen.add(panel.rules)
        assert panel.label == number % 2 == all(len({*row}) == 1 for row in panel.colours)
        for rule, rows, count in zip(
            panel.rules, (panel.shapes, panel.colours), (len(SHAPES), len(COLOURS)), strict=True
        ):
            assert all(0 <= value < count for row in rows for value in row)
            steps = {(b - a, c - b) for a, b, c in rows}
            if rule == "constant":
                assert steps == {(0, 0)}
            elif rule == "progression":
                ((one, other),) = steps
                assert one == other in (-2, -1, 1, 2)
            else:
                assert len({frozenset(row) for row in rows}) == 1
                assert len({*rows}) == len(rows[0]) == len({*rows[0]}) == 3
        for row in range(3):
            for column in range(3):
                centre = panel.pixels[0, 8 + 16 * row, 8 + 16 * column]
                assert centre == COLOURS[panel.colours[row][column]]
        assert panel.pixels[0, 0, 0] == panel.background
        assert panel.background not in COLOURS
    assert len(seen) == 9


def test_shapes_have_their_areas():
    random = np.random.default_rng(0)
    assert all(len(rows_by("progression", 5, random)) == 3 for _ in range(20))
    areas = {}
    for number in range(12):
        panel = draw_panel(PanelSettings(size=288), "train", number)
        inside = panel.pixels[0] != panel.background
        for row in range(3):
            for column in range(3):
                cell = inside[96 * row : 96 * row + 96, 96 * column : 96 * column + 96]
                areas.setdefault(SHAPES[panel.shapes[row][column]], []).append(cell.mean())
    radius = 0.36**2
    for place, name in enumerate(SHAPES[:4]):
        n = place + 3
        wanted = radius * n / 2 * np.sin(2 * np.pi / n)
        assert np.mean(areas[name]) == pytest.approx(wanted, rel=0.08)
    assert np.mean(areas["circle"]) == pytest.approx(np.pi * radius, rel=0.05)


def test_samples_depend_on_settings_split_and_number_alone():
    pixels = draw_panel(PanelSettings(), "train", 4).pixels
    assert np.array_equal(pixels, draw_panel(PanelSettings(samples=99), "train", 4).pixels)
    for other in (
        draw_panel(PanelSettings(), "test", 4),
        draw_panel(PanelSettings(), "train", 6),
        draw_panel(PanelSettings(seed=1), "train", 4),
    ):
        assert not np.array_equal(pixels, other.pixels)


def test_the_data_set_has_its_splits():
    data = load_data("symbolic-panels", options=FEW, test=0.2, validation=0.25)
    assert [len(data.train), len(data.validation), data.test_count] == [36, 12, 12]
    assert data.train.images.shape == (36, 1, 32, 32)
    assert data.train.labels.tolist() == [i % 2 for i in range(36)]
    assert data.classes == ("changing", "constant")
    assert data.generated["seed"] == 0
    again = load_data("symbolic-panels", options=FEW, test=0.2, validation=0.25)
    assert again.fingerprint == data.fingerprint
    assert len(load_data("symbolic-panels", options=FEW, validation=0, limit=5).train) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": {"samples": 3}}, "samples is 20 to"),
        ({"options": {"size": 8}}, "size is 32 to 512"),
        ({"options": {"sizes": 8}}, "did you mean 'size'"),
        ({"root": "."}, "is generated"),
        ({"image_size": 16}, "no data.image_size"),
    ],
)
def test_impossible_data_is_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        load_data("symbolic-panels", **settings)


# Statistics


def test_variances_equal_scipys():
    random = np.random.default_rng(0)
    groups = [random.normal(i, 2, 3 + i).tolist() for i in range(4)]
    found = analyse_variance(groups)
    wanted = f_oneway(*groups)
    assert found.f == pytest.approx(wanted.statistic, rel=1e-12)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-10)
    assert found.degrees == (3, 14)
    equal = analyse_variance([[1.0, 3.0], [5.0, 7.0]])
    assert equal.component == (equal.between - equal.within) / 2 == 7.0
    assert analyse_variance([[1.0, 3.0], [1.0, 3.0]]).component == 0
    ratio, p = compare_variances([0.0, 4.0], [0.0, 1.0, 2.0])
    assert (ratio, p) == (8.0, pytest.approx(0.10557, abs=1e-4))
    with pytest.raises(UsageError, match="two groups at least"):
        analyse_variance([[1.0, 2.0]])
    with pytest.raises(UsageError, match="two numbers"):
        compare_variances([1.0], [1.0, 2.0])


# Search


def value_of(candidate):
    """Prefer programs of many nodes."""
    return float(len(run(parse(candidate["program"])).nodes))


def evolve(search, stop=99):
    told = []
    while (asked := search.ask(2)) and len(told) < stop:
        trials = [Trial(each, value_of(each)) for each in asked]
        search.tell(trials)
        told += trials
    return told


def settings():
    return {"population": 5, "rounds": 3, "limit": 2500}


@pytest.mark.slow
def test_evolution_keeps_the_better_half_and_resumes(tmp_path):
    search = ProgramEvolution(**settings())
    trials = evolve(search)
    programs = [trial.candidate["program"] for trial in trials]
    assert programs[0] == EDGE
    assert len({*programs}) == len(programs) >= 4
    assert len(search.history) == 3
    for round_ in search.history:
        assert round_["values"] == sorted(round_["values"], reverse=True)
    last = search.history[-1]
    assert search.state_dict()["population"] == last["programs"][: round(len(last["programs"]) / 2)]
    assert search.grammar.library
    json.dumps(search.state_dict())
    half = ProgramEvolution(**settings())
    replay(half, trials[:3])
    replay(ProgramEvolution(**settings()), trials)
    rest = evolve(half)
    assert [trial.candidate for trial in rest] == [trial.candidate for trial in trials[3:]]
    with pytest.raises(RunError, match="none of this search"):
        replay(ProgramEvolution(**settings()), [Trial({"program": PATH + " "}, 1.0)])


def test_failed_programs_do_not_survive_others():
    search = ProgramEvolution(**settings())
    worst = EDGE
    while asked := search.ask(9):
        search.tell([Trial(e, None if e["program"] == worst else 1.0) for e in asked])
    assert all(each["programs"][-1] == worst for each in search.history[:2])
    with pytest.raises(UsageError, match="keep is above 0"):
        ProgramEvolution(population=2, keep=0.1)
    with pytest.raises(UsageError, match="rounds is at least 1"):
        ProgramEvolution(rounds=0)


def small_space():
    content = {**SETTINGS, "data": {"name": "symbolic-panels", "options": FEW, "validation": 0.2}}
    content |= {"epochs": 1, "model": {"name": "gssnn_tiny", "options": SMALL}, "threads": 1}
    return GraphProgramSpace([EDGE, PATH], content)


def test_the_space_gives_models_trainings_and_encodings(tmp_path):
    space = small_space()
    candidate = {"program": PATH}
    spec = space.spec(candidate)
    assert spec.architecture == "gssnn_tiny"
    assert spec.arguments["program"] == PATH
    assert space.train(candidate).model.options["program"] == PATH
    assert space.costs(candidate)["macs"] > space.costs({"program": EDGE})["macs"]
    encoded = space.encode(candidate)
    assert encoded[:6].tolist() == [3, 2, 1, pytest.approx(4 / 3), 2, 0]
    assert encoded[6:].sum() == parse(PATH).size
    space.write(tmp_path / "space.yaml")
    again = read_settings_space(tmp_path / "space.yaml")
    assert again.choices[0].values == (EDGE, PATH)
    assert "data" not in yaml.safe_load((tmp_path / "space.yaml").read_text())["settings"]
    with pytest.raises(UsageError, match="is no program"):
        GraphProgramSpace(["push"])


@pytest.mark.slow
def test_a_search_trains_programs_and_goes_on(tmp_path):
    told = []
    search = ProgramEvolution(population=2, rounds=2, limit=3000, frontier=10)
    trials = evolve_programs(search, small_space(), tmp_path, told=told.append)
    assert len(told) == len(trials) >= 2
    assert all(0 <= trial.value <= 100 and trial.cost["parameters"] for trial in trials)
    assert Ledger(tmp_path / "ledger.jsonl").read() == trials
    again = ProgramEvolution(population=2, rounds=2, limit=3000, frontier=10)
    assert evolve_programs(again, small_space(), tmp_path, told=told.append) == trials
    assert len(told) == len(trials)
    assert again.history == search.history


@pytest.mark.slow
def test_the_command_searches_given_programs(tmp_path, capsys):
    small_space().write(tmp_path / "space.yaml")
    asked = ["search", "--space", str(tmp_path / "space.yaml"), "--data", "symbolic-panels"]
    asked += ["--data.options", json.dumps(FEW), "--strategy", "random", "--budget", "2"]
    assert main([*asked, "--to", str(tmp_path / "search"), "--json"]) == 0
    best = yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())
    assert best["model"]["options"]["program"] in (EDGE, PATH)


# Task and run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("symbolic") / "run"
    asked = ["train", "--task", "symbolic", "--data.options", json.dumps(FEW), "--epochs", "2"]
    asked += ["--model.options", json.dumps(SMALL), "--progress", "quiet", "--threads", "1"]
    assert main([*asked, "--run", str(folder)]) == 0
    return folder


def test_the_task_has_its_recipe_and_decodes():
    assert find_task("symbolic") is Symbolic
    assert recipe_of("symbolic").name == "recipe.yaml"
    task = Symbolic()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    first, second = task.decode(logits, ["changing", "constant"])
    assert (first["colour"], second["colour"]) == ("changing", "constant")
    assert second["probabilities"]["constant"] == pytest.approx(1 / (1 + np.exp(-1)))
    with pytest.raises(UsageError, match="no setting 'beam'"):
        decode(logits.numpy(), ["a", "b"], {"beam": 1})


@pytest.mark.slow
def test_a_run_is_exported_and_answers(trained, tmp_path, capsys):
    found = smallfry.load(trained)
    assert found.manifest["model"]["arguments"]["num_classes"] == 2
    runtime = Runtime(smallfry.export(trained, tmp_path / "export"))
    test = load_data("symbolic-panels", options=FEW).test
    with torch.no_grad():
        wanted = found.model(found.normalize(test.images)).numpy()
    assert np.abs(runtime.compute(test.images.numpy()).logits - wanted).max() < 1e-5
    Image.fromarray(test.images[0, 0].numpy()).save(tmp_path / "a.png")
    capsys.readouterr()
    for place in (trained, tmp_path / "export"):
        assert main(["predict", str(place), str(tmp_path / "a.png"), "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-5)


@pytest.mark.usefixtures("quiet_warnings")  # norms of maps stay in floating point
@pytest.mark.slow
def test_a_run_is_compressed(trained, tmp_path):
    methods = "[{quantize: {weights: 8, activations: 8}}]"
    assert main(["compress", str(trained), "--methods", methods, "--to", str(tmp_path / "q")]) == 0
    assert smallfry.load(tmp_path / "q").evaluate()["loss"] < 2


@pytest.mark.usefixtures("pictures_drawn")
def test_a_run_draws_matrices_and_the_graph(tmp_path):
    settings = {"data": {"name": "symbolic-panels", "options": FEW}, "epochs": 1}
    model = {"name": "gssnn_tiny", "options": SMALL}
    smallfry.train(task="symbolic", model=model, run=tmp_path / "run", progress="quiet", **settings)
    drawn = {file.stem for file in (tmp_path / "run" / "pictures").iterdir()}
    assert drawn >= {"panels", "program", "confusion_matrix"}


def test_pictures(tmp_path):
    test = load_data("symbolic-panels", options=FEW).test
    logits = torch.randn(len(test), 2)
    draw_answers(logits, test, ("changing", "constant"), tmp_path / "many.png")
    few = Split(test.pixels, test.rows[:3], test.labels[:3])
    draw_answers(logits[:3], few, ("changing", "constant"), tmp_path / "few.png")
    draw_graphs([run(parse(each)) for each in (EDGE, PATH)], tmp_path / "graphs.png", ["a", "b"])
    many, few_, graphs = (Image.open(tmp_path / f"{n}.png").size for n in ("many", "few", "graphs"))
    assert many == (few_[0], 2 * few_[1])
    assert graphs[0] > graphs[1]


def test_augmentation_that_moves_matrices_is_refused(tmp_path, capsys):
    asked = ["train", "--task", "symbolic", "--augment.crop_padding", "4"]
    assert main([*asked, "--data.options", json.dumps(FEW), "--run", str(tmp_path / "x")]) != 0
    assert "labels of symbolic would not hold" in capsys.readouterr().err
