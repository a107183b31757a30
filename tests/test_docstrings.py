"""Docstrings: first lines are index entries, and programs are described without personification."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ["src", "runtime/src", "campaign", "benchmarks"]
EVASIVE = re.compile(r"(What|Whether|How|Who|Whose|Where|Which|When|Why|The way|As)\b")
ARTICLE = re.compile(r"(A|An|The) [a-z]")
NO_VERB = re.compile(r"(A|An|The|True|False|None)\b|[^A-Z]|[A-Z]\b")
PERSONIFIED = re.compile(r"\b(knows|says|tells)\b")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)


def first_lines(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the number and the first line of every docstring, and whether it is a function's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)) is not None:
            acts = isinstance(node, FUNCTIONS) and not any(
                "property" in ast.unparse(each) for each in node.decorator_list
            )
            yield node.body[0].lineno, text.partition("\n")[0], acts


def fault(line: str, acts: bool) -> str | None:
    """Describe the fault of a first line; None if it has none."""
    if EVASIVE.match(line):
        return "begin with the term (class, property, module) or an imperative (function)"
    if acts and NO_VERB.match(line):
        return "begin with an imperative, such as Return or Compute"
    if not acts and ARTICLE.match(line):
        return "begin with the noun, without an article"
    if not line.endswith("."):
        return "end the first line with a period"
    return None


def test_first_lines_of_docstrings_are_index_entries() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line!r}: {reason}"
        for file in files
        for number, line, acts in first_lines(file.read_text(encoding="utf-8"))
        if (reason := fault(line, acts)) is not None
    ]
    assert len(files) > 200
    assert found == []


def test_programs_neither_know_nor_say() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if PERSONIFIED.search(line)
    ]
    assert found == []
    assert PERSONIFIED.search("The message says which.")
    assert not PERSONIFIED.search("essays of foretellers")


def test_faults_are_found() -> None:
    source = '"""What a run holds."""\ndef rate():\n    """Return the rate,\n\n    in Hz."""\n'
    assert [
        (number, fault(line, acts) is not None) for number, line, acts in first_lines(source)
    ] == [
        (1, True),
        (3, True),
    ]
    assert fault("As JSON.", False) is not None
    assert fault("Assignment of blocks to processes.", False) is None
    assert fault("Wherever it lies.", False) is None
    for line in ("The rate.", "M x.", "‖Z‖², a scalar.", "True if it is one."):
        assert fault(line, acts=True) is not None
        assert fault(line, acts=False) is None or line == "The rate."
    assert fault("Rate of a run.", False) is None
    assert fault("A ⊗ G.", acts=False) is None
    assert fault("Apply a matrix.", acts=True) is None
