"""Web server of the demo: host, port, clean shutdown."""

import os
import tempfile
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from smallfry.demo.examples import find_examples
from smallfry.demo.puzzles import find_puzzles, solves_puzzles
from smallfry.deploy.pretrained import load_trained
from smallfry.errors import UsageError
from smallfry.training.run import require_class_answers
from smallfry_runtime.serving.listening import (
    address,
    is_loopback,
    known_hosts,
    listening,
    running,
    until_stopped,
)


def serve(
    runs: Sequence[str],
    checkpoint: str = "best",
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
) -> None:
    """Serve the page of some runs until Ctrl-C or SIGTERM.

    Args:
        runs: Run folders, or checkpoint folders in them.
        checkpoint: ``best`` or ``last``.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        open_browser: Open the page there too.

    Raises:
        ServerError: The port is taken, or the host is none of this machine's.
        RunError: A run that can't be used.
    """
    with serving(runs, checkpoint, host, port) as url, until_stopped() as stop:
        print(f"watch it think: {url}   (Ctrl-C stops)", flush=True)
        if not is_loopback(host):
            print("everyone who can reach this machine can use the page", flush=True)
        if open_browser:
            webbrowser.open(url)
        stop.wait()
    print("stopped", flush=True)


@contextmanager
def serving(
    runs: Sequence[str], checkpoint: str = "best", host: str = "127.0.0.1", port: int = 0
) -> Iterator[str]:
    """Serve the page, and yield its address; see ``serve``."""
    models = [(str(run), load_trained(run, checkpoint)) for run in runs]
    puzzles = [solves_puzzles(trained) for _, trained in models]
    for (run, trained), is_puzzle in zip(models, puzzles, strict=True):
        if not is_puzzle:
            require_class_answers(trained)
        if is_puzzle != puzzles[0]:
            raise UsageError(
                f"of {models[0][0]} and {run}, one solves puzzles and the other classifies images: "
                "compare models of the same task"
            )
    with listening(host, port) as listener, _private_folder():
        from smallfry.demo.application import build_application

        find = find_puzzles if puzzles[0] else find_examples
        examples = find(models[0][1], runs[0])
        with running(build_application(models, examples, known_hosts(host)), listener):
            yield address(listener)


@contextmanager
def _private_folder() -> Iterator[None]:
    """Create a temporary folder for Gradio's files, and disable its telemetry."""
    with tempfile.TemporaryDirectory(prefix="smallfry-demo-") as folder:
        wanted = {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
