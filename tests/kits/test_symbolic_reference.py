"""Programs against a second interpreter, shortest derivations by brute force, and libraries."""

import math
import random
from itertools import islice, pairwise

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
from smallfry.kits.symbolic.interpreter import (
    MOST_NODES,
    ProgramGraph,
    State,
    execute,
    is_same,
    run,
)
from smallfry.kits.symbolic.library import (
    common_form,
    cost_of,
    learn_library,
    learn_templates,
    rewrite,
)
from smallfry.kits.symbolic.programs import (
    ARITIES,
    IDENTITY,
    MOST_SIZE,
    Program,
    parse,
    read,
    unfold,
)

EDGE = "(push (add (connect identity)))"
HOLES = {**ARITIES, **{f"#{i}": 0 for i in range(4)}}
LIBRARY = {
    "grow": read("(push (add (connect #0)))", HOLES),
    "twice": read("(func #0 #0)", HOLES),
    "turn": read("(next_port (next_port identity))", HOLES),
}


def draw(source, depth):
    """Draw a program, of all primitives."""
    names = list(ARITIES) if depth else ["identity"]
    name = source.choice(names + ["push", "add", "connect", "next_port"] * bool(depth))
    return Program(name, tuple(draw(source, depth - 1) for _ in range(ARITIES[name])))


class Machine:
    """The table of primitives, with a graph that changes."""

    def __init__(self):
        self.graph = networkx.MultiGraph()
        self.graph.add_node(0)
        self.ports = {}  # node and port to the other node
        self.edges = []
        self.count = 1
        self.position, self.port, self.stack = 0, 0, []

    def copy(self):
        other = Machine()
        other.take(self)
        other.position, other.port, other.stack = self.position, self.port, [*self.stack]
        return other

    def take(self, other):
        self.graph, self.ports = other.graph.copy(), dict(other.ports)
        self.edges, self.count = [*other.edges], other.count

    @property
    def is_whole(self):
        return networkx.is_connected(self.graph)

    def run(self, program):
        getattr(self, program.name)(*program.parts)
        return self

    def identity(self):
        pass

    def next_port(self, f):
        self.port = 0 if self.port == 9 else self.port + 1
        self.run(f)

    def prev_port(self, f):
        self.port = 9 if self.port == 0 else self.port - 1
        self.run(f)

    def move(self, f):
        if (self.position, self.port) in self.ports:
            self.position = self.ports[self.position, self.port]
        self.run(f)

    def add(self, f):
        if self.stack and self.is_whole:
            self.position = self.count
            self.graph.add_node(self.count)
            self.count += 1
        self.run(f)

    def push(self, f):
        self.stack.append(self.position)
        self.run(f)

    def pop(self, f):
        if self.stack and (self.is_whole or {*self.stack[:-1]} - {self.position}):
            self.stack.pop()
        self.run(f)

    def connect(self, f):
        if self.stack and self.stack[-1] != self.position:
            top = self.stack[-1]
            if not {(self.position, self.port), (top, self.port)} & {*self.ports}:
                self.ports[self.position, self.port] = top
                self.ports[top, self.port] = self.position
                self.graph.add_edge(self.position, top)
                self.edges.append((self.count, self.position, top, self.port))
                self.count += 1
        self.run(f)

    def func(self, f, g):
        inner = self.copy().run(f)
        if inner.is_whole:
            self.take(inner)
        self.run(g)

    def if_positions_equal(self, f, g, h, k, after):
        same = self.copy().run(f).position == self.copy().run(g).position
        self.run(h if same else k)
        self.run(after)


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_write_what_a_second_interpreter_writes(seed):
    source, sizes = random.Random(seed), set()
    for _ in range(250):
        program = draw(source, 9)
        if program.size > MOST_SIZE:
            continue
        state, other = execute(program, State()), Machine().run(program)
        assert (state.position, state.port) == (other.position, other.port)
        assert list(state.stack) == other.stack
        assert list(state.graph.nodes) == sorted(other.graph.nodes)
        assert [tuple(edge) for edge in state.graph.edges] == other.edges
        assert state.graph.links == other.ports
        assert state.graph.is_connected == other.is_whole
        assert state.graph.signature == tuple(sorted(len({*other.graph[n]}) for n in other.graph))
        sizes.add(len(state.graph.nodes))
        assert parse(str(program)) == program
    assert len(sizes) >= 3


def test_isomorphism_leaves_numbers_ports_and_parallel_edges_out():
    path = run(parse("(push (add (connect (add (next_port (connect identity))))))"))
    other = run(parse("(push (add (connect (push (add (prev_port (connect identity)))))))"))
    assert path.edges != other.edges
    assert is_same(path, other)
    star = run(
        parse(
            "(push (add (connect (add (next_port (connect (add (next_port "
            "(connect identity)))))))))"
        )
    )
    long = run(
        parse(
            "(push (add (connect (push (add (next_port (connect (push (add (next_port "
            "(connect identity)))))))))))"
        )
    )
    assert (star.signature, long.signature) == ((1, 1, 1, 3), (1, 1, 2, 2))
    assert not is_same(star, long)
    assert is_same(ProgramGraph(), ProgramGraph())


def test_a_graph_may_have_as_many_nodes_as_are_allowed():
    step = read("(add (connect (next_port #0)))", HOLES)
    program = IDENTITY
    for _ in range(9):  # ports of node 0
        program = step.filled({"#0": program})
    assert len(run(Program("push", (program,))).nodes) == 10
    chain = IDENTITY
    move = read("(push (add (connect (next_port #0))))", HOLES)
    for _ in range(MOST_NODES - 1):
        chain = move.filled({"#0": chain})
    assert len(run(chain).nodes) == MOST_NODES
    with pytest.raises(UsageError, match="at most 64 nodes: use a smaller program"):
        run(move.filled({"#0": chain}))


# Text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(push)", "push continues with 1 programs, not 0"),
        ("()", "'\\)' is no primitive"),
        ("(identity)", None),
        ("((push identity))", r"'\(' is no primitive"),
        ("(func identity)", "func continues with 2 programs, not 1"),
        ("identity identity", "'identity' stands behind the end"),
        ("(push identity))", r"'\)' stands behind the end"),
        ("(" * 3, r"'\(' is no primitive"),
        ("   ", "it is empty"),
        ("(p" + "x" * 90 + " identity)", r"'\(px+\.\.\.' is no program: 'px{39}' is no"),
    ],
)
def test_texts_at_the_edge_of_programs(text, words):
    if words is None:
        assert parse(text) == IDENTITY
        return
    with pytest.raises(UsageError, match=words):
        parse(text)


def test_templates_match_what_they_are_filled_with():
    template = read("(func #0 (if_positions_equal #1 #0 #1 identity #2))", HOLES)
    values = {f"#{i}": parse(t) for i, t in enumerate((EDGE, "identity", "(pop identity)"))}
    whole = template.filled(values)
    assert template.match(whole) == values
    assert template.match(template) == {name: Program(name) for name in values}
    assert template.match(IDENTITY) is None
    other = Program("func", (parse(EDGE), whole.parts[1].parts[0]))
    assert template.match(other) is None
    assert [node.name for node in whole.parts[0].nodes()] == ["push", "add", "connect", "identity"]


# Grammars


def skewed(library=None):
    names = [*ARITIES, *(library or {})]
    weights = {name: 1.0 + 0.4 * place for place, name in enumerate(names)}
    total = math.fsum(weights.values())
    return Grammar({n: math.log(w / total) for n, w in weights.items()}, library or {})


def test_lengths_in_an_enumeration_are_those_of_the_shortest_derivation():
    grammar = skewed(LIBRARY)
    logs = grammar.log_probabilities
    for each in islice(enumerate_programs(grammar, 600), 0, 600, 7):
        ways = [-sum(logs[name] for name in way) for way in derivations(each.program, grammar)]
        assert each.length == pytest.approx(min(ways), abs=1e-8)
        assert inside(each.program, grammar) == pytest.approx(
            math.fsum(math.exp(-length) for length in ways), rel=1e-12
        )


@pytest.mark.parametrize("most", [1, 2, 3])
def test_an_enumeration_of_small_programs_ends_with_all_of_them(most):
    found = [*enumerate_programs(skewed(LIBRARY), 10**6, most_size=most)]
    total = sum(count_programs(Grammar.uniform(), most))
    assert len(found) == len({each.program for each in found}) == total
    assert [*enumerate_programs(Grammar.uniform(), 0)] == []
    assert count_programs(Grammar.uniform(), 0) == []


def test_counts_of_a_library_take_its_primitives_for_one():
    grammar = Grammar.uniform(LIBRARY)
    assert grammar.arities["twice"] == grammar.arities["grow"] == 1
    assert grammar.arities["turn"] == 0
    # two of no parts, nine of one, func of two
    assert count_programs(grammar, 3) == [2, 18, 166]


def test_uses_sum_to_the_length_of_a_program_that_has_one_derivation():
    program = draw(random.Random(3), 6)
    uses = expected_uses([program, program, IDENTITY], Grammar.uniform())
    assert sum(uses.values()) == pytest.approx(2 * program.size + 1)
    assert uses["identity"] == 1 + 2 * sum(node.name == "identity" for node in program.nodes())
    assert expected_uses([], Grammar.uniform()) == dict.fromkeys(ARITIES, 0.0)
    flat = estimate([program], Grammar.uniform(), spread=0.0)
    assert {*flat.log_probabilities.values()} == {-math.log(len(ARITIES))}
    none = estimate([], Grammar.uniform(LIBRARY))
    assert [*none.log_probabilities.values()] == pytest.approx([-math.log(13)] * 13)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", 1000.0, 1e-3])
def test_log_probabilities_that_are_none_are_refused(value):
    content = Grammar.uniform().to_dict()
    content["log_probabilities"]["push"] = value
    with pytest.raises(UsageError, match="finite and at most 0, and that of push is"):
        Grammar.from_dict(content)


def test_names_and_templates_of_a_library_that_can_not_be_are_refused():
    with pytest.raises(UsageError, match="a name of its own, which 'push' is not"):
        Grammar.uniform({"push": LIBRARY["grow"]})
    for text in ("#0", "(push #1)", "(func #0 #2)"):
        with pytest.raises(UsageError, match="fn is no template with holes #0, #1"):
            Grammar.uniform({"fn": read(text, HOLES)})
    content = {"log_probabilities": {}, "library": {"fn": "(pusk #0)"}}
    with pytest.raises(UsageError, match="'pusk' is no primitive; did you mean 'push'"):
        Grammar.from_dict(content)


# Libraries


@pytest.mark.parametrize("name", LIBRARY)
def test_rewriting_takes_the_fewest_primitives_that_any_derivation_has(name):
    template, source = LIBRARY[name], random.Random(1)
    grammar = Grammar.uniform({name: template})
    programs = [draw(source, 5) for _ in range(40)]
    programs += [unfold(Program("twice", (each,)), LIBRARY) for each in programs[:8]]
    programs += [template.filled({"#0": each}) for each in programs[:5]]
    programs = [each for each in programs if each.size <= 40]
    shorter = rewrite(programs, name, template)
    for given, found in zip(programs, shorter, strict=True):
        assert unfold(found, {name: template}) == given
        assert found.size == min(len(way) for way in derivations(given, grammar))
    assert any(found != given for given, found in zip(programs, shorter, strict=True))


def test_common_forms_fit_both_and_are_the_most_specific():
    source = random.Random(2)
    programs = [draw(source, 4) for _ in range(80)]
    seen = 0
    for one, other in pairwise(programs):
        form = common_form(one, other, 9)
        if form is None:
            assert one.name != other.name
            continue
        holes = form.match(one), form.match(other)
        assert None not in holes
        assert common_form(other, one, 9) == form
        for hole in holes[0]:
            pair = holes[0][hole], holes[1][hole]
            assert pair[0].name != pair[1].name or pair[0].is_hole
        pairs = [(holes[0][hole], holes[1][hole]) for hole in holes[0]]
        assert len({*pairs}) == len(pairs)  # one hole for equal pairs
        seen += len(pairs) > 0
    assert seen > 5


def test_a_library_pays_or_is_not_learnt():
    once = [parse("(push (pop (move identity)))")]
    assert learn_templates(once) == learn_templates(once, iterations=0)
    assert learn_templates([]).templates == {}
    assert learn_library([]).library == {}
    many = [parse(f"(func {EDGE} (pop {EDGE}))"), parse(f"(move {EDGE})")]
    found = learn_templates(many, iterations=5, max_arity=1)
    costs = found.after + sum(map(cost_of, found.templates.values()))
    assert found.templates
    assert costs < found.before
    assert [unfold(each, found.templates) for each in found.programs] == many
    assert list(found.templates) == [f"fn_{i}" for i in range(len(found.templates))]
    assert all(sum(node.is_hole for node in {*t.nodes()}) <= 1 for t in found.templates.values())
