"""Weighted grammars of programs: enumeration by description length, and weights by expected use.

A primitive is drawn with its probability at every place of a program, so that the description
length of a program is the sum of −log p over its primitives. A library's primitive stands for a
template; a program of base primitives then has several derivations.

    inside    I(v) = Σ_p θ_p Π I(parts of v under p), over the primitives p that match at v
    expected  uses of p: the posterior probability of p, summed over the places of all programs
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple

from smallfry.errors import UsageError
from smallfry.kits.symbolic.programs import ARITIES, HOLE, MOST_SIZE, Program, read, unfold

__all__ = [
    "Enumerated",
    "Grammar",
    "enumerate_programs",
    "estimate",
    "expected_uses",
    "inside",
]

SPREAD = 0.5  # of log-probabilities at most; the authors' rule is not known in detail
ROUNDS = 5  # of expectation and maximisation
PRIOR = 1.0  # uses of each primitive that are added to those expected
UNIT = 2.0**-40  # nats, of which lengths are whole multiples in an enumeration
WINDOWS = 4  # of an enumeration within the shortest primitive


class Enumerated(NamedTuple):
    """Program with its description length."""

    program: Program  # of base primitives
    length: float  # nats
    written: Program  # with primitives of the library


@dataclass(frozen=True)
class Grammar:
    """Primitives with log-probabilities.

    Args:
        log_probabilities: By primitive, base ones first; default uniform.
        library: Templates of base primitives by name, with holes ``#0``, …, each of them used.

    Raises:
        UsageError: Probabilities that are none or do not sum to 1, primitives without one, or
            templates that are none.

    Example:
        >>> Grammar.uniform().arities["func"]
        2
    """

    log_probabilities: Mapping[str, float]
    library: Mapping[str, Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = {*ARITIES, *self.library}
        if {*self.log_probabilities} != wanted:
            raise UsageError(
                "a grammar has a log-probability for each primitive; the sets differ in "
                f"{', '.join(sorted(wanted ^ {*self.log_probabilities}))}"
            )
        clashes = sorted({*ARITIES} & {*self.library})
        if clashes:
            raise UsageError(
                f"a library's primitive has a name of its own, which '{clashes[0]}' is not"
            )
        for name, value in self.log_probabilities.items():
            if not -math.inf < value <= 0:
                raise UsageError(
                    f"a log-probability is finite and at most 0, and that of {name} is {value}"
                )
        total = math.fsum(map(math.exp, self.log_probabilities.values()))
        if abs(total - 1) > 1e-9:
            raise UsageError(f"the probabilities of a grammar sum to 1, not {total:.6g}")
        for name, template in self.library.items():
            holes = {node.name for node in template.nodes() if node.is_hole}
            if template.is_hole or holes != {f"{HOLE}{i}" for i in range(len(holes))}:
                raise UsageError(f"{name} is no template with holes #0, #1, …: {template}")

    @classmethod
    def uniform(cls, library: Mapping[str, Program] | None = None) -> "Grammar":
        """Create a grammar of equal probabilities."""
        names = [*ARITIES, *(library or {})]
        return cls(dict.fromkeys(names, -math.log(len(names))), library or {})

    @property
    def primitives(self) -> tuple[str, ...]:
        """Names of the primitives."""
        return tuple(self.log_probabilities)

    @cached_property
    def arities(self) -> Mapping[str, int]:
        """Number of parts by primitive."""
        holes = {
            name: len({node.name for node in template.nodes() if node.is_hole})
            for name, template in self.library.items()
        }
        return {**ARITIES, **holes}

    @cached_property
    def templates(self) -> Mapping[str, Program]:
        """Template by primitive, of base primitives too."""
        base = {
            name: Program(name, tuple(Program(f"{HOLE}{i}") for i in range(arity)))
            for name, arity in ARITIES.items()
        }
        return {**base, **self.library}

    @cached_property
    def units(self) -> Mapping[str, int]:
        """Description length by primitive, in units."""
        return {
            name: max(1, round(-value / UNIT)) for name, value in self.log_probabilities.items()
        }

    def to_dict(self) -> dict[str, object]:
        """Convert to plain data."""
        library = {name: str(template) for name, template in self.library.items()}
        return {"log_probabilities": dict(self.log_probabilities), "library": library}

    @classmethod
    def from_dict(cls, content: Mapping[str, Mapping[str, object]]) -> "Grammar":
        """Create a grammar from untrusted plain data.

        Raises:
            UsageError: It is none.
        """
        holes = {f"{HOLE}{i}": 0 for i in range(MOST_SIZE)}
        try:
            library = {
                str(name): read(str(text), {**ARITIES, **holes})
                for name, text in content["library"].items()
            }
            logs = {str(k): float(str(v)) for k, v in content["log_probabilities"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"a grammar has the entries log_probabilities and library ({error!r})"
            ) from error
        return cls(logs, library)


def enumerate_programs(
    grammar: Grammar, limit: int, most_size: int = MOST_SIZE
) -> Iterator[Enumerated]:
    """Yield programs by ascending description length, equal lengths in a fixed order.

    Programs of a library that unfold to one that came before are left out. Programs are built from
    shorter ones, window by window of lengths, each of which is sorted.

    Args:
        grammar: The grammar.
        limit: Programs at most.
        most_size: Base primitives of a program.

    Example:
        >>> [str(each.program) for each in enumerate_programs(Grammar.uniform(), 3)]
        ['identity', '(next_port identity)', '(prev_port identity)']
    """
    unit = grammar.units
    least = min(unit[name] for name, arity in grammar.arities.items() if not arity)
    width = max(1, min(unit.values()) // WINDOWS)
    shorter = _Shorter([], [], least)
    seen: set[Program] = set()
    found, low = 0, 0
    while found < limit and low <= most_size * max(unit.values()):
        new = [
            (unit[name] + cost, Program(name, parts))
            for name, arity in grammar.arities.items()
            for cost, parts in shorter.combinations(
                arity, low - unit[name], low + width - unit[name]
            )
        ]
        new.sort(key=itemgetter(0))  # stable: equal lengths stay in the order of making
        shorter.costs.extend(cost for cost, _ in new)
        shorter.programs.extend(program for _, program in new)
        for cost, written in new:
            program = unfold(written, grammar.library) if grammar.library else written
            if program.size > most_size or (grammar.library and program in seen):
                continue
            seen.add(program)
            found += 1
            yield Enumerated(program, cost * UNIT, written)
            if found == limit:
                return
        low += width


class _Shorter(NamedTuple):
    """Programs by ascending length, in units."""

    costs: list[int]
    programs: list[Program]
    least: int  # of any program

    def combinations(
        self, count: int, low: int, high: int
    ) -> Iterator[tuple[int, tuple[Program, ...]]]:
        """Yield so many programs with a length of ``low`` to below ``high`` together."""
        if count == 0:
            if low <= 0 < high:
                yield 0, ()
            return
        if count == 1:
            start, end = bisect_left(self.costs, low), bisect_left(self.costs, high)
            for place in range(start, end):
                yield self.costs[place], (self.programs[place],)
            return
        for place in range(bisect_left(self.costs, high - (count - 1) * self.least)):
            cost = self.costs[place]
            for more, rest in self.combinations(count - 1, low - cost, high - cost):
                yield cost + more, (self.programs[place], *rest)


def inside(program: Program, grammar: Grammar, known: dict[Program, float] | None = None) -> float:
    """Compute the probability of a program of base primitives, over all derivations.

    Args:
        program: The program.
        grammar: The grammar.
        known: Probabilities of programs, to which those of its parts are added.
    """
    known = {} if known is None else known
    if program not in known:
        known[program] = math.fsum(
            math.exp(grammar.log_probabilities[name])
            * math.prod(inside(part, grammar, known) for part in parts)
            for name, parts in _matches(program, grammar)
        )
    return known[program]


def expected_uses(programs: Iterable[Program], grammar: Grammar) -> dict[str, float]:
    """Compute the expected uses of each primitive in derivations of programs.

    Args:
        programs: Of base primitives, each of the same weight.
        grammar: Gives the probability of a derivation.
    """
    uses = dict.fromkeys(grammar.primitives, 0.0)
    known: dict[Program, float] = {}
    weights: dict[Program, float] = defaultdict(float)
    for program in programs:
        weights[program] += 1.0
    # larger programs first: a part gets its whole weight before it passes it on
    by_size: dict[int, list[Program]] = defaultdict(list)
    for program in weights:
        by_size[program.size].append(program)
    while by_size:
        for program in by_size.pop(max(by_size)):
            total, weight = inside(program, grammar, known), weights[program]
            for name, parts in _matches(program, grammar):
                share = math.exp(grammar.log_probabilities[name]) * math.prod(
                    known[part] for part in parts
                )
                share *= weight / total
                uses[name] += share
                for part in parts:
                    if part not in weights:
                        by_size[part.size].append(part)
                    weights[part] += share
    return uses


def estimate(programs: Sequence[Program], grammar: Grammar, spread: float = SPREAD) -> Grammar:
    """Estimate the probabilities of primitives from their expected use.

    Expectation and maximisation, with one use of each primitive added; then log-probabilities are
    drawn together until they spread by no more than ``spread``.

    Args:
        programs: Of base primitives.
        grammar: The first guess.
        spread: Largest difference of log-probabilities.

    Example:
        >>> from smallfry.kits.symbolic.programs import parse
        >>> found = estimate([parse("(push (add (connect identity)))")], Grammar.uniform())
        >>> found.log_probabilities["push"] > found.log_probabilities["pop"]
        True
    """
    found = grammar
    for _ in range(ROUNDS):
        uses = expected_uses(programs, found)
        logs = {name: math.log(count + PRIOR) for name, count in uses.items()}
        found = Grammar(_normalised(logs), grammar.library)
    logs = dict(found.log_probabilities)
    range_ = max(logs.values()) - min(logs.values())
    if range_ > spread:
        logs = {name: value * spread / range_ for name, value in logs.items()}
    return Grammar(_normalised(logs), grammar.library)


def _matches(program: Program, grammar: Grammar) -> Iterator[tuple[str, tuple[Program, ...]]]:
    """Yield the primitives that a program may begin with, and what is left in their holes."""
    yield program.name, program.parts
    for name, template in grammar.library.items():
        holes = template.match(program)
        if holes is not None:
            yield name, tuple(holes[f"{HOLE}{i}"] for i in range(len(holes)))


def _normalised(logs: Mapping[str, float]) -> dict[str, float]:
    total = math.log(math.fsum(map(math.exp, logs.values())))
    return {name: value - total for name, value in logs.items()}
