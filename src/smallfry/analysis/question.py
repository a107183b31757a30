"""Questions about a trained model, and their answers as plain data.

A question is a function of a ``Subject``, registered by its file: a new one is a new module of this
package, and nothing else changes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from smallfry.data import Split
from smallfry.errors import UsageError, nearest
from smallfry.io.plugins import scan
from smallfry.io.registry import add
from smallfry.training.run import TrainedModel

__all__ = [
    "ALL",
    "Answer",
    "Picture",
    "Question",
    "Subject",
    "Table",
    "find_questions",
    "question_names",
    "register_question",
]

ALL = "all"


class Subject(NamedTuple):
    """Trained model, with the images and the other models that questions need.

    Attributes:
        name: Of the model, as it was given.
        trained: The model.
        training: Training images, a seeded draw.
        test: Test images, a seeded draw.
        others: Further versions of the model by name, such as a pruned one.
        corruptions: Names of corruptions, with their severities.
        seed: Of all random choices.
    """

    name: str
    trained: TrainedModel
    training: Split
    test: Split
    others: Mapping[str, TrainedModel]
    corruptions: Sequence[tuple[str, int]]
    seed: int


class Table(NamedTuple):
    """Table of a page."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Picture(NamedTuple):
    """Picture of a page, as PNG bytes or a drawing of SVG elements."""

    title: str
    drawing: bytes | Markup


class Answer(NamedTuple):
    """Answer to a question.

    Attributes:
        title: Of its section.
        findings: Sentences that a reader acts on.
        numbers: All numbers shown, for the JSON file.
        pictures: In order.
        tables: Shown below the pictures.
        samples: Tables with a row for each image, for CSV files, by the file's name.
    """

    title: str
    findings: Sequence[str]
    numbers: Mapping[str, Any]
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    samples: Mapping[str, Table] = {}


Question = Callable[[Subject], Answer]
_QUESTIONS: dict[str, Question] = {}


def register_question(ask: Question) -> Question:
    """Register a question under the name of its module; a decorator.

    Raises:
        UsageError: Another question has the name: each is in a module of its own.
    """
    add(_QUESTIONS, ask.__module__.rpartition(".")[2], ask, "questions")
    return ask


def question_names() -> list[str]:
    """List the names of all questions in alphabetical order."""
    scan(__package__)
    return sorted(_QUESTIONS)


def find_questions(name: str = ALL) -> dict[str, Question]:
    """Find a question by its name, or all of them.

    Raises:
        UsageError: There is none of this name.
    """
    names = question_names()
    if name != ALL and name not in names:
        raise UsageError(f"unknown question '{name}'{nearest(name, [*names, ALL])}")
    return {each: _QUESTIONS[each] for each in (names if name == ALL else [name])}
