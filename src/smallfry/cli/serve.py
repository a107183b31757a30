"""Serve an export over HTTP."""

from dataclasses import dataclass, field
from pathlib import Path

from smallfry.cli._shared import EarlyExit
from smallfry_runtime.serving.limits import Limits


@dataclass(frozen=True, kw_only=True)
class Options(EarlyExit):
    """Serve an export over HTTP: images, arrays or texts in, JSON out, without PyTorch.

    Args:
        export: Folder that ``smallfry export`` wrote.
        host: Address to listen on; 0.0.0.0 allows other machines.
        port: Port to listen on; 0 selects a free one.
        threads: CPU threads of the model; default all cores.
        exit_threshold: Exit at this halting probability.
        limits: Limits on requests.
    """

    export: Path
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    exit_threshold: float | None = None
    limits: Limits = field(default_factory=Limits)


def run(options: Options) -> int:
    """Serve until a signal stops it."""
    from smallfry_runtime.runtime import Runtime
    from smallfry_runtime.serving.server import serve

    runtime = Runtime(options.export, options.threads)
    threshold = runtime.exit_threshold(
        options.exit_steps, options.exit_drop, options.exit_threshold
    )
    serve(runtime, options.host, options.port, threshold, options.limits)
    return 0
