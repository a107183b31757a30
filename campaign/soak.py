"""Soak test: hours of training with every optimizer in turn, with flat memory and open files.

``python -m campaign --part soak --minutes 120``. Each optimizer trains in a process of its own, so
that what one leaves is not the other's; a row is written each second.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from campaign.command import command
from campaign.record import evidence
from campaign.runs import of_optimizer, write_config
from campaign.trials import silence
from smallfry.training.config import DataConfig
from smallfry.training.optimization import NATURAL

OPTIMIZERS = ("adamw", "sgd", "lamb", "muon", *NATURAL)
WARM_UP = 0.4  # of the time, in which caches and pools fill
MOST_GROWTH = 8.0  # MiB over what follows, below which the slope is the allocator's noise
MOST_FILES = 2
RESULTS = "soak.json"


class Sample(NamedTuple):
    """Resources of a process at one moment."""

    seconds: float
    megabytes: float  # resident
    files: int  # open


def soak(name: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Train with one optimizer for a time, and measure growth."""
    run = folder / f"soak-{name}"
    shutil.rmtree(run, ignore_errors=True)
    file = folder / f"soak-{name}.yaml"
    settings: dict[str, Any] = {"epochs": 1_000_000, "checkpoint_seconds": 1.0}
    write_config(file, run, optimizer=of_optimizer(name), data=DataConfig(limit=400), **settings)
    child = os.fork()
    if child == 0:
        silence()
        os._exit(command("train", "--config", str(file)).code & 0xFF)
    samples, started = [], time.monotonic()
    while time.monotonic() - started < seconds and not _ended(child):
        samples.append(_sample(child, time.monotonic() - started))
        time.sleep(min(1.0, seconds / 30))
    if not _ended(child):
        os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    rows = (run / "metrics.csv").read_text().count("\n") - 1 if run.exists() else 0
    shutil.rmtree(run, ignore_errors=True)
    return {"code": code, "epochs": rows, **judged(samples)}


def judged(samples: list[Sample]) -> dict[str, Any]:
    """Measure growth after the warm-up by a linear fit."""
    after = samples[int(len(samples) * WARM_UP) :]
    if len(after) < 5:
        return {"flat": False, "why": "too few samples"}
    seconds = np.array([s.seconds for s in after])
    memory = np.array([s.megabytes for s in after])
    span = seconds[-1] - seconds[0]
    growth = float(np.polyfit(seconds, memory, 1)[0] * span)
    files = max(s.files for s in after) - max(s.files for s in samples[: len(after)])
    return {
        "megabytes": round(float(memory.mean()), 1),
        "growth_megabytes": round(growth, 2),
        "over_seconds": round(float(span), 1),
        "files": max(s.files for s in after),
        "more_files": int(files),
        "flat": growth <= MOST_GROWTH and files <= MOST_FILES,
    }


def main(minutes: float, folder: Path, again: bool = False) -> int:
    """Soak every optimizer in turn, print the table and save it; the exit code is 1 on growth."""
    each, file = 60 * minutes / len(OPTIMIZERS), folder / RESULTS
    before = {} if again else load(folder)
    measured = before["measured"] if before.get("minutes") == minutes else {}
    for name in OPTIMIZERS:
        if name in measured:
            continue
        measured[name] = soak(name, each, folder)
        Console().print(name, measured[name], markup=False)
        result = {"minutes": minutes, "measured": measured, "provenance": evidence()}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(part, file)
    _print(measured)
    return 0 if all(found["flat"] and found["code"] == 143 for found in measured.values()) else 1


def load(folder: Path) -> dict[str, Any]:
    """Load the measurements of a soak; empty without one."""
    file = folder / RESULTS
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def as_markdown(result: Mapping[str, Any]) -> str:
    """Format the measurements of a soak as a table."""
    lines = ["| optimizer | epochs | MiB | growth, MiB | in minutes | open files | flat |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|")
    for name, found in result["measured"].items():
        cells = [name, f"{found['epochs']:,}"]
        if "why" in found:
            lines.append(f"| {' | '.join(cells)} | | | | | **{found['why']}** |")
            continue
        cells += [f"{found['megabytes']:.0f}", f"{round(found['growth_megabytes'], 1) + 0.0:+.1f}"]
        cells += [f"{found['over_seconds'] / 60:.1f}", str(found["files"])]
        cells.append("yes" if found["flat"] else "**no**")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _print(measured: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("optimizer", "epochs", "MiB", "growth MiB", "files", "flat", box=None)
    for name, found in measured.items():
        cells = ("epochs", "megabytes", "growth_megabytes", "files", "flat")
        table.add_row(name, *(str(found.get(cell)) for cell in cells))
    Console().print(table)


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _sample(child: int, seconds: float) -> Sample:
    pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Sample(seconds, megabytes, len(os.listdir(f"/proc/{child}/fd")))
