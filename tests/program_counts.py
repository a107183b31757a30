"""Numbers of symbolic programs by size, without making them, and their derivations."""

from collections.abc import Sequence
from itertools import chain, product

from smallfry.kits.symbolic.grammar import Grammar


def count_programs(grammar: Grammar, most: int) -> list[int]:
    """Count the programs of 1 to ``most`` primitives, those of a library taken as one."""
    counts = [0] * (most + 1)
    for size in range(1, most + 1):
        for arity in grammar.arities.values():
            counts[size] += _ways(counts, arity, size - 1)
    return counts[1:]


def _ways(counts: Sequence[int], parts: int, size: int) -> int:
    """Count the sequences of so many programs with so many primitives together."""
    row = [1] + [0] * size
    for _ in range(parts):
        row = [sum(row[i] * counts[n - i] for i in range(n)) for n in range(size + 1)]
    return row[size]


def derivations(program, grammar):
    """Yield the primitives of each derivation of a small program, in prefix order."""
    ways = [(program.name, program.parts)]
    for name, template in grammar.library.items():
        if (holes := template.match(program)) is not None:
            ways.append((name, [holes[f"#{i}"] for i in range(len(holes))]))
    for name, parts in ways:
        for below in product(*([*derivations(part, grammar)] for part in parts)):
            yield name, *chain.from_iterable(below)
