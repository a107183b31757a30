"""Graph programs: counts, laws of the interpreter, enumeration, weights, and libraries."""

import json
import math
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import networkx
import pytest
from program_counts import count_programs, derivations

from smallfry.errors import UsageError
from smallfry.kits.symbolic.grammar import (
    Grammar,
    enumerate_programs,
    estimate,
    expected_uses,
    inside,
)
from smallfry.kits.symbolic.interpreter import PORTS, ProgramGraph, State, execute, is_same, run
from smallfry.kits.symbolic.library import (
    common_form,
    cost_of,
    learn_library,
    learn_templates,
    learn_with_stitch,
    rewrite,
)
from smallfry.kits.symbolic.population import Frontiers, find_graphs
from smallfry.kits.symbolic.programs import (
    ARITIES,
    IDENTITY,
    MOST_SIZE,
    Program,
    parse,
    read,
    unfold,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "symbolic.json").read_text())["symbolic"]
EDGE = "(push (add (connect identity)))"
PATH = "(push (add (connect (add (next_port (connect identity))))))"
TRIANGLE = (
    "(push (add (connect (next_port (push (add (connect (pop (next_port (connect identity))))))))))"
)
HOLES = {**ARITIES, "#0": 0, "#1": 0}


def parted(total, count):
    """Yield the ways to write a number as so many numbers from 1 on."""
    if count == 0:
        if total == 0:
            yield ()
        return
    for first in range(1, total - count + 2):
        for rest in parted(total - first, count - 1):
            yield (first, *rest)


@pytest.fixture(scope="module")
def every():
    """All programs by size, independently of the grammar."""
    by_size = {}
    for size in range(1, 7):
        by_size[size] = [
            Program(name, parts)
            for name, arity in ARITIES.items()
            for sizes in parted(size - 1, arity)
            for parts in product(*(by_size[each] for each in sizes))
        ]
    return by_size


# Counts


def test_counts_equal_brute_force_and_the_reference(every):
    counts = count_programs(Grammar.uniform(), 12)
    assert counts == GOLDEN["programs_by_size_1_to_12"]
    assert [len(each) for each in every.values()] == counts[:6]
    assert len({program for each in every.values() for program in each}) == sum(counts[:6])


def accepted_and_distinct(by_size):
    graphs, accepted, distinct = [], [], []
    for programs in by_size:
        found = [graph for graph in map(run, programs) if graph.is_accepted]
        accepted.append(len(found))
        for graph in found:
            if not any(is_same(graph, other) for other in graphs):
                graphs.append(graph)
        distinct.append(len(graphs))
    return accepted, distinct


def test_accepted_programs_and_distinct_graphs(every):
    accepted, distinct = accepted_and_distinct(every.values())
    assert accepted == GOLDEN["nontrivial_programs_by_size_1_to_7"][:6]
    assert distinct == GOLDEN["distinct_graphs_up_to_size_1_to_7"][:6]


@pytest.mark.slow
def test_programs_of_seven_primitives():
    counts = count_programs(Grammar.uniform(), 7)
    by_size = {}
    for each in enumerate_programs(Grammar.uniform(), sum(counts)):
        by_size.setdefault(each.program.size, []).append(each.program)
    assert [len(each) for each in by_size.values()] == counts
    accepted, distinct = accepted_and_distinct(by_size.values())
    assert accepted == GOLDEN["nontrivial_programs_by_size_1_to_7"]
    assert distinct == GOLDEN["distinct_graphs_up_to_size_1_to_7"]


# Programs and interpreter


def test_written_programs_are_parsed_again(every):
    for program in every[5]:
        assert parse(str(program)) == program
        assert hash(parse(str(program))) == hash(program)
    spread = parse("  (push\n(add(connect identity)) )")
    assert str(spread) == EDGE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("(push", "identity|no primitive|not closed"),
        ("(push identity", "a parenthesis is not closed"),
        ("identity)", "stands behind the end"),
        (")", "closes nothing"),
        ("(pusk identity)", "'pusk' is no primitive; did you mean 'push'"),
        ("(push identity identity)", "push continues with 1 programs, not 2"),
        ("push", "push continues with 1 programs, not 0"),
        ("#0", "'#0' is no primitive"),
        ("(push " * 200 + "identity" + ")" * 200, "nested more than 150"),
        ("x" * 5000, "at most 4,000 characters"),
    ],
)
def test_what_is_no_program_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse(text)


def test_large_programs_are_refused():
    deep = IDENTITY
    for _ in range(40):
        deep = Program("func", (deep, Program("if_positions_equal", (IDENTITY,) * 5)))
    with pytest.raises(UsageError, match=f"at most {MOST_SIZE} primitives"):
        parse(str(deep))
    many = read("(add (connect (next_port #0)))", HOLES)
    program = IDENTITY
    for _ in range(70):
        program = many.filled({"#0": Program("pop", (Program("push", (program,)),))})
    with pytest.raises(UsageError, match="at most 64 nodes"):
        run(Program("push", (program,)))


def states(every):
    """Some states that programs reach."""
    found = {execute(program, State()) for size in (1, 2, 4, 5) for program in every[size]}
    found |= {execute(parse(text), State()) for text in (PATH, TRIANGLE)}
    return [*found, execute(parse("(push (add identity))"), State())]


def of(name, *parts):
    return Program(name, tuple(parts))


def test_laws_of_the_interpreter(every):
    reached = states(every)
    assert len(reached) > 20
    assert any(not state.graph.is_connected for state in reached)
    for state in reached:
        for f in (*every[2], *every[3][::5], parse(PATH)):
            wanted = execute(f, state)
            assert execute(of("next_port", of("prev_port", f)), state) == wanted
            assert execute(of("prev_port", of("next_port", f)), state) == wanted
            assert execute(of("func", IDENTITY, f), state) == wanted
            once = of("connect", f)
            assert execute(of("connect", once), state) == execute(once, state)
            turned = f
            for _ in range(PORTS):
                turned = of("next_port", turned)
            assert execute(turned, state) == wanted
            same = of("if_positions_equal", f, f, of("push", IDENTITY), of("pop", IDENTITY), f)
            assert execute(same, state) == execute(of("push", f), state)


def test_a_graph_has_its_numbers_and_one_loose_node_at_most(every):
    for size in (4, 5, 6):
        for program in every[size][::3]:
            state = execute(program, State())
            graph = state.graph
            numbers = sorted([*graph.nodes, *(edge.number for edge in graph.edges)])
            assert numbers == list(range(graph.next_number))
            parts = networkx.Graph((e.one, e.other) for e in graph.edges)
            parts.add_nodes_from(graph.nodes)
            assert graph.is_connected == networkx.is_connected(parts)
            if not graph.is_connected:
                assert graph.neighbours[state.position] == set()
                assert networkx.number_connected_components(parts) == 2


def test_single_primitives():
    loose = execute(parse("(push (add identity))"), State())
    assert loose.position == 1
    assert execute(parse("(push (add identity))"), loose).graph == loose.graph  # connect first
    assert execute(parse("(pop identity)"), loose).stack == (0,)  # none would be left
    assert execute(parse("(push (pop identity))"), loose).stack == (0,)
    assert execute(parse("(add identity)"), State()) == State()  # the stack is empty
    edge = execute(parse(EDGE), State())
    assert edge.graph.links == {(0, 0): 1, (1, 0): 0}
    assert execute(parse("(move identity)"), edge).position == 0
    assert execute(parse("(next_port (move identity))"), edge).position == 1
    assert execute(parse("(pop (pop identity))"), edge).stack == ()
    inner = execute(parse(f"(func {EDGE} identity)"), State())
    assert inner.graph == edge.graph
    assert (inner.position, inner.port, inner.stack) == (0, 0, ())
    unfinished = execute(parse("(func (push (add identity)) (push identity))"), State())
    assert unfinished == State(stack=(0,))
    there = "(if_positions_equal (move identity) identity (pop identity) (push identity) identity)"
    assert execute(parse(there), edge) == edge._replace(stack=(0, 1))  # moving goes elsewhere
    assert execute(parse(there), edge._replace(port=1)).stack == ()  # no edge at this port
    assert run(parse(TRIANGLE)).signature == (2, 2, 2)
    parallel = run(parse("(push (add (connect (next_port (connect identity)))))"))
    assert len(parallel.edges) == 2
    assert is_same(parallel, edge.graph)
    assert not is_same(run(parse(PATH)), run(parse(TRIANGLE)))
    assert not ProgramGraph().is_accepted


# Grammars


def two():
    return {
        "grow": read("(push (add (connect #0)))", HOLES),
        "twice": read("(func #0 #0)", HOLES),
    }


def test_enumeration_is_monotone_complete_and_without_repeats(every):
    weights = {name: 1.0 + 0.1 * place for place, name in enumerate(ARITIES)}
    total = math.fsum(weights.values())
    logs = {name: math.log(weight / total) for name, weight in weights.items()}
    grammar = Grammar(logs)
    found = [*enumerate_programs(grammar, 4000)]
    assert all(one.length <= other.length for one, other in pairwise(found))
    assert len({each.program for each in found}) == 4000
    lengths = {p: -sum(logs[node.name] for node in p.nodes()) for s in every.values() for p in s}
    for each in found:
        alone = -sum(logs[node.name] for node in each.program.nodes())
        assert each.length == pytest.approx(alone, abs=1e-9)
    shortest = sorted(lengths.values())[:1000]
    assert [each.length for each in found[:1000]] == pytest.approx(shortest, abs=1e-9)
    assert shortest[-1] < 7 * min(-value for value in logs.values())  # larger ones are longer


def test_primitives_of_a_library_are_unfolded():
    grammar = Grammar.uniform(two())
    found = [*enumerate_programs(grammar, 3000)]
    assert len({each.program for each in found}) == 3000
    assert all(one.length <= other.length for one, other in pairwise(found))
    for each in found:
        assert {node.name for node in each.program.nodes()} <= {*ARITIES}
        assert unfold(each.written, grammar.library) == each.program
    assert any(each.written.name == "twice" for each in found)
    first = next(each for each in found if run(each.program).is_accepted)
    assert str(first.written) == "(grow identity)"
    assert next(iter(enumerate_programs(grammar, 50, most_size=1))).program == IDENTITY
    assert len([*enumerate_programs(Grammar.uniform(), 99, most_size=2)]) == 8


def test_probabilities_sum_over_all_derivations():
    grammar = estimate([parse(PATH), parse(TRIANGLE)], Grammar.uniform(two()))
    logs = grammar.log_probabilities
    edge = parse(EDGE)
    for program in (edge, parse(PATH), of("func", edge, edge), parse(TRIANGLE)):
        ways = [*derivations(program, grammar)]
        shares = [math.exp(sum(logs[name] for name in way)) for way in ways]
        assert inside(program, grammar) == pytest.approx(sum(shares), rel=1e-12)
        wanted = dict.fromkeys(grammar.primitives, 0.0)
        for way, share in zip(ways, shares, strict=True):
            for name, uses in Counter(way).items():
                wanted[name] += uses * share / sum(shares)
        assert expected_uses([program], grammar) == pytest.approx(wanted, rel=1e-12)
    assert len([*derivations(of("func", edge, edge), grammar)]) == 6  # 2 · 2, and 2 of twice
    double = expected_uses([edge, edge], grammar)
    assert double == pytest.approx({k: 2 * v for k, v in expected_uses([edge], grammar).items()})


def test_each_round_of_estimation_makes_programs_more_probable():
    programs = [parse(EDGE), parse(PATH), parse(TRIANGLE)]
    uniform = Grammar.uniform(two())
    found = estimate(programs, uniform, spread=100.0)
    before, after = (sum(math.log(inside(p, g)) for p in programs) for g in (uniform, found))
    assert after > before
    logs = estimate(programs, uniform).log_probabilities
    assert max(logs.values()) - min(logs.values()) == pytest.approx(0.5, abs=1e-9)
    assert max(logs, key=logs.get) == max(found.log_probabilities, key=found.log_probabilities.get)


def test_grammars_are_plain_data():
    grammar = learn_library([parse(TRIANGLE)])
    assert Grammar.from_dict(json.loads(json.dumps(grammar.to_dict()))) == grammar
    for wrong in ({}, {"library": [], "log_probabilities": {}}, {"library": {}}):
        with pytest.raises(UsageError, match="the entries log_probabilities and library"):
            Grammar.from_dict(wrong)
    with pytest.raises(UsageError, match="the sets differ in add"):
        Grammar.from_dict({"library": {}, "log_probabilities": {"identity": 0.0}})
    with pytest.raises(UsageError, match="sum to 1"):
        Grammar(dict.fromkeys(ARITIES, 0.0))
    with pytest.raises(UsageError, match="no template with holes"):
        Grammar.uniform({"fn": read("(push #1)", HOLES)})


# Libraries


def corpus():
    found = Frontiers()
    for text in (EDGE, PATH, TRIANGLE):
        for name in ("next_port", "prev_port", "push", "connect"):
            found.add(of(name, parse(text)))
        found.add(parse(text))
    return found.corpus(range(len(found.graphs)))


def all_templates(program, arity):
    """Yield every template with different holes that a part of a program has, by brute force."""

    def cut(part):
        yield None
        for parts in product(*(cut(each) for each in part.parts)):
            yield (part.name, parts)

    def named(shape, count):
        if shape is None:
            return Program(f"#{next(count)}")
        return Program(shape[0], tuple(named(each, count) for each in shape[1]))

    for part in program.nodes():
        for shape in cut(part):
            if shape is not None:
                template = named(shape, iter(range(99)))
                if sum(node.is_hole for node in template.nodes()) <= arity:
                    yield template


def test_the_learner_finds_what_brute_force_finds():
    programs = corpus()
    found = learn_templates(programs, iterations=1, max_arity=1)
    (template,) = found.templates.values()
    templates = {each for program in programs for each in all_templates(program, 1)}
    assert len(templates) > 60

    def total(each):
        return sum(map(cost_of, rewrite(programs, "fn", each))) + cost_of(each)

    assert total(template) == min(map(total, templates))
    assert found.after == sum(map(cost_of, found.programs))
    assert found.after + cost_of(template) < found.before == sum(map(cost_of, programs))


@pytest.mark.parametrize("learner", ["own", "stitch"])
def test_rewritten_programs_unfold_to_the_originals(learner):
    if learner == "stitch":
        pytest.importorskip("stitch_core")
    learn = {"own": learn_templates, "stitch": learn_with_stitch}[learner]
    programs = corpus()
    found = learn(programs, iterations=3, max_arity=2)
    assert found.templates
    assert [unfold(each, found.templates) for each in found.programs] == programs
    assert found.after < found.before
    assert sum(p.size for p in found.programs) < sum(p.size for p in programs)
    grammar = learn_library(programs, learner=learner)
    assert grammar.library == found.templates


def test_the_learner_is_as_good_as_stitch_here():
    pytest.importorskip("stitch_core")
    programs = corpus()
    own, stitch = (each(programs, 1, 2) for each in (learn_templates, learn_with_stitch))
    totals = [each.after + sum(map(cost_of, each.templates.values())) for each in (own, stitch)]
    assert totals[0] <= totals[1]


def test_common_forms():
    one, other = parse("(func (pop identity) (pop identity))"), parse("(func identity identity)")
    assert str(common_form(one, other, 1)) == "(func #0 #0)"
    assert common_form(one, other, 0) is None
    assert common_form(one, IDENTITY, 2) is None
    assert common_form(one, one, 0) == one
    double = read("(func #0 #0)", HOLES)
    assert double.match(one)["#0"] == parse("(pop identity)")
    assert double.match(parse("(func identity (pop identity))")) is None
    assert learn_templates([IDENTITY]).templates == {}


def test_other_learners_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="own or stitch, not 'other'"):
        learn_library([IDENTITY], learner="other")
    monkeypatch.setitem(__import__("sys").modules, "stitch_core", None)
    with pytest.raises(UsageError, match="pip install stitch-core"):
        learn_with_stitch([IDENTITY])


# Population


@pytest.mark.slow
def test_graphs_are_found_by_libraries_that_plain_enumeration_does_not_reach():
    found = find_graphs(4, limit=8000, rounds=4)
    assert len(found) == 4
    graphs = [run(program) for program in found]
    assert not any(is_same(a, b) for i, a in enumerate(graphs) for b in graphs[:i])
    assert max(program.size for program in found) > 7  # a(8) = 1,201,781 programs
    assert len(find_graphs(4, limit=8000, rounds=1)) == 1


def test_frontiers_keep_the_shortest():
    found = Frontiers(most=2)
    assert found.add(IDENTITY) is None
    assert [found.add(of("push", parse(EDGE))), found.add(parse(PATH))] == [0, 1]
    for name in ("connect", "next_port"):
        found.add(of(name, of(name, parse(EDGE))))
    found.add(parse(EDGE))
    found.add(parse(EDGE))
    assert [str(each) for each in found.programs[0]] == [EDGE, f"(push {EDGE})"]
    many = IDENTITY
    for _ in range(70):
        many = read("(add (connect (next_port (pop (push #0)))))", HOLES).filled({"#0": many})
    assert found.add(of("push", many)) is None  # too many nodes
