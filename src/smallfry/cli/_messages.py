"""Exit codes and standard-error messages, printed once for several processes."""

import logging
import os
import sys
from typing import Any, TextIO

from smallfry.errors import shortened
from smallfry.io.terminal import CleanFormatter, printable, say
from smallfry.training.launch_env import rank

FAILED, MISUSED = 1, 2  # exit codes; a run that a signal stopped gives 128 + its number
CHATTY = (
    *("lightning.fabric.utilities.distributed", "lightning.pytorch.utilities.rank_zero"),
    *("datasets", "huggingface_hub"),
)


def complain(error: Exception | str, code: int) -> int:
    """Print an error on one line and return the exit code."""
    program = f"smallfry (process {rank()})" if rank() else "smallfry"
    say(shortened(printable(f"{program}: {error}")), sys.stderr)
    return code


def speak_for_all(message: str) -> None:
    """Print a message in the first process only."""
    if rank() == 0:
        complain(message, 0)


def show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning, in place of ``warnings.showwarning``."""
    if rank() == 0:
        say(f"smallfry: warning: {message}", sys.stderr)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Handler that writes to the current ``sys.stderr``, which callers may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr() -> None:
    """Print smallfry's log, and only errors of other libraries."""
    ours = logging.getLogger("smallfry")
    if not ours.handlers:
        handler = StderrHandler()
        handler.setFormatter(CleanFormatter("smallfry: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hints of DDP, once for each process
    if not sys.stderr.isatty():
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
