"""Exports, shared folders and benchmarks killed while written, beside other files.

The process dies at a random moment, or exactly before its n-th change of a file; sometimes the
place holds an older one of its kind. Then the same command is given again, and must leave what an
undisturbed one does, and nothing else.
"""

import os
import random as randomness
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from campaign import artifacts
from campaign.kills import HANGS, Ended, count_changes, die_before_change, start
from campaign.neighbours import harm, plant
from campaign.trials import Part, Verdict, generator
from smallfry.deploy import benchmark
from smallfry.deploy.benchmark_page import PAGE, PICTURE, SUMMARY
from smallfry.deploy.pretrained import from_pretrained
from smallfry.io import replace
from smallfry_runtime.runtime import Runtime

QUICK = ("--seconds", "0.01", "--batch_sizes", "1")
WAYS = (
    *("SIGKILL before a change of a file",) * 4,
    *("SIGKILL at a random moment", "SIGTERM at a random moment"),
)
STOPPED = (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM)


class Output(NamedTuple):
    """Verb that writes a folder."""

    words: tuple[str, ...]  # of the command, RUN and EXPORT for what there is
    option: str  # before the folder
    names: frozenset[str]
    read: Callable[[Path], object]
    replaces: bool = True


class Undisturbed(NamedTuple):
    """Undisturbed result of a verb."""

    folder: Path
    seconds: float
    changes: int


class Prepared(NamedTuple):
    """Prepared material of the trials."""

    made: artifacts.Artifacts
    undisturbed: dict[str, Undisturbed]


OUTPUTS = {
    "export": Output(
        ("export", "RUN", "--form", "whole"),
        "--to",
        frozenset({"manifest.json", "model.onnx"}),
        lambda folder: Runtime(folder, threads=1),
    ),
    "share": Output(
        ("share", "RUN"),
        "--to",
        frozenset({"config.json", "README.md", "model.safetensors"}),
        from_pretrained,
        replaces=False,
    ),
    "benchmark": Output(
        ("benchmark", "EXPORT", *QUICK),
        "--folder",
        frozenset({PAGE, SUMMARY, PICTURE}),
        lambda folder: (folder / PAGE).read_text(),
    ),
}


def prepare(folder: Path) -> Prepared:
    """Train and export once, and write each output undisturbed."""
    made = artifacts.prepare(folder)
    undisturbed = {}
    for name, output in OUTPUTS.items():
        to, counted = folder / "undisturbed" / name / "x", folder / f"changes {name}"
        shutil.rmtree(to.parent, ignore_errors=True)
        to.parent.mkdir(parents=True)
        began = time.monotonic()
        words = _words(made, output, to)
        ended = start(
            words, lambda to=to, file=counted: _begin(lambda: count_changes(to.parent, file))
        )()
        if ended.code != 0:
            raise RuntimeError(f"the undisturbed {name} failed: {ended}")
        seconds = time.monotonic() - began
        undisturbed[name] = Undisturbed(to, seconds, len(counted.read_text()))
    return Prepared(made, undisturbed)


def trial(prepared: Prepared, number: int) -> Verdict:
    """Kill one output once or twice."""
    random = generator("outputs", number)
    name = list(OUTPUTS)[number % len(OUTPUTS)]
    way = WAYS[number // len(OUTPUTS) % len(WAYS)]
    output, whole = OUTPUTS[name], prepared.undisturbed[name]
    kind = f"{name}, {way}"
    with tempfile.TemporaryDirectory(dir=prepared.made.scratch) as place:
        to = Path(place) / "outputs" / "x"
        before = plant(to)
        if output.replaces and random.random() < 0.6:
            shutil.copytree(whole.folder, to)
            kind += ", over an older one"
        words = _words(prepared.made, output, to)
        by_renames = random.random() < 0.3
        ended = Ended(0, None)
        for _ in range(random.choice((1, 1, 2))):
            ended = _disturb(way, words, to, whole, random, by_renames)
            if ended.code == HANGS or ended.code not in STOPPED:
                return Verdict(kind, "", f"ended with {ended}"[:400])
            if not output.replaces and to.exists():  # killed behind its last rename, or not at all
                return _judge(output, to, before, kind, "whole when it ended")
            if ended.code == 0:
                break
        again = start(words, lambda: _begin(lambda: None, by_renames))()
        if again.code != 0:
            return Verdict(kind, "", f"does not go on: {again}"[:400])
        return _judge(output, to, before, kind, "right answer")


def _judge(output: Output, to: Path, before: dict[str, str], kind: str, said: str) -> Verdict:
    names = {entry.name for entry in to.iterdir()}
    if names != output.names:
        strange = sorted(names ^ output.names)
        return Verdict(kind, said, f"{strange[0]} was taken in, or is missing")
    output.read(to)
    return Verdict(kind, said, harm(to, before))


def _disturb(
    way: str,
    words: list[str],
    to: Path,
    whole: Undisturbed,
    random: randomness.Random,
    by_renames: bool,
) -> Ended:
    if way.startswith("SIGKILL before"):
        at = random.randrange(whole.changes)
        return start(words, lambda: _begin(lambda: die_before_change(to.parent, at), by_renames))()
    number = signal.SIGKILL if way.startswith("SIGKILL") else signal.SIGTERM
    moment = random.uniform(0.0, 1.1) * whole.seconds
    begun = start(words, lambda: _begin(lambda: None, by_renames))
    return begun(moment, lambda child: os.kill(child, number))


def _words(made: artifacts.Artifacts, output: Output, to: Path) -> list[str]:
    places = {"RUN": str(made.folder / "run"), "EXPORT": str(made.folder / "whole")}
    return [*(places.get(word, word) for word in output.words), output.option, str(to)]


def _begin(do: Callable[[], object], by_renames: bool = False) -> None:
    """Prepare the process of a command."""
    benchmark.measure_memory = lambda *_: None  # type: ignore[assignment]  # takes a process each
    if by_renames:
        replace._renameat2 = lambda: None  # type: ignore[assignment]  # as where there is none
    do()


PART = Part(
    "outputs",
    "neighbouring files are untouched, and the next command ignores leftovers of a killed export, "
    "share or benchmark",
    prepare,
    trial,
    count=300,
    short=3,
    seconds=300,
    alone=True,
)
