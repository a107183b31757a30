"""One part of the campaign, run as far as it is not done yet."""

import time
from collections.abc import Iterator
from pathlib import Path

from campaign.record import Record, evidence
from campaign.trials import Part, run_trials

KEEP_EVERY = 5.0  # seconds


def campaign(part: Part, folder: Path, count: int) -> Iterator[Record]:
    """One part, as far as it is not done; what it has found so far, again and again."""
    file = folder / f"{part.name}.json"
    record = Record.load(file)
    scratch = folder / part.name
    scratch.mkdir(parents=True, exist_ok=True)
    started, before = time.monotonic(), record.seconds
    if record.done < count:
        record.evidence = record.evidence or evidence()
        state = part.prepare(scratch)
        kept = time.monotonic()
        numbers = range(record.done, count)
        for number, verdict in run_trials(part, state, numbers):
            record.add(number, verdict)
            record.seconds = before + time.monotonic() - started
            if time.monotonic() - kept > KEEP_EVERY:
                record.save(file)
                kept = time.monotonic()
            yield record
        record.save(file)
    yield record
