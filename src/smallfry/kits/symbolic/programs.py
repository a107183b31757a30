"""Programs as trees: parsing, writing and sizes.

A program is a primitive with the programs it continues with, such as
``(push (add (connect identity)))``. It is plain data: nothing of it is executed by Python.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from smallfry.errors import UsageError, nearest

__all__ = ["ARITIES", "IDENTITY", "MOST_SIZE", "Program", "parse", "unfold"]

ARITIES: Mapping[str, int] = MappingProxyType(
    {
        "identity": 0,
        "next_port": 1,
        "prev_port": 1,
        "move": 1,
        "add": 1,
        "push": 1,
        "pop": 1,
        "connect": 1,
        "func": 2,
        "if_positions_equal": 5,
    }
)
MOST_SIZE = 150  # primitives of a program
MOST_TEXT = 4000  # characters
HOLE = "#"  # of templates: #0, #1, …


@dataclass(frozen=True, slots=True)
class Program:
    """Program, or a template with holes ``#0``, ``#1``.

    Args:
        name: A primitive, a hole, or a primitive of a library.
        parts: The programs it continues with.

    Example:
        >>> program = parse("(push (add (connect identity)))")
        >>> program.size, str(program)
        (4, '(push (add (connect identity)))')
    """

    name: str
    parts: tuple["Program", ...] = ()
    size: int = field(init=False, compare=False)  # primitives and holes
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", 1 + sum(part.size for part in self.parts))
        object.__setattr__(self, "_hash", hash((self.name, self.parts)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        if not self.parts:
            return self.name
        return f"({self.name} {' '.join(map(str, self.parts))})"

    @property
    def is_hole(self) -> bool:
        """True for a hole of a template."""
        return self.name.startswith(HOLE)

    def nodes(self) -> Iterator["Program"]:
        """Yield the program and all its parts, a parent before its parts."""
        yield self
        for part in self.parts:
            yield from part.nodes()

    def filled(self, values: Mapping[str, "Program"]) -> "Program":
        """Return a template with programs in its holes."""
        if self.is_hole:
            return values[self.name]
        if not self.parts:
            return self
        return Program(self.name, tuple(part.filled(values) for part in self.parts))

    def match(self, program: "Program") -> dict[str, "Program"] | None:
        """Return the programs in the holes with which this template is a program; None if none.

        Example:
            >>> template = Program("push", (Program("#0"),))
            >>> str(template.match(parse("(push (pop identity))"))["#0"])
            '(pop identity)'
        """
        found: dict[str, Program] = {}
        return found if _match(self, program, found) else None


IDENTITY = Program("identity")


@lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """Parse an s-expression of primitives.

    Args:
        text: Untrusted.

    Raises:
        UsageError: No program of at most 150 primitives.
    """
    if len(text) > MOST_TEXT:
        raise UsageError(f"a program has at most {MOST_TEXT:,} characters, not {len(text):,}")
    program = read(text, ARITIES)
    if program.size > MOST_SIZE:
        raise UsageError(f"a program has at most {MOST_SIZE} primitives, not {program.size}")
    return program


def read(text: str, arities: Mapping[str, int]) -> Program:
    """Parse an s-expression of given primitives, without a bound of its size.

    Args:
        text: The expression.
        arities: Number of parts by primitive.

    Raises:
        UsageError: It is none.
    """
    open_: list[tuple[str, list[Program]]] = []
    done: list[Program] = []
    words = iter(text.replace("(", " ( ").replace(")", " ) ").split())
    for word in words:
        if done:
            raise _wrong(text, f"'{word}' stands behind the end")
        if word == "(":
            open_.append((_known(next(words, ""), text, arities), []))
            if len(open_) > MOST_SIZE:
                raise _wrong(text, f"it is nested more than {MOST_SIZE} times")
            continue
        if word == ")":
            if not open_:
                raise _wrong(text, "a parenthesis closes nothing")
            found = _node(*open_.pop(), text, arities)
        else:
            found = _node(_known(word, text, arities), [], text, arities)
        (open_[-1][1] if open_ else done).append(found)
    if open_ or not done:
        raise _wrong(text, "a parenthesis is not closed" if open_ else "it is empty")
    return done[0]


def unfold(program: Program, library: Mapping[str, Program]) -> Program:
    """Replace the primitives of a library by their templates.

    Args:
        program: Of base primitives and of the library's.
        library: Templates of base primitives by name.

    Example:
        >>> library = {"loop": read("(push (add (connect #0)))", {**ARITIES, "#0": 0})}
        >>> str(unfold(Program("loop", (IDENTITY,)), library))
        '(push (add (connect identity)))'
    """
    parts = tuple(unfold(part, library) for part in program.parts)
    if program.name not in library:
        return Program(program.name, parts)
    return library[program.name].filled({f"{HOLE}{i}": part for i, part in enumerate(parts)})


def _match(template: Program, program: Program, found: dict[str, Program]) -> bool:
    if template.is_hole:
        return found.setdefault(template.name, program) == program
    if template.name != program.name:
        return False
    return all(_match(t, p, found) for t, p in zip(template.parts, program.parts, strict=True))


def _known(name: str, text: str, arities: Mapping[str, int]) -> str:
    if name not in arities:
        raise _wrong(text, f"'{name[:40]}' is no primitive{nearest(name, arities)}")
    return name


def _node(name: str, parts: list[Program], text: str, arities: Mapping[str, int]) -> Program:
    if len(parts) != arities[name]:
        wanted = arities[name]
        raise _wrong(text, f"{name} continues with {wanted} programs, not {len(parts)}")
    return Program(name, tuple(parts))


def _wrong(text: str, why: str) -> UsageError:
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    example = "(push (add (connect identity)))"
    return UsageError(f"'{shown}' is no program: {why}; a program is, for example, {example}")
