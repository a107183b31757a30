"""Starts a command in several processes on this machine, through torchrun's own machinery.

When one of them dies, the others are ended within seconds; a signal goes to all of them.
"""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from smallfry.errors import TrainingError, UsageError


def run_in_processes(arguments: Sequence[str], processes: int) -> int:
    """Run ``smallfry`` with these arguments in so many processes; the exit code.

    Raises:
        UsageError: Not a number of processes, or one of several was started this way.
        TrainingError: A process was killed.
    """
    if processes < 1:
        raise UsageError(f"--processes must be at least 1, got {processes}")
    if "RANK" in os.environ:
        raise UsageError(
            "torchrun has started several processes already: leave --processes out there"
        )
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="smallfry",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(settings, sys.executable)("-m", "smallfry.cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise TrainingError(
                f"process {rank} of {processes} was killed by signal {-failure.exitcode}, and the "
                "others were ended; the last checkpoint is kept: go on with --resume"
            ) from None
        return int(failure.exitcode)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0
