"""Programs by the graphs they write: of each graph the shortest ones, and growth by libraries."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from smallfry.errors import UsageError
from smallfry.kits.symbolic.grammar import Grammar, enumerate_programs
from smallfry.kits.symbolic.interpreter import ProgramGraph, is_same, run
from smallfry.kits.symbolic.library import learn_library
from smallfry.kits.symbolic.programs import Program

__all__ = ["FRONTIER", "Frontiers", "find_graphs"]

FRONTIER = 10  # shortest programs of a graph


@dataclass
class Frontiers:
    """Distinct graphs in the order in which they were found, each with its shortest programs.

    The programs of a graph are more than one, as a library is learned from what they share: with
    one program for each of the few first graphs, nothing pays for a primitive with holes.

    Args:
        most: Programs of a graph.
        graphs: The graphs.
        programs: Shortest programs of each, the shortest first.
    """

    most: int = FRONTIER
    graphs: list[ProgramGraph] = field(default_factory=list)
    programs: list[list[Program]] = field(default_factory=list)
    _places: dict[frozenset[frozenset[int]], int] = field(default_factory=dict, repr=False)

    def add(self, program: Program) -> int | None:
        """Execute a program and take it, if its graph is accepted.

        Returns:
            The number of its graph; None if the graph is not accepted, or too large.
        """
        try:
            graph = run(program)
        except UsageError:
            return None
        if not graph.is_accepted:
            return None
        place = self._place(graph)
        held = self.programs[place]
        if program not in held:
            held.append(program)
            held.sort(key=_order)
            del held[self.most :]
        return place

    def corpus(self, places: Iterable[int]) -> list[Program]:
        """Return the programs of some graphs."""
        return [program for place in places for program in self.programs[place]]

    def _place(self, graph: ProgramGraph) -> int:
        key = frozenset(frozenset((edge.one, edge.other)) for edge in graph.edges)
        if key not in self._places:
            known = (i for i, other in enumerate(self.graphs) if is_same(graph, other))
            place = next(known, len(self.graphs))
            if place == len(self.graphs):
                self.graphs.append(graph)
                self.programs.append([])
            self._places[key] = place
        return self._places[key]


def find_graphs(count: int, limit: int = 20_000, rounds: int = 5) -> Sequence[Program]:
    """Find programs of distinct graphs without training any, by enumeration and library learning.

    Args:
        count: Programs wanted.
        limit: Programs to enumerate in a round.
        rounds: Of enumeration; after each, a library is learned from all graphs so far.

    Returns:
        At most ``count`` programs, the shortest of each graph, in the order of finding the graphs.

    Example:
        >>> [str(program) for program in find_graphs(2, limit=500, rounds=1)]
        ['(push (add (connect identity)))']
    """
    found, grammar = Frontiers(), Grammar.uniform()
    for _ in range(rounds):
        for each in enumerate_programs(grammar, limit):
            found.add(each.program)
        if len(found.graphs) >= count:
            break
        grammar = learn_library(found.corpus(range(len(found.graphs))))
    return [programs[0] for programs in found.programs[:count]]


def _order(program: Program) -> tuple[int, str]:
    return program.size, str(program)
