"""TensorBoard event files, a copy of ``metrics.csv`` whose faults never stop a run."""

import threading
import warnings
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from smallfry.errors import SmallfryWarning

WRITERS = "_AsyncWriterThread"  # of TensorBoard, each of which writes a file


class EventWriter:
    """Writer of scalars that turns a full disk or a missing folder into a warning.

    Args:
        folder: Folder of TensorBoard's files.
        first: The first step that will be written; later ones that stand there are not shown.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder, self.failed = folder, False
        _keep_quiet()
        self.writer = SummaryWriter(str(folder), purge_step=first)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a number, unless writing has failed."""
        if self.failed:
            return
        try:
            self.writer.add_scalar(name, value, step)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Flush and close the file."""
        try:
            self.writer.close()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            warnings.warn(f"{self.folder}: not written ({error})", SmallfryWarning, stacklevel=4)
        self.failed = True


def _keep_quiet() -> None:
    """Silence tracebacks of TensorBoard's threads, whose errors reappear in the next write."""
    shown = threading.excepthook
    if getattr(shown, "quiet", False):
        return

    def show(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != WRITERS:
            shown(arguments)

    show.quiet = True  # type: ignore[attr-defined]
    threading.excepthook = show
