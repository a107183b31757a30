"""Populations of programs: graphs by their form, and searches."""

import random

import numpy as np
import pytest

from smallfry.errors import UsageError
from smallfry.kits.symbolic.interpreter import is_same, run
from smallfry.kits.symbolic.population import Frontiers, find_graphs
from smallfry.kits.symbolic.programs import ARITIES, Program, parse
from smallfry.kits.symbolic.search import ProgramEvolution
from smallfry.search import Trial

EDGE = "(push (add (connect identity)))"


def draw(source, depth):
    """Draw a program, of all primitives."""
    names = list(ARITIES) if depth else ["identity"]
    name = source.choice(names + ["push", "add", "connect", "next_port"] * bool(depth))
    return Program(name, tuple(draw(source, depth - 1) for _ in range(ARITIES[name])))


def test_frontiers_know_graphs_by_their_form():
    found = Frontiers(most=3)
    source, added = random.Random(5), []
    for _ in range(400):
        program = parse(EDGE) if not added else draw(source, 10)
        place = found.add(program)
        if place is not None:
            added.append((place, run(program)))
    for place, graph in added:
        assert is_same(graph, found.graphs[place])
    for i, graph in enumerate(found.graphs):
        assert not any(is_same(graph, other) for other in found.graphs[:i])
        sizes = [program.size for program in found.programs[i]]
        assert sizes == sorted(sizes)
        assert len(sizes) <= 3
    assert len(find_graphs(5, limit=300, rounds=1)) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": 0}, "limit is at least 1, not 0"),
        ({"frontier": -1}, "frontier is at least 1"),
        ({"keep": 1.0}, "keep is above 0 and below 1"),
        ({"keep": float("nan")}, "keep is above 0 and below 1"),
        ({"population": 1}, "keeps a program of 1 at least, not 0.5"),
    ],
)
def test_searches_that_can_not_be_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        ProgramEvolution(**settings)


def test_equal_values_keep_the_order_and_a_failure_is_last():
    search = ProgramEvolution(population=4, rounds=2, limit=3000, keep=0.5)
    first = search.ask(9)
    assert search.ask(9) == []  # awaited
    assert [each["program"] for each in first] == [EDGE]
    search.tell([Trial(first[0], None)])
    second = search.ask(9)
    assert search.state_dict()["population"][0] == EDGE  # one is kept, even a failure
    assert search.history[0]["values"] == [-np.inf]
    search.tell([Trial(each, 1.0) for each in second])
    assert search.ask(9) == []
    if second:
        assert search.history[1]["programs"] == [each["program"] for each in second] + [EDGE]
    assert search.state_dict()["round"] == 2
