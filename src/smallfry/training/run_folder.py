"""Run folder: layout, locking, reading and writing.

config.yaml     the whole configuration; ``smallfry train --config`` takes it
metrics.csv     one row per epoch; TensorBoard, in tensorboard/, holds the same numbers
last/  best/    checkpoints, see ``smallfry.training.checkpoint``
summary.json    the result, with all that is needed to get it again
pictures/       what people look at
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from smallfry.errors import RunError
from smallfry.io.replace import sweep
from smallfry.io.terminal import command
from smallfry.training.checkpoint import saved_position, write_file
from smallfry_runtime.files import read_bytes, read_json
from smallfry_runtime.names import text_of
from smallfry_runtime.stages import entries

LOCK, RUN_CONFIG = ".lock", "config.yaml"
FAILURE = "failure.json"  # of a study's run that could not begin
WRITTEN = "expected a folder that smallfry train or compress has written"


class RunFolder:
    """Files of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / RUN_CONFIG
        self.metrics = path / "metrics.csv"
        self.tensorboard = path / "tensorboard"
        self.last = path / "last"
        self.best = path / "best"
        self.summary = path / "summary.json"
        self.pictures = path / "pictures"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for training; the lock of a killed process is released."""
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise RunError(
                f"{self.path}: the folder's name is not UTF-8, and TensorBoard can't write into "
                "it; name another folder"
            ) from None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.path}: another process is training in this folder") from None
        except OSError as error:
            raise RunError(f"{self.path}: can't be used as a run folder ({error})") from error
        try:
            for each in (self.last, self.best, self.pictures, self.tensorboard):
                if each.is_symlink():
                    raise RunError(
                        f"{each}: a link, expected a folder of the run itself; remove the link"
                    )
            for folder in (self.path, self.pictures):
                sweep(folder)
            yield
        finally:
            lock.release()

    def require_free(self) -> None:
        """Require that a new run here would overwrite nothing.

        Raises:
            RunError: There is a run, or something else.
        """
        if self.config.exists():
            raise RunError(
                f"{self.path}: there is a run in this folder already; go on with it "
                f"({command('--resume', self.path)}) or name another folder"
            )
        try:
            # of hidden files the run writes its lock alone
            found = [n for n in entries(self.path) if not n.startswith(".") and n != FAILURE]
        except OSError as error:
            raise RunError(f"{self.path}: can't be used as a run folder ({error})") from error
        if found:
            raise RunError(f"{self.path}: holds {found[0]}, and is no run folder; name another")

    def begin(self, config: Mapping[str, Any]) -> None:
        """Start a new run here; raises as ``require_free``."""
        self.require_free()
        write_file(self.config, yaml.safe_dump(dict(config), sort_keys=False))

    def reopen(self, config: Mapping[str, Any]) -> None:
        """Continue a run with other settings, marked as unfinished.

        The summary goes first: without it, a run that is killed here ends as before.
        """
        self.summary.unlink(missing_ok=True)
        write_file(self.config, yaml.safe_dump(dict(config), sort_keys=False))

    def require(self) -> None:
        """Require a run here."""
        if not self.path.is_dir():
            what = (
                "a file, not a run folder" if self.path.exists() else "there is no such run folder"
            )
            raise RunError(f"{self.path}: {what}; {WRITTEN}")
        if not self.config.is_file():
            raise RunError(f"{self.path}: not a run folder, config.yaml is missing; {WRITTEN}")

    def kept(self) -> str:
        """Describe the saved state of a run that ends now."""
        saved, position = "no step is saved yet", saved_position(self.last)
        if position is not None:
            saved = f"what is saved ends with step {position['step']}"
        again = command("smallfry", "train", "--resume", self.path)
        return f"{saved}; go on with: {again}"

    def write_metrics(self, history: Sequence[Mapping[str, float]]) -> None:
        """Rewrite ``metrics.csv``; columns are those of the rows, in order of appearance."""
        columns = list(dict.fromkeys(key for row in history for key in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_file(self.metrics, text.getvalue())

    def read_metrics(self) -> list[dict[str, float]]:
        """Read the rows of ``metrics.csv``; none before the first epoch has ended."""
        try:
            text = read_bytes(self.metrics).decode()
            return [
                {name: float(value) for name, value in row.items() if value}
                for row in csv.DictReader(io.StringIO(text, newline=""))
            ]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise RunError(f"{self.metrics}: damaged ({error})") from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_file(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """Read ``summary.json``; None while the run has not ended."""
        try:
            summary: dict[str, Any] = read_json(self.summary)
            _require_summary(summary)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise RunError(
                f"{self.summary}: damaged ({error!r}); delete it, then --resume makes it again"
            ) from error
        return summary


def new_run_folder(data: str, model: str) -> Path:
    """Create a new, unique folder under ``runs/``, named after data, model and time.

    Raises:
        RunError: It can't be made.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{text_of(Path(data).name) or 'data'}-{model}-{stamp}"
    path, number = base, 2
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):  # of a run that began in the same second
                path.mkdir()
                return path
            path, number = base.with_name(f"{base.name}-{number}"), number + 1
    except OSError as error:
        raise RunError(f"{path}: can't be used as a run folder ({error})") from error


def _require_summary(summary: Any) -> None:
    """Validate the printed values of a summary."""
    measured = summary["measured"]
    texts = (summary["model"]["name"], summary["run"], measured["select_on"])
    counts = (
        *(measured[name] for name in ("parameters", "best_epoch", "epochs")),
        *(summary["data"][name] for name in ("train", "test")),
    )
    methods = [next(iter(each)) for each in summary.get("methods", [])]
    references = measured["references"]
    is_classifier = summary.get("task", "classification") == "classification"
    scores = ("accuracy", "macro_f1") if is_classifier else measured["test"]
    numbers = (
        *(measured["test"][name] for name in scores),
        *(measured[name] for name in ("macs", "training_seconds")),
        *(reference["test_accuracy"] for reference in references),
    )
    names = (*texts, *methods, *(reference["name"] for reference in references))
    if not all(isinstance(text, str) for text in names):
        raise TypeError("a name must be text")
    if not all(type(count) is int for count in counts):
        raise TypeError("a count must be a number")
    if not all(type(number) in (int, float) for number in numbers):
        raise TypeError("a figure must be a number")
