"""Settings of ``smallfry.export``, for the methods that pass them on."""

from pathlib import Path
from typing import TypedDict


class ExportSettings(TypedDict, total=False):
    """Settings of an export; see ``smallfry.export`` for their meaning and defaults."""

    form: str | None
    precision: str
    checkpoint: str
    torch_program: bool
    license: str | None
    data: str | None
    data_root: Path | None
    submodels: int
    target: str
    pack: bool
