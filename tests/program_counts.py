"""Numbers of symbolic programs by size, without making them."""

from collections.abc import Sequence

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
