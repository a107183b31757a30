"""Folder of an analysis: its page, a JSON file for each question, and tables of samples."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smallfry.analysis.question import ALL, Answer, Subject, find_questions
from smallfry.errors import RunError, SmallfryError
from smallfry.io.csv_text import csv_text
from smallfry.io.json import strict
from smallfry.io.replace import replacing, write_whole
from smallfry.report.analysis_page import Section, analysis_page
from smallfry.report.page import write
from smallfry_runtime.stages import entries, obstacle

__all__ = ["PAGE", "ask_all", "write_answers"]

PAGE = "index.html"
MANIFEST = "analysis.json"
KINDS = (".html", ".json", ".csv")


def ask_all(
    subject: Subject, name: str = ALL, progress: Callable[[str], None] = lambda name: None
) -> dict[str, Answer | str]:
    """Ask one or all questions about a model.

    Args:
        subject: The model.
        name: Of a question, or ``all``.
        progress: Called with the name of each question before it is asked.

    Returns:
        Answers by name; among all, the reason instead of an answer where a question does not apply.

    Raises:
        UsageError: The single question is unknown, or does not apply.
    """
    found: dict[str, Answer | str] = {}
    for each, ask in find_questions(name).items():
        progress(each)
        try:
            found[each] = ask(subject)
        except SmallfryError as error:
            if name != ALL:
                raise
            found[each] = f"Not applicable: {error}."
    return found


def write_answers(
    folder: Path, title: str, answers: Mapping[str, Answer | str], facts: Mapping[str, Any]
) -> Path:
    """Write answers into a new folder, or over an earlier analysis, and return the page.

    Raises:
        RunError: The folder holds something else, or can't be written.
    """

    def require_free() -> None:
        ours = [n for n in entries(folder) if Path(n).suffix in KINDS] if folder.is_dir() else ()
        reason = obstacle(folder, "analysis", ours, lambda place: (place / MANIFEST).is_file())
        if reason is not None:
            raise RunError(f"{folder}: {reason}; use another: --to DIR")

    try:
        with replacing(folder, require_free) as new:
            for name, answer in answers.items():
                if isinstance(answer, Answer):
                    _write_answer(new, name, answer)
            obstacles = {name: each for name, each in answers.items() if isinstance(each, str)}
            _write_json(new / MANIFEST, {"facts": facts, "not_applicable": obstacles})
            sections = [_section(name, answer) for name, answer in answers.items()]
            write(new / PAGE, analysis_page(title, sections, facts))
    except OSError as error:
        raise RunError(f"{folder}: the analysis could not be written ({error})") from error
    return folder / PAGE


def _write_answer(folder: Path, name: str, answer: Answer) -> None:
    _write_json(
        folder / f"{name}.json", {"findings": answer.findings, "numbers": dict(answer.numbers)}
    )
    for file, table in answer.samples.items():
        write_whole(folder / f"{file}.csv", csv_text([table.head, *table.rows]).encode())


def _write_json(file: Path, content: Any) -> None:
    write_whole(file, (json.dumps(strict(content), indent=1) + "\n").encode())


def _section(name: str, answer: Answer | str) -> Section:
    if isinstance(answer, str):
        return Section(name.capitalize(), obstacle=answer)
    return Section(answer.title, answer.findings, answer.pictures, answer.tables)
