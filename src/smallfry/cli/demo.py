"""Watch a trained model recurse, in the browser."""

from dataclasses import dataclass

from smallfry.cli._fields import argument
from smallfry.cli._shared import OneRun


@dataclass(frozen=True, kw_only=True)
class Options(OneRun):
    """Serve a local page that shows each recursion step of the model on a given image or puzzle.

    Args:
        run2: Second run, to compare with the first.
        host: Address to listen on; 0.0.0.0 allows other machines.
        port: Port to listen on; 0 selects a free one.
        open: Open the page in the browser.
    """

    run2: str | None = argument()
    host: str = "127.0.0.1"
    port: int = 7860
    open: bool = False


def run(options: Options) -> int:
    """Serve the page until a signal stops it."""
    from smallfry.demo.serve import serve

    runs = [name for name in (options.run, options.run2) if name is not None]
    serve(runs, options.checkpoint, options.host, options.port, options.open)
    return 0
