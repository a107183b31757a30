"""Record of the campaign: kept while it runs, and published at the end."""

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from campaign.trials import Part, Verdict
from smallfry.training.provenance import provenance

LIBRARIES = ("pillow", "safetensors", "jsonargparse", "PyYAML", "onnxruntime")
MOST_FAILURES = 50  # that are written out
MOST_KINDS = 30  # that a table on the page has


@dataclass
class Record:
    """Findings of one part."""

    done: int = 0
    seconds: float = 0.0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and what came of it
    failed: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)

    def add(self, number: int, verdict: Verdict) -> None:
        """Add a trial."""
        self.done += 1
        self.counts[verdict.kind, verdict.said] += 1
        if verdict.failure is not None:
            self.failed += 1
            if len(self.failures) < MOST_FAILURES:
                self.failures.append({"trial": number, **verdict._asdict()})

    def goes_on(self, now: dict[str, Any]) -> None:
        """Continue with this code on this machine; the commits of all trials are recorded."""
        commits = str(self.evidence.get("commit", "")).split(", ") if self.evidence else []
        told = [*commits, *({now["commit"]} - {*commits})]
        self.evidence = now | {"commit": ", ".join(map(str, told))}

    def save(self, file: Path) -> None:
        """Save the record, from which the next start continues."""
        part = file.with_suffix(".part")
        part.write_text(json.dumps(self.told(), indent=1))
        os.replace(part, file)

    def told(self) -> dict[str, Any]:
        """Convert to JSON values."""
        counts = [[*key, count] for key, count in sorted(self.counts.items())]
        return {**vars(self), "seconds": round(self.seconds, 1), "counts": counts}

    @staticmethod
    def load(file: Path) -> "Record":
        """Load the saved record, or an empty one."""
        if not file.exists():
            return Record()
        told = json.loads(file.read_text())
        counts = Counter({(kind, said): count for kind, said, count in told.pop("counts")})
        return Record(**told, counts=counts)


def evidence() -> dict[str, Any]:
    """Describe versions, machine and time, without local paths."""
    told = provenance(torch.device("cpu"))
    told["command"] = "python -m campaign"
    versions: Any = told["versions"]
    told["versions"] = {**versions, **{name: version(name) for name in LIBRARIES}}
    told["system"] = platform.system()
    told["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return told


def write_results(
    parts: Sequence[Part], records: Mapping[str, Record], soaked: Mapping[str, Any], file: Path
) -> None:
    """Write the figures as JSON, including those of the last soak."""
    said = {
        part.name: {"promise": part.promise, **records[part.name].told()}
        for part in parts
        if part.name in records
    }
    earlier = json.loads(file.read_text()).get("soak") if file.exists() else None
    soak = dict(soaked) or earlier  # hours that need no repeating with every other part
    told = {"measured": said, **({"soak": soak} if soak else {})}
    file.write_text(json.dumps(told, indent=1) + "\n")


def write_page(file: Path, subject: str, table: str) -> None:
    """Insert a table into the page, between its marks."""
    text = file.read_text()
    begin, end = f"<!-- {subject} -->", f"<!-- end of {subject} -->"
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    file.write_text(f"{head}\n{table}\n{tail}")


def tables(parts: Sequence[Part], records: Mapping[str, Record]) -> str:
    """Format the findings of each part in Markdown."""
    lines = ["| part | trials | failed | minutes |", "|---|---:|---:|---:|"]
    known = [(part, records[part.name]) for part in parts if part.name in records]
    for part, record in known:
        minutes = record.seconds / 60
        lines.append(f"| {part.name} | {record.done:,} | {record.failed} | {minutes:.1f} |")
    for part, record in known:
        lines += ["", f"**{part.name}**: {part.promise}.", "", "| fault | outcome | trials |"]
        lines.append("|---|---|---:|")
        counts = record.counts
        if len(counts) > MOST_KINDS:  # results/campaign.json has them all
            counts = Counter[tuple[str, str]]()
            for (_, said), count in record.counts.items():
                counts["all kinds", said] += count
        for (kind, said), count in sorted(counts.items()):
            lines.append(f"| {kind or '–'} | {said} | {count:,} |")
    return "\n".join(lines)
