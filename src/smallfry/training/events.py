"""TensorBoard event files, a copy of ``metrics.csv`` whose faults never stop a run."""

import itertools
import os
import socket
import time
import warnings
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]
    Event,
    SessionLog,
)
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import scalar

from smallfry.errors import SmallfryWarning

VERSION = "brain.Event:2"  # of the format
_numbers = itertools.count()


class EventWriter:
    """Writer of scalars that turns a full disk or a missing folder into a warning.

    It writes in the calling thread: PyTorch's ``SummaryWriter`` starts another one, and waits for
    it forever where that finds no memory to begin or to go on.

    Args:
        folder: Folder of TensorBoard's files.
        first: The first step that will be written; later ones that stand there are not shown.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder, self.failed = folder, False
        folder.mkdir(parents=True, exist_ok=True)
        source = f"{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{source}"
        self._write(Event(file_version=VERSION))
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a number, unless writing has failed."""
        self._write(Event(step=step, summary=scalar(name, value)))  # type: ignore[no-untyped-call]

    def _write(self, event: Event) -> None:
        if self.failed:
            return
        event.wall_time = time.time()
        try:
            with open(self._path, "ab") as file:  # anew, as its folder may have gone
                RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            warnings.warn(f"{self.folder}: not written ({error})", SmallfryWarning, stacklevel=4)
        self.failed = True
