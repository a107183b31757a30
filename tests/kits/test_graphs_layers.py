"""Relational layers: goldens, dense formulas, torch-geometric's layers, counts of messages."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from smallfry.errors import UsageError
from smallfry.kits.graphs import GINEConv, HGTConv, RGATConv, RGCNConv, plan
from smallfry.kits.graphs import products as products_module
from smallfry.kits.graphs.convert import compact
from smallfry.kits.graphs.pairs import Pattern, StaticPlan
from smallfry.kits.graphs.products import dots, edge_softmax, gather_sum, typed_product

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from zoo_golden import assert_summary, filled, images, series

GOLDEN = json.loads((Path(__file__).parent / "golden" / "graphs.json").read_text())
GRAPH = GOLDEN["graph"]
EDGES = torch.tensor([GRAPH["src"], GRAPH["dst"]])
TYPES = torch.tensor(GRAPH["type"])
EXECUTIONS = ("edges", "compact", "aggregate", "nodes", "auto")
HGT_EDGES = [("a", "r0", "b"), ("b", "r1", "a"), ("a", "r2", "a")]
BUILT = {
    "rgcn_mean": lambda e: RGCNConv(5, 4, 3, execution=e),
    "rgcn_sum": lambda e: RGCNConv(5, 4, 3, aggr="sum", execution=e),
    "rgcn_mean_2_bases": lambda e: RGCNConv(5, 4, 3, bases=2, execution=e),
    "rgat_1": lambda e: RGATConv(5, 4, 3, execution=e),
    "rgat_2": lambda e: RGATConv(5, 4, 3, heads=2, execution=e),
}


def load(layer, entry):
    """Fill a layer under torch-geometric's names."""
    layer.double().load_state_dict({n: filled(n, shape) for n, shape in entry["tensors"]})
    return layer


def random_graph(seed, nodes=15, edges=50, relations=5):
    """Edges with duplicates, isolated nodes and a relation without edges."""
    random = torch.Generator().manual_seed(seed)
    index = torch.randint(nodes - 3, (2, edges), generator=random)
    types = torch.randint(relations, (edges,), generator=random)
    types[types == 2] = 1
    index[:, 5:9], types[5:9] = index[:, :1], types[0]
    return index, types


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", BUILT)
def test_outputs_equal_the_golden_ones(name, execution):
    layer = load(BUILT[name](execution), GOLDEN[name])
    assert_summary(layer(images((12, 5), "x"), EDGES, TYPES), GOLDEN[name])
    with torch.no_grad():  # another way, where no gradient is wanted
        assert_summary(layer(images((12, 5), "x"), EDGES, TYPES), GOLDEN[name])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_transformers_equal_the_golden_one(execution):
    golden = GOLDEN["hgt"]
    layer = load(HGTConv({"a": 5, "b": 3}, 8, "ab", HGT_EDGES, 2, execution), golden)
    edges = dict(zip(HGT_EDGES, map(torch.tensor, golden["edges"]), strict=True))
    found = layer({"a": images((7, 5), "xa"), "b": images((6, 3), "xb")}, edges)
    for name in "ab":
        assert_summary(found[name], golden[name])


@pytest.mark.parametrize("execution", ["edges", "compact", "nodes"])
def test_isomorphism_layer_equals_the_golden_one(execution):
    linear = nn.Linear(5, 5)
    layer = GINEConv(linear, 5, 60, float(0.2 * series("eps", 1)[0]), execution).double()
    layer.eps.copy_(0.2 * series("eps", 1))
    linear.weight.data = filled("nn.weight", (5, 5))
    linear.bias.data = filled("nn.bias", (5,))
    layer.embedding.data = images((60, 5), "edge")
    # its features are of single edges: each is a relation of its own
    assert_summary(layer(images((12, 5), "x"), EDGES, torch.arange(60)), GOLDEN["gine"])
    few = GINEConv(linear, 5, 3, 0.1, execution).double()
    x = images((12, 5), "x")
    messages = torch.relu(x[EDGES[0]] + few.embedding[TYPES])
    sums = torch.zeros_like(x).index_add(0, EDGES[1], messages)
    torch.testing.assert_close(few(x, EDGES, TYPES), linear(sums + (1 + few.eps) * x))


def test_pairs_are_those_of_the_golden_graph():
    counts = plan(EDGES, TYPES, 12, 3).counts
    assert counts.source_pairs == GRAPH["unique_source_type"] == 30
    assert counts.destination_pairs == GRAPH["unique_destination_type"] == 28
    assert counts.source_pairs == len({*zip(GRAPH["src"], GRAPH["type"], strict=True)})
    assert [counts.rows(e) for e in EXECUTIONS[:4]] == [60, 30, 28, 36]
    assert counts.best() == "aggregate"


@pytest.mark.parametrize("execution", ["edges", "compact", "aggregate"])
@pytest.mark.parametrize("name", ["rgcn", "rgat", "hgt"])
def test_layers_multiply_as_often_as_is_counted(name, execution, monkeypatch):
    index, types = random_graph(0)
    found = plan(index, types, 15, 5)
    rows = []

    def counting(x, weight, given):
        rows.append((weight.shape[-1], given.total))
        return typed_product(x, weight, given)

    for module in ("layers", "attention", "relational"):
        monkeypatch.setattr(f"smallfry.kits.graphs.{module}.typed_product", counting)
    x = torch.randn(15, 8)
    if name == "rgcn":
        layer = RGCNConv(8, 6, 5, root=False, execution=execution)
    elif name == "rgat":
        layer = RGATConv(8, 6, 5, heads=2, execution=execution)
    else:
        names = [("a", str(number), "a") for number in range(5)]
        layer = HGTConv(8, 6, "a", names, 2, execution)
    counter = FlopCounterMode(display=False)
    with counter:
        if name == "hgt":
            layer.flat(x, torch.zeros(15, dtype=torch.int64), index, types, found)
        else:
            layer(x, index, types, found)
    linear = 15 * (8 * 18 + 6 * 6) if name == "hgt" else 0
    assert counter.get_total_flops() // 2 == layer.macs(found.counts, execution) + linear
    width = 12 if name == "rgat" and execution != "aggregate" else 3 if name == "hgt" else 6
    messages = [count for channels, count in rows if channels == width]
    assert {*messages} == {found.counts.rows(execution)}
    if name == "rgcn" and execution != "edges":
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            layer(x, index, types, found)
        assert counter.get_total_flops() // 2 == layer.macs(found.counts, execution)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_nodes_may_be_numbered_otherwise(execution):
    index, types = random_graph(1)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    x = torch.randn(15, 4, dtype=torch.float64)
    for layer in (
        RGCNConv(4, 4, 5, execution=execution),
        RGATConv(4, 2, 5, 2, execution=execution),
    ):
        layer.double()
        shuffled = torch.randperm(50)
        found = layer(x[order], place[index][:, shuffled], types[shuffled])
        torch.testing.assert_close(found, layer(x, index, types)[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("execution", ["edges", "compact"])
def test_largest_messages_equal_a_loop(execution):
    index, types = random_graph(2)
    layer = RGCNConv(4, 3, 5, aggr="max", execution=execution).double()
    x = torch.randn(15, 4, dtype=torch.float64)
    wanted = x @ layer.root + layer.bias
    for node in range(15):
        for relation in range(5):
            chosen = index[0][(index[1] == node) & (types == relation)]
            if len(chosen):
                best = (x[chosen] @ layer.weight[relation]).amax(0)
                wanted = wanted.index_add(0, torch.tensor([node]), best[None])
    torch.testing.assert_close(layer(x, index, types), wanted, rtol=1e-12, atol=1e-12)


def test_operations_have_the_gradients_of_differences():
    index, types = random_graph(3, 6, 12, 3)
    found = plan(index, types, 6, 3)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    rows, pattern = found.rows("source_pair"), found.pattern("destination", "source")
    check = torch.autograd.gradcheck
    assert check(lambda x, w: typed_product(x, w, rows), (x, weight))
    assert check(lambda x, v: gather_sum(pattern, x, v), (x, values))
    assert check(lambda x: gather_sum(pattern, x), (x,))
    other = torch.randn_like(x, requires_grad=True)
    assert check(lambda a, b: dots(pattern, a, b), (x, other))
    assert check(lambda v: edge_softmax(found, v), (values,))


def test_dot_products_are_computed_in_parts(monkeypatch):
    index, types = random_graph(4)
    pattern = plan(index, types, 15, 5).pattern("destination", "source")
    x = torch.randn(15, 2, 3)
    whole = dots(pattern, x, x)
    monkeypatch.setattr(products_module, "CHUNK", 7)
    assert torch.equal(dots(pattern, x, x), whole)
    torch.testing.assert_close(whole, (x[pattern.row] * x[pattern.column]).sum(-1))


def test_empty_slots_count_for_nothing():
    index, types = random_graph(5)
    there = torch.arange(50) % 3 > 0
    kept = index[:, there], types[there]
    for layer in (
        RGCNConv(4, 4, 5),
        RGCNConv(4, 4, 5, aggr="sum"),
        RGATConv(4, 4, 5),
        GINEConv(nn.Identity(), 4, 5),
    ):
        x = torch.randn(15, 4)
        fixed = StaticPlan(index, types, (15, 15), 5, there)
        torch.testing.assert_close(layer(x, index, types, fixed), layer(x, *kept))


def test_a_graph_may_have_no_edges():
    none = torch.empty(2, 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    x = torch.randn(4, 3, requires_grad=True)
    for execution in EXECUTIONS:
        for layer in (
            RGCNConv(3, 2, 2, execution=execution),
            RGATConv(3, 2, 2, execution=execution),
        ):
            found = layer(x, *none)
            wanted = x @ layer.root if isinstance(layer, RGCNConv) else torch.zeros(4, 2)
            torch.testing.assert_close(found, wanted)
            found.sum().backward()


def test_patterns_that_are_in_order_are_not_sorted():
    rows = torch.tensor([0, 0, 2])
    pattern = Pattern(rows, torch.tensor([1, 0, 1]), (3, 2))
    assert pattern.by_row[0] is None
    assert pattern.by_row[1].tolist() == [0, 2, 2, 3]
    assert pattern.by_column[2].tolist() == [0, 0, 2]


def test_what_auto_chose_is_shown():
    layer = RGCNConv(5, 4, 3)
    assert layer.extra_repr() == "relations=3, execution=auto"
    layer(torch.zeros(12, 5), EDGES, TYPES)
    assert "execution=auto (aggregate)" in repr(layer)
    assert "execution=compact" in repr(RGCNConv(5, 4, 3, execution="compact"))


ONE = torch.tensor([[0], [1]])
ZERO = torch.tensor([0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RGCNConv(4, 4, 2, execution="fast"), "execution is one of edges, compact"),
        (lambda: RGCNConv(4, 4, 0), "at least one relation, not 0"),
        (lambda: RGCNConv(4, 4, 2, aggr="median"), "mean, sum or max, not 'median'"),
        (lambda: RGCNConv(4, 4, 2, aggr="max"), "execution is edges or compact, not auto"),
        (lambda: RGCNConv(4, 4, 2, bases=2, blocks=2), "bases or blocks, not both"),
        (lambda: RGCNConv(4, 4, 2, blocks=3), "4 and 4 channels can't be divided in 3"),
        (lambda: GINEConv(nn.Identity(), 4, 2, execution="aggregate"), "in front of relu"),
        (lambda: HGTConv(4, 5, "a", [("a", "r", "a")], 2), "among 2 heads"),
        (lambda: plan(ONE.float(), ZERO, 2, 1), r"int64 tensor \(2, edges\)"),
        (lambda: plan(ONE, ONE, 2, 1), r"edge_type is an int64 tensor \(1,\)"),
        (lambda: plan(ONE, ZERO, 1, 1), "destination 1; the numbers are 0 to 0"),
        (lambda: plan(-ONE, ZERO, 2, 1), "destination -1"),
        (lambda: plan(ONE, ZERO + 4, 2, 3), "relation 4; .* 0 to 2: .* number of relations"),
        (
            lambda: RGCNConv(4, 4, 2)(torch.zeros(3, 4), ONE, ZERO, plan(ONE, ZERO, 2, 2)),
            "the plan",
        ),
        (
            lambda: RGCNConv(4, 4, 2, execution="nodes")(
                torch.zeros(2, 4), ONE, ZERO, plan(ONE, ZERO, 2, 2)
            ),
            "makes its own plan",
        ),
        (
            lambda: HGTConv(4, 4, "a", [("a", "r", "a")])({"b": torch.zeros(2, 4)}, {}),
            "no type 'b'; its types are a",
        ),
    ],
)
def test_wrong_settings_and_graphs_are_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()


# torch-geometric


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed")


CASES = {
    "mean": lambda t: t.RGCNConv(6, 8, 5),
    "sum": lambda t: t.RGCNConv(6, 8, 5, aggr="add"),
    "bases": lambda t: t.RGCNConv(6, 8, 5, num_bases=2),
    "blocks": lambda t: t.RGCNConv(6, 8, 5, num_blocks=2),
    "fast": lambda t: t.FastRGCNConv(6, 8, 5, root_weight=False, bias=False),
    "rgat": lambda t: t.RGATConv(6, 4, 5, heads=2),
    "rgat_mean": lambda t: t.RGATConv(6, 4, 5, heads=3, concat=False, bias=False),
    "rgat_bases": lambda t: t.RGATConv(6, 4, 5, heads=2, num_bases=3),
}


def assert_same(theirs, ours, inputs, run, tolerance):
    """Compare outputs and gradients, of inputs and of all our parameters."""
    wanted, found = run(theirs, inputs[0]), run(ours, inputs[1])
    direction = torch.randn_like(wanted)
    names = [name for name, _ in ours.named_parameters()]
    gradients = []
    for layer, out, given in ((theirs, wanted, inputs[0]), (ours, found, inputs[1])):
        parameters = [layer.get_parameter(name) for name in names]
        wanted_of = [*given, *parameters]
        found_of = torch.autograd.grad((out * direction).sum(), wanted_of, allow_unused=True)
        gradients.append([torch.zeros(1) if each is None else each for each in found_of])
    for one, other in ((wanted, found), *zip(*gradients, strict=True)):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * max(1, one.abs().max().item())


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", CASES)
def test_layers_equal_torch_geometrics(theirs, name, execution):
    for seed, (kind, tolerance) in enumerate(((torch.float64, 1e-10), (torch.float32, 1e-5))):
        torch.manual_seed(seed)
        layer = CASES[name](theirs).to(kind)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -1, 1)
        index, types = random_graph(seed)
        x = torch.randn(15, 6, dtype=kind)
        inputs = [[x.clone().requires_grad_()] for _ in range(2)]

        def run(layer, given, index=index, types=types):
            return layer(given[0], index, types)

        assert_same(layer, compact(layer, execution), inputs, run, tolerance)
        with torch.no_grad():
            found = compact(layer, execution)(x, index, types)
            assert (found - layer(x, index, types)).abs().max() <= 10 * tolerance


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_bipartite_layers_equal_torch_geometrics(theirs, execution):
    layer = theirs.RGCNConv((6, 4), 8, 5).double()
    index, types = random_graph(0)
    index[1] = index[1] % 7
    inputs = [
        [torch.ones(15, 6).double().requires_grad_(), torch.ones(7, 4).double().requires_grad_()]
        for _ in range(2)
    ]
    run = lambda layer, given: layer(tuple(given), index, types)  # noqa: E731
    assert_same(layer, compact(layer, execution), inputs, run, 1e-10)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_transformers_equal_torch_geometrics(theirs, execution):
    torch.manual_seed(0)
    for kind, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        layer = theirs.HGTConv({"a": 8, "b": 3}, 8, (["a", "b"], HGT_EDGES), 2).to(kind)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -1, 1)
        edges = {
            HGT_EDGES[0]: torch.randint(5, (2, 20)),
            HGT_EDGES[1]: torch.empty(2, 0, dtype=torch.int64),
            HGT_EDGES[2]: torch.randint(5, (2, 9)),
        }
        x = [torch.randn(7, 8, dtype=kind), torch.randn(6, 3, dtype=kind)]
        inputs = [[each.clone().requires_grad_() for each in x] for _ in range(2)]

        def run(layer, given, edges=edges):
            found = layer({"a": given[0], "b": given[1]}, edges)
            return torch.cat([found["a"], found["b"]])

        assert_same(layer, compact(layer, execution), inputs, run, tolerance)


def test_flat_transformers_equal_those_by_type():
    torch.manual_seed(0)
    kinds, x = torch.tensor([1, 0, 0, 1, 0]), torch.randn(5, 4)
    layer = HGTConv(4, 4, "ab", [("a", "r", "a"), ("b", "s", "a")], 2)
    index, types = torch.tensor([[1, 0, 3, 4], [2, 1, 1, 2]]), torch.tensor([0, 1, 1, 0])
    places = [torch.tensor([1, 2, 4]), torch.tensor([0, 3])]
    local = {("a", "r", "a"): torch.tensor([[0, 2], [1, 1]])}
    local |= {("b", "s", "a"): torch.tensor([[0, 1], [0, 0]])}
    found = layer({"a": x[places[0]], "b": x[places[1]]}, local)
    flat = layer.flat(x, kinds, index, types)
    torch.testing.assert_close(flat[places[0]], found["a"])
    fixed = StaticPlan(index, types, (5, 5), 2)
    torch.testing.assert_close(layer.flat(x, kinds, index, types, fixed), flat)
    assert "b" not in found  # no relation leads there


def test_models_are_converted_inside(theirs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = theirs.RGCNConv(5, 6, 3), theirs.RGATConv(6, 4, 3)

        def forward(self, x):
            return self.second(F.relu(self.first(x, EDGES, TYPES)), EDGES, TYPES)

    net = Net().eval()
    net.first.weight.requires_grad_(False)
    ours = compact(net, "compact")
    assert isinstance(ours.first, RGCNConv)
    assert not ours.first.weight.requires_grad
    assert not ours.second.training
    assert isinstance(net.first, theirs.RGCNConv)
    x = torch.randn(12, 5)
    torch.testing.assert_close(ours(x), net(x))
    assert math.isclose(ours.second.negative_slope, 0.2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: nn.Linear(2, 2), "has no RGCNConv"),
        (lambda t: t.RGCNConv(4, 4, 2, aggr="max"), "aggr is mean, add or sum"),
        (lambda t: t.RGATConv(4, 4, 2, dropout=0.5), "dropout must be 0.0, not 0.5"),
        (lambda t: t.RGATConv(4, 4, 2, mod="additive"), "mod must be None"),
        (lambda t: t.RGATConv(4, 4, 2, edge_dim=3), "edge_dim must be None"),
        (
            lambda t: t.RGATConv(4, 4, 2, attention_mechanism="within-relation"),
            "attention_mechanism must be 'across-relation'",
        ),
        (lambda t: t.HGTConv(-1, 4, (["a"], [("a", "r", "a")])), "run it once"),
        (lambda t: t.RGCNConv(4, 4, 2, flow="target_to_source"), "from source to target"),
    ],
)
def test_what_can_not_be_equal_is_refused(theirs, make, words):
    with pytest.raises(UsageError, match=words):
        compact(make(theirs))
