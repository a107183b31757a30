"""Train a list of runs in parallel, and keep the important files of each.

    python benchmarks/runs.py LIST.yaml --out results/fast --root DIR
    python benchmarks/runs.py LIST.yaml --out OUT --at-once 8 --seconds 300 --set device=cuda

A list names runs: each has a recipe, settings that differ from it, and seeds. Runs are taken in the
order of the list. A run that was stopped goes on where it was, one that has ended is left alone, so
the same command continues an interrupted list. Run folders are under ``--runs``; configuration,
metrics and summary are copied to ``--out``, with the best weights of the first seed of runs with
``keep``.

    - name: loopnet_2m
      recipe: recipes/fast/loopnet_2m_cifar10.yaml
      seeds: [0, 1, 2]
      settings: {epochs: 18, optimizer.lr: 0.5}
      keep: true

An entry may have a command instead of recipe and settings, which must itself go on where it was
stopped. ``{root}``, ``{runs}``, ``{out}`` and ``{seed}`` in it are replaced; it has ended when it
returns 0.

    - name: prune_70k
      command: python benchmarks/prune.py --root {root} --runs {runs} --out {out}/prune.json
"""

import argparse
import json
import math
import multiprocessing as mp
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
KEPT = ("config.yaml", "metrics.csv", "summary.json")
KEYS = {"name", "recipe", "command", "seeds", "settings", "keep", "decides"}
WEIGHTS = ("best/manifest.json", "best/model.safetensors")
GRACE = 8.0  # seconds for a run to save its state


class Run(NamedTuple):
    """Run in the list: a recipe with settings, or a command."""

    name: str
    recipe: Path | None
    settings: dict[str, Any]  # by dotted name
    keep: bool
    command: str | None = None


def read_list(file: Path, chosen: list[str], more: dict[str, Any]) -> list[Run]:
    """List the runs of a file, one for each seed, optionally only those of some names (``a_*``)."""
    runs = []
    for entry in yaml.safe_load(file.read_text()):
        unknown = set(entry) - KEYS
        if unknown:
            raise SystemExit(f"{file}: {entry.get('name')}: unknown {', '.join(sorted(unknown))}")
        if ("recipe" in entry) == ("command" in entry):
            raise SystemExit(f"{file}: {entry.get('name')} needs either a recipe or a command")
        if chosen and not any(fnmatchcase(entry["name"], pattern) for pattern in chosen):
            continue
        for seed in entry.get("seeds", [0]):
            settings = {**entry.get("settings", {}), "seed": seed, **more}
            recipe = ROOT / entry["recipe"] if "recipe" in entry else None
            name = f"{entry['name']}-seed{seed}"
            keep = entry.get("keep", False) and seed == entry.get("seeds", [0])[0]
            runs.append(Run(name, recipe, settings, keep, entry.get("command")))
    return runs


def train_one(run: Run, folder: Path, out: Path, root: Path | None) -> str:
    """Train or resume a run, and return its outcome."""
    from smallfry.errors import SmallfryError, Stopped
    from smallfry.training.config import read_config
    from smallfry.training.continuation import with_changes
    from smallfry.training.run import RunFolder
    from smallfry.training.train import resume, train

    assert run.recipe is not None
    began = time.monotonic()
    try:
        if (folder / "config.yaml").is_file():
            summary = resume(folder)
        else:
            config = with_changes(read_config(run.recipe), run.settings)
            data = config.data if root is None else replace(config.data, root=root)
            summary = train(replace(config, data=data, run=folder, references=False))
    except Stopped as error:
        print(f"{run.name}: {error}", flush=True)
        raise SystemExit(0) from None  # this process was asked to end
    except SmallfryError as error:
        return f"{type(error).__name__}: {error}"
    measured = summary["measured"]
    into = out / run.name
    for name in (*KEPT, *(WEIGHTS if run.keep else ())):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, into / name)
    figures = {key: measured[key]["accuracy"] for key in ("test", "test_flips") if key in measured}
    history = RunFolder(folder).read_metrics()
    figures |= {"last validation": history[-1].get("validation_accuracy", math.nan)}
    shown = ", ".join(f"{key} {100 * value:.2f} %" for key, value in figures.items())
    return f"{shown}, {measured['training_seconds']:.0f} s, {time.monotonic() - began:.0f} s in all"


def call(run: Run, runs: Path, out: Path, root: Path | None) -> str:
    """Run a command, with its output in OUT/NAME.txt, and return its outcome."""
    assert run.command is not None
    values = {"root": root, "runs": runs / run.name, "out": out, "seed": run.settings["seed"]}
    words = [sys.executable if word == "python" else word for word in shlex.split(run.command)]
    words = [word.format(**values) for word in words]
    file = out / f"{run.name}.txt"
    began = time.monotonic()
    before = signal.signal(signal.SIGTERM, _stop)
    with file.open("a") as log:
        child = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT)
        try:
            child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise SystemExit(0) from None  # this process was asked to end
        finally:
            signal.signal(signal.SIGTERM, before)
    seconds = time.monotonic() - began
    if child.returncode:
        return f"failed with exit code {child.returncode} after {seconds:.0f} s: see {file.name}"
    (out / run.name).mkdir(exist_ok=True)
    record = {"command": run.command, "seed": run.settings["seed"], "seconds": round(seconds, 1)}
    (out / run.name / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    return f"{seconds:.0f} s"


def work(jobs: Any, said: Any, runs: Path, out: Path, root: Path | None) -> None:
    """Train runs from the queue until it is empty, in a worker process."""
    while True:
        try:
            run = jobs.get_nowait()
        except queue.Empty:
            return
        try:
            if run.command is not None:
                how = call(run, runs, out, root)
            else:
                how = train_one(run, runs / run.name, out, root)
        except Exception:
            traceback.print_exc()
            how = f"failed: {traceback.format_exc().strip().splitlines()[-1]}"
        said.put((run.name, how))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("list", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is kept")
    parser.add_argument("--root", type=Path, help="folder of the data set's files")
    parser.add_argument("--runs", type=Path, help="run folders; default OUT/runs")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="stop then; the same command goes on")
    parser.add_argument("--only", nargs="+", default=[], help="names in the list, also as a_*")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all runs: NAME=VALUE")
    given = parser.parse_args()
    more = {k: yaml.safe_load(v) for k, v in (pair.split("=", 1) for pair in given.set)}
    runs = read_list(given.list, given.only, more)
    given.out = given.out.resolve()  # commands run in this repository's folder
    given.root = None if given.root is None else given.root.resolve()
    folder = (given.runs or given.out / "runs").resolve()
    context = mp.get_context("spawn")
    jobs, said = context.Queue(), context.Queue()
    left = [run for run in runs if not (given.out / run.name / "summary.json").exists()]
    for run in left:
        jobs.put(run)
    os.environ.setdefault("CI", "1")  # no progress bars
    workers = [
        context.Process(target=work, args=(jobs, said, folder, given.out, given.root))
        for _ in range(min(given.at_once, len(left)))
    ]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    results: dict[str, str] = {}

    def listen(seconds: float) -> None:
        try:
            name, how = said.get(timeout=seconds)
        except queue.Empty:
            return
        results[name] = how
        print(f"{time.monotonic() - began:7.1f} s  {name}: {how}", flush=True)
        (given.out / "log.json").write_text(json.dumps(results, indent=1) + "\n")

    given.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        while any(worker.is_alive() for worker in workers):
            listen(0.5)
            if given.seconds is not None and time.monotonic() - began > given.seconds:
                print(f"{given.seconds:.0f} s are over", flush=True)
                break
    except KeyboardInterrupt:
        pass
    finally:
        _end(workers)
        while len(results) < len(left) and not said.empty():
            listen(0.1)
    print(f"{len(results)} of {len(runs)} runs; {len(runs) - len(left)} had ended before")
    return int(len(results) < len(left))


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _end(workers: list[Any]) -> None:
    """Ask runs to save their state, and kill the remaining processes."""
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
    until = time.monotonic() + GRACE
    for worker in workers:
        worker.join(max(0.1, until - time.monotonic()))
        if worker.is_alive():
            worker.kill()


if __name__ == "__main__":
    sys.exit(main())
