"""TensorBoard's files of a run, which repeat ``metrics.csv``: no fault of theirs costs the run."""

import threading
import warnings
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from smallfry.errors import SmallfryWarning

WRITERS = "_AsyncWriterThread"  # of TensorBoard, each of which writes a file


class EventWriter:
    """A writer of scalars; a disk that is full, or a folder that is gone, is a warning.

    Args:
        folder: Where TensorBoard's files go.
        first: The first step that will be written; later ones that stand there are not shown.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder, self.failed = folder, False
        _keep_quiet()
        self.writer = SummaryWriter(str(folder), purge_step=first)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a number; nothing once writing has failed."""
        if self.failed:
            return
        try:
            self.writer.add_scalar(name, value, step)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Write what is pending, and close the file."""
        try:
            self.writer.close()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            warnings.warn(f"{self.folder}: not written ({error})", SmallfryWarning, stacklevel=4)
        self.failed = True


def _keep_quiet() -> None:
    """Print no traceback of TensorBoard's threads: they hand their error to who writes next."""
    shown = threading.excepthook
    if getattr(shown, "quiet", False):
        return

    def show(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != WRITERS:
            shown(arguments)

    show.quiet = True  # type: ignore[attr-defined]
    threading.excepthook = show
