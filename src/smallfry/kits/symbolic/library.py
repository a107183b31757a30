"""Library learning: common parts of programs become primitives.

cost      of programs and library: 100 for each primitive or hole, 1 for each place that is filled,
          which is that of Stitch (Bowers et al., POPL 2023)
template  most specific common form of two parts of programs, with some holes
learn     the template that saves most once all programs are rewritten, again and again

This is a greedy search over the common forms of pairs of parts: not the branch and bound of Stitch,
which may be used in its place if its package is there.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import combinations
from typing import Literal, NamedTuple

from smallfry.errors import UsageError
from smallfry.kits.symbolic.grammar import Grammar, estimate
from smallfry.kits.symbolic.programs import ARITIES, HOLE, Program, read, unfold

__all__ = ["Library", "common_form", "cost_of", "learn_library", "learn_templates", "rewrite"]

PRIMITIVE, PLACE = 100, 1  # costs, as of Stitch
MOST_PARTS = 300  # different parts of programs that are compared in pairs, the most frequent ones
MOST_TRIED = 200  # templates that programs are rewritten with, by a bound of what they save
NAME = "fn_"  # of new primitives, with their number


class Library(NamedTuple):
    """Templates, and programs rewritten with them."""

    templates: Mapping[str, Program]  # of base primitives, by name
    programs: tuple[Program, ...]  # rewritten, in their order
    before: int  # cost of the programs
    after: int  # cost of the rewritten programs, without the library


def learn_library(
    programs: Sequence[Program],
    iterations: int = 3,
    max_arity: int = 2,
    learner: Literal["own", "stitch"] = "own",
) -> Grammar:
    """Learn primitives from common parts of programs, and the probabilities of all.

    Args:
        programs: Of base primitives.
        iterations: New primitives at most.
        max_arity: Most holes of one.
        learner: ``own``, or ``stitch`` with the package stitch-core.

    Raises:
        UsageError: stitch-core is not installed, or another learner.

    Example:
        >>> from smallfry.kits.symbolic.programs import parse
        >>> long = "(push (add (connect (push (add (connect (push (add (connect identity)))))))))"
        >>> str(learn_library([parse(long)]).library["fn_0"])
        '(push (add (connect #0)))'
    """
    if learner == "stitch":
        library = learn_with_stitch(programs, iterations, max_arity)
    elif learner == "own":
        library = learn_templates(programs, iterations, max_arity)
    else:
        raise UsageError(f"learner is own or stitch, not '{learner}'")
    return estimate(programs, Grammar.uniform(library.templates))


def learn_templates(
    programs: Sequence[Program], iterations: int = 3, max_arity: int = 2
) -> Library:
    """Learn templates one after another, each from the programs rewritten with those before.

    Args:
        programs: Of base primitives.
        iterations: Templates at most.
        max_arity: Most holes of one.
    """
    before = sum(map(cost_of, programs))
    rewritten, templates = tuple(programs), dict[str, Program]()
    for number in range(iterations):
        name, least = f"{NAME}{number}", sum(map(cost_of, rewritten))
        chosen: tuple[Program, tuple[Program, ...]] | None = None
        for template, most in _candidates(rewritten, max_arity):
            if chosen is not None and sum(map(cost_of, rewritten)) - most >= least:
                break  # no other can save as much
            shorter = rewrite(rewritten, name, template)
            cost = sum(map(cost_of, shorter)) + cost_of(template)
            if cost < least:
                least, chosen = cost, (template, shorter)
        if chosen is None:
            break
        templates[name], rewritten = unfold(chosen[0], templates), chosen[1]
    return Library(templates, rewritten, before, sum(map(cost_of, rewritten)))


def learn_with_stitch(
    programs: Sequence[Program], iterations: int = 3, max_arity: int = 2
) -> Library:
    """Learn templates by Stitch.

    Raises:
        UsageError: stitch-core is not installed.
    """
    try:
        stitch = import_module("stitch_core")
    except ModuleNotFoundError:
        raise UsageError(
            "the learner stitch needs a package whose licence is not stated in it, so that it is "
            "no part of an extra: pip install stitch-core, or take the learner own"
        ) from None
    texts = [str(program) for program in programs]
    found = stitch.compress(
        texts,
        iterations=iterations,
        max_arity=max_arity,
        threads=1,
        silent=True,
        no_curried_metavars=True,  # holes are programs, not functions of programs
        no_curried_bodies=True,
    )
    arities, templates = {**ARITIES}, dict[str, Program]()
    holes = {f"{HOLE}{i}": 0 for i in range(max_arity)}
    for each in found.abstractions:
        template = unfold(read(each.body, {**arities, **holes}), templates)
        templates[each.name], arities[each.name] = template, each.arity
    rewritten = tuple(read(text, arities) for text in found.rewritten)
    before, after = (sum(map(cost_of, each)) for each in (programs, rewritten))
    return Library(templates, rewritten, before, after)


def cost_of(program: Program) -> int:
    """Compute the cost of a program or a template.

    Example:
        >>> from smallfry.kits.symbolic.programs import parse
        >>> cost_of(parse("(push (add (connect identity)))"))
        403
    """
    return PRIMITIVE * program.size + PLACE * (program.size - 1)


def rewrite(programs: Sequence[Program], name: str, template: Program) -> tuple[Program, ...]:
    """Rewrite programs with a template wherever this makes them shortest.

    Args:
        programs: Of any primitives.
        name: Of the new primitive.
        template: What it stands for.
    """
    known: dict[Program, Program] = {}

    def shortest(program: Program) -> Program:
        if program not in known:
            usual = Program(program.name, tuple(map(shortest, program.parts)))
            holes = template.match(program)
            if holes is not None:
                parts = tuple(shortest(holes[f"{HOLE}{i}"]) for i in range(len(holes)))
                usual = min(Program(name, parts), usual, key=lambda each: each.size)
            known[program] = usual
        return known[program]

    return tuple(map(shortest, programs))


def common_form(one: Program, other: Program, max_arity: int) -> Program | None:
    """Return the most specific template of two programs or templates (Plotkin, 1970).

    Returns:
        With holes numbered from the left; None if it is a hole, or has more than ``max_arity``.

    Example:
        >>> from smallfry.kits.symbolic.programs import parse
        >>> pair = parse("(push (add identity))"), parse("(push (pop identity))")
        >>> str(common_form(*pair, 1))
        '(push #0)'
    """
    holes: dict[tuple[Program, Program], Program] = {}

    def generalised(a: Program, b: Program) -> Program:
        if a.name != b.name or a.is_hole:
            return holes.setdefault((a, b), Program(f"{HOLE}{len(holes)}"))
        return Program(a.name, tuple(map(generalised, a.parts, b.parts)))

    form = generalised(one, other)
    return None if form.is_hole or len(holes) > max_arity else form


def _candidates(programs: Sequence[Program], max_arity: int) -> Iterator[tuple[Program, int]]:
    """Yield templates with a bound of what each saves, the greatest first."""
    uses = Counter(part for program in programs for part in program.nodes())
    frequent = sorted(uses, key=lambda part: (-uses[part] * (part.size - 1), str(part)))
    parts = frequent[:MOST_PARTS]
    forms = dict.fromkeys(part for part in parts if part.size > 1 and uses[part] > 1)
    for one, other in combinations(parts, 2):
        form = common_form(one, other, max_arity) if one.name == other.name else None
        if form is not None:
            forms[form] = None
    bounds = []
    for form in forms:
        saved = sum(count * _saving(form, part) for part, count in uses.items())
        bounds.append((saved - cost_of(form), form))
    bounds.sort(key=lambda pair: (-pair[0], str(pair[1])))
    yield from ((form, saved) for saved, form in bounds[:MOST_TRIED] if saved > 0)


def _saving(form: Program, part: Program) -> int:
    """Compute what writing a part by a form saves; 0 if it has another form."""
    holes = form.match(part)
    if holes is None:
        return 0
    shorter = 1 + sum(program.size for program in holes.values())
    return (PRIMITIVE + PLACE) * (part.size - shorter)
