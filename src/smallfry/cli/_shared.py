"""Options shared by several verbs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smallfry.cli._fields import option
from smallfry.errors import UsageError
from smallfry.io.json import strict


def json_line(value: Any) -> str:
    """Format a result as JSON on a line, with null for numbers that are not finite."""
    return json.dumps(strict(value), allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """Trained model.

    Args:
        run: Run folder, checkpoint folder, shared folder, or hf_hub:USER/NAME.
        checkpoint: Weights of the best epoch, or of the last step.
    """

    run: str
    checkpoint: Literal["best", "last"] = "best"


@dataclass(frozen=True, kw_only=True)
class AsJson:
    """Output format.

    Args:
        json: Print JSON.
    """

    json: bool = False


@dataclass(frozen=True, kw_only=True)
class OtherData:
    """Data other than the run's own.

    Args:
        name: Data set or folder; its test split is used, or all of it if it has none.
        root: Folder of a named data set.
    """

    name: str | None = None
    root: Path | None = None


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """Early exit from the recursion; these options exclude each other.

    Args:
        exit_drop: Earliest exit with at most this accuracy drop on the validation split, such
            as 0.003.
        exit_steps: Mean number of recursion steps on the validation split; excludes exit_drop.
    """

    exit_drop: float | None = option(metavar="SHARE")
    exit_steps: float | None = option(metavar="MEAN")

    def __post_init__(self) -> None:
        names = [name for name in vars(self) if name.startswith("exit_")]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{given[0]} excludes {given[1]}; use one of them")


@dataclass(frozen=True, kw_only=True)
class Licensed:
    """License of the shared model.

    Args:
        license: License of the weights (SPDX id), such as Apache-2.0; default none.
    """

    license: str | None = None
