"""One part of the campaign, resumed from its record."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from campaign.record import Record, evidence
from campaign.trials import Part, run_trials

KEEP_EVERY = 5.0  # seconds


def campaign(part: Part, folder: Path, count: int) -> Iterator[Record]:
    """Run the rest of one part, and yield its record repeatedly.

    Several parts may run at once, each in a process of its own, with the same folder.
    """
    file = folder / f"{part.name}.json"
    if Record.load(file).done >= count:
        yield Record.load(file)
        return
    with only_here(folder / f"{part.name}.lock"):
        record = Record.load(file)
        scratch = folder / part.name
        scratch.mkdir(parents=True, exist_ok=True)
        started, before = time.monotonic(), record.seconds
        record.goes_on(evidence())
        state = part.prepare(scratch)
        kept = time.monotonic()
        try:
            for number, verdict in run_trials(part, state, range(record.done, count)):
                record.add(number, verdict)
                record.seconds = before + time.monotonic() - started
                if time.monotonic() - kept > KEEP_EVERY:
                    record.save(file)
                    kept = time.monotonic()
                yield record
        finally:  # also when it is interrupted
            record.save(file)
    yield record


@contextmanager
def only_here(file: Path) -> Iterator[None]:
    """Lock a part, since two processes would overwrite each other's record."""
    with open(file, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another process runs the part {file.stem} already") from None
        yield
