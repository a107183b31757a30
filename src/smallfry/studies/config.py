"""What a study is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RaceConfig:
    """A race.

    Args:
        problem: curves, mnist, faces, deep_linear, deep_linear_plain or convnet.
        root: Folder of the data; not needed for curves.
        contestants: Who takes part; default all of the study.
        seconds: Of training in each full run.
        seeds: Full runs of everyone with the tuned, and with the default settings.
        tuning_trials: Settings tried for everyone; 0 races the defaults only.
        tuning_seconds: Of training in each of those.
        fisher_seconds: Of the measurement of Fisher errors; 0 leaves it out.
        processes: Trials at a time; default as many as there are cores, 1 on a GPU.
        threads: CPU threads of each.
        device: Such as cpu or cuda.
    """

    problem: str = "curves"
    root: Path | None = None
    contestants: tuple[str, ...] | None = None
    seconds: float = 40.0
    seeds: int = 3
    tuning_trials: int = 8
    tuning_seconds: float = 10.0
    fisher_seconds: float = 60.0
    processes: int | None = None
    threads: int = 1
    device: str = "cpu"


SHORT: Mapping[str, Any] = {
    "seconds": 4.0,
    "seeds": 1,
    "tuning_trials": 2,
    "tuning_seconds": 2.0,
    "fisher_seconds": 8,
}
