"""Relational layers against loops over edges in float64, and networks under renumbering."""

import math

import pytest
import timm
import torch
from torch import nn

from smallfry.errors import UsageError
from smallfry.io.plugins import load_kit
from smallfry.kits.graphs import GINEConv, HGTConv, RGATConv, RGCNConv, plan
from smallfry.kits.graphs.heterographs import Heterographs, heterograph
from smallfry.kits.graphs.models import RelationalNetwork
from smallfry.kits.graphs.pairs import MessageCounts, StaticPlan
from smallfry.kits.graphs.products import dots, edge_softmax, gather_sum

load_kit("graphs")
EXECUTIONS = ("edges", "compact", "aggregate", "nodes", "auto")
NODES, RELATIONS = 9, 4
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
MODELS = ("rgcn_tiny", "rgat_tiny", "hgt_tiny", "gine_tiny")


def graph(seed=0, edges=30, nodes=(NODES, NODES)):
    """Draw edges, some twice, with a relation that has none and a last node without any."""
    random = torch.Generator().manual_seed(seed)
    ends = [torch.randint(n - 1, (edges,), generator=random) for n in nodes]
    types = torch.randint(RELATIONS, (edges,), generator=random)
    types[types == 2] = 0
    index = torch.stack(ends)
    index[:, 3], types[3] = index[:, 2], types[2]
    return index, types


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def edges_of(index, types):
    return list(zip(*index.tolist(), types.tolist(), strict=True))


def refilled(layer):
    """Fill all parameters in float64."""
    layer.double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return layer


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("settings", [{}, {"bases": 3}, {"blocks": 2}], ids=str)
@pytest.mark.parametrize("aggr", ["mean", "sum"])
def test_convolutions_between_two_sets_of_nodes_equal_a_loop(execution, settings, aggr):
    index, types = graph(1, nodes=(NODES, 6))
    layer = refilled(RGCNConv((4, 3), 6, RELATIONS, aggr=aggr, execution=execution, **settings))
    sources, own = drawn(NODES, 4), drawn(6, 3)
    if "bases" in settings:
        matrices = sum(layer.comp[:, b, None, None] * layer.weight[b] for b in range(3))
    elif "blocks" in settings:
        matrices = torch.stack([torch.block_diag(*each) for each in layer.weight])
    else:
        matrices = layer.weight
    rows = list(own @ layer.root + layer.bias)
    edges = edges_of(index, types)
    for source, target, relation in edges:
        alike = sum((t, r) == (target, relation) for _, t, r in edges)
        share = 1 / alike if aggr == "mean" else 1.0
        rows[target] = rows[target] + share * sources[source] @ matrices[relation]
    wanted = torch.stack(rows)
    torch.testing.assert_close(layer((sources, own), index, types), wanted, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(layer((sources, own), index, types), wanted, **CLOSE)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("bases", [None, 2])
def test_attention_equals_a_loop_over_the_edges_of_a_node(execution, concat, bases):
    index, types = graph(2)
    layer = RGATConv(
        4, 3, RELATIONS, 2, bases, concat=concat, negative_slope=0.1, execution=execution
    )
    refilled(layer)
    x, edges = drawn(NODES, 4), edges_of(index, types)
    wanted = []
    for node in range(NODES):
        scores, messages = [], []
        for source, target, relation in edges:
            if target == node:
                message = x[source] @ layer.matrices[relation]
                score = x[node] @ layer.matrices[relation] @ layer.q + message @ layer.k
                scores.append(torch.where(score > 0, score, 0.1 * score))
                messages.append(message.view(2, 3))
        found = torch.zeros(2, 3, dtype=torch.float64)
        if scores:
            shares = torch.stack(scores).softmax(0)
            found = (shares[:, :, None] * torch.stack(messages)).sum(0)
        wanted.append((found.flatten() if concat else found.mean(0)) + layer.bias)
    torch.testing.assert_close(layer(x, index, types), torch.stack(wanted), **CLOSE)


HETERO = [("a", "0", "b"), ("b", "1", "a"), ("a", "2", "a"), ("c", "3", "b")]


def heterogeneous(seed=0):
    """Draw nodes of three types and edges of four relations, of which one has none."""
    random = torch.Generator().manual_seed(seed)
    counts = {"a": 4, "b": 3, "c": 2}
    edges = {
        name: torch.stack(
            [torch.randint(counts[end], (many,), generator=random) for end in (name[0], name[2])]
        )
        for name, many in zip(HETERO, (6, 0, 5, 3), strict=True)
    }
    return counts, edges


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_transformers_equal_a_loop_over_the_edges_of_a_node(execution):
    counts, edges = heterogeneous()
    widths = {"a": 6, "b": 3, "c": 2}
    layer = refilled(HGTConv(widths, 6, "abc", HETERO, 2, execution))
    x = {name: drawn(count, widths[name]) for name, count in counts.items()}
    parts = {name: layer.kqv_lin.lins[name](x[name]).view(-1, 3, 2, 3) for name in x}
    found = layer(x, edges)
    assert {*found} == {"a", "b"}  # no relation leads to c
    for name in "ab":
        for node in range(counts[name]):
            scores, messages = [], []
            for place, relation in enumerate(HETERO):
                prior = layer.p_rel["__".join(relation)][0]
                for source, target in edges[relation].T.tolist():
                    if (relation[2], target) == (name, node):
                        key, _, value = parts[relation[0]][source]
                        query = parts[name][node, 1]
                        heads = range(2)
                        at = [h * len(HETERO) + place for h in heads]
                        keys = [key[h] @ layer.k_rel.weight[at[h]] for h in heads]
                        dot = torch.stack([query[h] @ keys[h] for h in heads])
                        scores.append(dot * prior / math.sqrt(3))
                        values = [value[h] @ layer.v_rel.weight[at[h]] for h in heads]
                        messages.append(torch.stack(values))
            summed = torch.zeros(2, 3, dtype=torch.float64)
            if scores:
                shares = torch.stack(scores).softmax(0)
                summed = (shares[:, :, None] * torch.stack(messages)).sum(0)
            gelu = nn.functional.gelu(summed.flatten())
            wanted = layer.out_lin.lins[name](gelu)
            if name == "a":  # of equal widths
                gate = layer.skip["a"].sigmoid()
                wanted = gate * wanted + (1 - gate) * x["a"][node]
            torch.testing.assert_close(found[name][node], wanted, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({("a", "0", "b"): [[4], [0]]}, r"'a__0__b': an edge has source 4; .* 0 to 3"),
        ({("a", "0", "b"): [[0], [3]]}, r"'a__0__b': an edge has destination 3; .* 0 to 2"),
        ({("a", "2", "a"): [[-1], [0]]}, r"'a__2__a': an edge has source -1"),
        ({("a", "9", "b"): [[0], [0]]}, "no relation 'a__9__b'; its relations are a__0__b, b__1"),
    ],
)
def test_edges_beyond_the_nodes_of_their_type_are_refused(changes, words):
    layer = HGTConv(4, 4, "abc", HETERO)
    x = {"a": torch.zeros(4, 4), "b": torch.zeros(3, 4), "c": torch.zeros(2, 4)}
    edges = {name: torch.tensor(each) for name, each in changes.items()}
    with pytest.raises(UsageError, match=words):
        layer(x, edges)


def test_edges_to_a_type_without_nodes_are_refused():
    layer = HGTConv(4, 4, "abc", HETERO)
    one = torch.tensor([[0], [0]])
    with pytest.raises(UsageError, match="'c__3__b' has edges, and no nodes of type 'c' came"):
        layer({"b": torch.zeros(3, 4)}, {("c", "3", "b"): one})
    found = layer({"c": torch.zeros(2, 4), "b": torch.zeros(1, 4)}, {("c", "3", "b"): one})
    assert {*found} == {"b"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RGCNConv(4, 4, 2, bases=0), "bases is at least 1, not 0"),
        (lambda: RGCNConv(4, 4, 2, blocks=0), "blocks is at least 1, not 0"),
        (lambda: RGATConv(4, 4, 2, heads=0), "heads is at least 1, not 0"),
        (lambda: RGATConv(4, 4, 2, bases=-1), "bases is at least 1, not -1"),
        (lambda: HGTConv(4, 4, "a", [("a", "r", "a")], 0), "heads is at least 1, not 0"),
        (lambda: RelationalNetwork(heads=0), "heads is at least 1, not 0"),
    ],
)
def test_layers_of_nothing_are_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_a_maximum_refuses_a_plan_of_fixed_shapes():
    index, types = graph()
    layer = RGCNConv(4, 4, RELATIONS, aggr="max", execution="edges")
    fixed = StaticPlan(index, types, (NODES, NODES), RELATIONS)
    with pytest.raises(UsageError, match="no plan of fixed shapes"):
        layer(torch.zeros(NODES, 4), index, types, fixed)


def test_a_maximum_over_no_edges_is_what_a_node_has_of_its_own():
    layer = refilled(RGCNConv(4, 3, RELATIONS, aggr="max", execution="compact"))
    none = torch.empty(2, 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    x = drawn(5, 4)
    torch.testing.assert_close(layer(x, *none), x @ layer.root + layer.bias, **CLOSE)


@pytest.mark.parametrize("execution", ["edges", "compact", "nodes", "auto"])
def test_isomorphism_layers_have_the_gradients_of_a_loop(execution):
    index, types = graph(3)
    layer = refilled(GINEConv(nn.Linear(4, 2), 4, RELATIONS, 0.3, execution))
    x = drawn(NODES, 4).requires_grad_()
    rows = list((1 + layer.eps) * x)
    for source, target, relation in edges_of(index, types):
        rows[target] = rows[target] + (x[source] + layer.embedding[relation]).relu()
    wanted, found = layer.nn(torch.stack(rows)), layer(x, index, types)
    torch.testing.assert_close(found, wanted, **CLOSE)
    direction, tensors = drawn(NODES, 2), [x, *layer.parameters()]
    both = [torch.autograd.grad((each * direction).sum(), tensors) for each in (found, wanted)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# Operations


def test_shares_sum_to_one_and_do_not_change_with_a_constant():
    index, types = graph(4)
    found = plan(index, types, NODES, RELATIONS)
    scores = 400 * drawn(30, 2)  # exp of the difference would overflow
    shares = edge_softmax(found, scores)
    assert shares.min() >= 0
    totals = torch.zeros(NODES, 2, dtype=torch.float64).index_add(0, found.destination, shares)
    reached = found.destination.unique()
    torch.testing.assert_close(totals[reached], torch.ones(len(reached), 2).double(), **CLOSE)
    assert totals.sum() == pytest.approx(2 * len(reached))
    moved = scores + drawn(NODES, 2)[found.destination]
    torch.testing.assert_close(edge_softmax(found, moved), shares, rtol=0, atol=1e-12)
    fixed = StaticPlan(index, types, (NODES, NODES), RELATIONS)
    back = torch.argsort(index[1], stable=True).argsort()
    torch.testing.assert_close(edge_softmax(fixed, scores[back]), shares[back], **CLOSE)


def test_sums_and_dot_products_equal_those_of_a_dense_matrix():
    index, types = graph(5, nodes=(NODES, 6))
    pattern = plan(index, types, (NODES, 6), RELATIONS).pattern("destination", "source")
    values, x, y = drawn(30, 2), drawn(NODES, 2, 3), drawn(6, 2, 3)
    dense = torch.zeros(2, 6, NODES, dtype=torch.float64)
    for entry, (row, column) in enumerate(
        zip(pattern.row.tolist(), pattern.column.tolist(), strict=True)
    ):
        dense[:, row, column] += values[entry]
    wanted = torch.einsum("gij,jgc->igc", dense, x)
    torch.testing.assert_close(gather_sum(pattern, x, values), wanted, **CLOSE)
    # <v, dots(y, x)> = <sum of v x, y>: one is the other's adjoint
    left = (values * dots(pattern, y, x)).sum()
    torch.testing.assert_close(left, (wanted * y).sum(), **CLOSE)


def test_counts_are_those_of_sets_and_the_cheaper_side_is_chosen():
    index, types = graph(6, edges=50)
    counts = plan(index, types, NODES, RELATIONS).counts
    edges = edges_of(index, types)
    sources, targets = {(s, r) for s, _, r in edges}, {(t, r) for _, t, r in edges}
    assert counts == MessageCounts(50, len(sources), len(targets), NODES, RELATIONS)
    assert MessageCounts(9, 4, 4, 9, 1).best() == "compact"  # equal
    assert MessageCounts(9, 5, 4, 9, 1).best() == "aggregate"
    empty = plan(torch.empty(2, 0, dtype=torch.int64), types[:0], 0, 1).counts
    assert empty == MessageCounts(0, 0, 0, 0, 1)


def test_a_plan_serves_several_layers_and_graphs_of_another_type():
    index, types = graph(7)
    found = plan(index, types, NODES, RELATIONS)
    x = drawn(NODES, 4)
    for make in (RGCNConv, RGATConv):
        layer = refilled(make(4, 4, RELATIONS, execution="auto"))
        torch.testing.assert_close(layer(x, index, types, found), layer(x, index, types), **CLOSE)
        single = layer.float()
        once = single(x.float(), index, types, found)
        assert once.dtype == torch.float32
        torch.testing.assert_close(
            once.double(), layer.double()(x, index, types), atol=1e-5, rtol=0
        )
    strided = drawn(4, NODES).T  # not contiguous
    layer = refilled(RGCNConv(4, 4, RELATIONS))
    there = layer(strided.contiguous(), index, types)
    torch.testing.assert_close(layer(strided, index, types), there, **CLOSE)


# Networks


def packed(count=2):
    settings = Heterographs(nodes=12, degree=3)
    pairs = [heterograph(settings, "train", number) for number in range(count)]
    return torch.stack([torch.from_numpy(each) for each, _ in pairs]).double()


@pytest.mark.parametrize("name", MODELS)
def test_logits_follow_nodes_that_are_numbered_otherwise_and_edges_in_other_slots(name):
    images = packed()
    model = timm.create_model(name, img_size=(12, 3)).double().eval()
    order = torch.randperm(12)
    place = order.argsort().double()
    moved = images.clone()
    moved[:, 4:] = images[:, 4:, order]
    there = images[:, 3] > 0
    for end in (0, 1):
        moved[:, end] = torch.where(there, place[images[:, end].long()], 0.0)
    slots = torch.randperm(36)
    edges = moved[:, :4].flatten(2)[..., slots]
    moved[:, :4] = edges.view(2, 4, 12, 3)
    with torch.no_grad():
        wanted = model(images)[:, :, order]
        torch.testing.assert_close(model(moved), wanted, rtol=0, atol=1e-10)
    more = torch.cat([images, torch.zeros(2, 8, 12, 2, dtype=torch.float64)], dim=3)  # empty slots
    with torch.no_grad():
        torch.testing.assert_close(model(more), model(images), rtol=0, atol=1e-10)
        for execution in ("edges", "nodes"):  # the rest of a batch changes nothing
            other = timm.create_model(name, img_size=(12, 3), execution=execution).double()
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(other(images[1:])[0], model(images)[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_nodes_that_no_path_reaches_do_not_matter(name):
    images = packed(1)
    images[:, :4] = 0
    images[0, :4, 0, 0] = torch.tensor([1.0, 2.0, 5.0, 1.0])  # one edge, from 1 to 2
    model = timm.create_model(name, img_size=(12, 3)).double().eval()
    changed = images.clone()
    changed[0, 7, 1, 0] = 1 - changed[0, 7, 1, 0]  # the mark of node 1
    with torch.no_grad():
        differs = (model(changed) - model(images))[0].abs().amax(0) > 1e-12
    # attention has nothing of the node itself, and its one neighbour no neighbours
    assert differs.nonzero()[:, 0].tolist() == ([] if name == "rgat_tiny" else [1, 2])


def test_a_new_classifier_has_the_type_of_the_network():
    model = RelationalNetwork(width=4, layers=1).double()
    model.reset_classifier(5)
    assert model(packed()).shape == (2, 5, 12)
    assert model.forward_head(torch.zeros(1), pre_logits=True).shape == (1,)
