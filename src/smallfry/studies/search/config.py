"""Settings of a search: the space, the data, and the budget."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smallfry.errors import UsageError
from smallfry.training.config import DataConfig

MOST_SEED = 2**63
TABLE_NAMES = ("micro_n2n", "micro_nars")  # of smallfry.search, which imports PyTorch
Strategy = Literal["nars", "tpe", "evolution", "random", "n2n"]


@dataclass(frozen=True)
class SearchConfig:
    """Settings of a search.

    Args:
        space: YAML file with settings of smallfry train and choices; or the name of a table of
            trained networks, micro_nars or micro_n2n, which needs no training; or the folder of a
            run, a teacher whose smaller students are the space.
        data: The data set, as for smallfry train; of students, the teacher's.
        strategy: nars learns a predictor of accuracy; tpe is Optuna's sampler; evolution is
            regularised evolution; random draws independently; n2n learns policies that remove and
            shrink the layers of a teacher.
        budget: Candidates to train.
        max_mmac: Most multiply-accumulates of a model for one image, in millions.
        max_parameters: Most parameters of a model.
        student_epochs: Epochs of each student of a teacher.
        policies: File of the policies of another search by n2n, to begin with.
        baseline: Also train as many random candidates, for comparison.
        confirm: Further seeds with which the best three are trained, before one is chosen.
        workers: Processes, each of which trains a candidate.
        engine: local runs the strategy here; optuna runs the strategy tpe or random on a storage
            that several machines share.
        storage: Optuna's storage, such as sqlite:///search.db, or a file NAME.log for its journal.
        seed: Random seed.
    """

    space: str = "micro_nars"
    data: DataConfig = field(default_factory=DataConfig)
    strategy: Strategy = "nars"
    budget: int = 32
    max_mmac: float | None = None
    max_parameters: float | None = None
    student_epochs: int = 5
    policies: Path | None = None
    baseline: bool = False
    confirm: int = 0
    workers: int = 1
    engine: Literal["local", "optuna"] = "local"
    storage: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.space:  # which is the current folder to pathlib
            raise UsageError(
                "space is empty: expected a YAML file, the folder of a run, or one of "
                f"{', '.join(TABLE_NAMES)}"
            )
        for name in ("max_mmac", "max_parameters"):
            given = getattr(self, name)
            if given is not None and not 0 < given < math.inf:
                raise UsageError(f"{name} must be more than 0 and finite, got {given}")
        for name, least in {"budget": 1, "workers": 1, "confirm": 0, "student_epochs": 1}.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < MOST_SEED:
            raise UsageError(f"seed is 0 to below 2**63, got {self.seed}")
        if self.data.validation == 0:
            raise UsageError(
                "a search chooses on validation images: data.validation must be above 0"
            )
        if self.is_table and self.data != DataConfig():
            raise UsageError(
                f"the table {self.space} has its own data: leave out data, or search a space of "
                "your own with --space FILE"
            )
        if self.policies is not None and self.strategy != "n2n":
            raise UsageError(f"policies are of the strategy n2n, not {self.strategy}")
        if (self.engine == "optuna") != (self.storage is not None):
            raise UsageError("engine optuna and storage go together: give both, or neither")
        if self.engine == "optuna" and self.strategy not in ("tpe", "random"):
            raise UsageError(
                f"engine optuna has the strategies tpe and random, not {self.strategy}"
            )

    @property
    def is_table(self) -> bool:
        """True if the space is a table of trained networks."""
        return self.space in TABLE_NAMES
