"""Folder of a fit.

fit.json         settings, and the result when it has ended
plan.json        candidates, costs, speeds and epochs
trials.jsonl     every candidate of every rung
exports.jsonl    every verified export
runs/  exports/  run folders, and exports
export/          the chosen export; or nearest/, if none is within the budget
report.html      the page
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallfry.data.named import full_name
from smallfry.errors import RunError, UsageError
from smallfry.fitting.config import FitConfig
from smallfry.io.json import strict
from smallfry.io.replace import write_whole

FIT, PLAN, TRIALS, PAGE = "fit.json", "plan.json", "trials.jsonl", "report.html"
EXPORT, NEAREST = "export", "nearest"
FORMAT = 1


def read_result(config: FitConfig, folder: Path) -> dict[str, Any] | None:
    """Read the result of a fit with these settings; None before its end.

    Raises:
        UsageError: The folder holds a fit with other settings.
        RunError: Its file is damaged.
    """
    file = folder / FIT
    try:
        content = json.loads(file.read_text())
        before, result = content["settings"], content["result"]
        if not isinstance(before, dict) or not isinstance(result, dict | None):
            raise TypeError("expected settings, and a result or null")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: damaged ({error!r}); use another --to") from None
    now, default = config.to_dict(), FitConfig().to_dict()
    if isinstance(name := before.get("data.name"), str):  # of earlier versions, as it was given
        before["data.name"] = full_name(name)
    for name in sorted({*before, *now}):
        was = before.get(name, default.get(name))
        if was != now.get(name):
            raise UsageError(
                f"{folder} holds a fit with {name} {_shown(was)}, not {_shown(now.get(name))}: use "
                "the same settings to continue it, or another --to"
            )
    return result


def write_result(config: FitConfig, folder: Path, result: Mapping[str, Any] | None) -> None:
    """Write the settings, and the result if there is one."""
    content = {"format": FORMAT, "settings": config.to_dict(), "result": result}
    write_whole(folder / FIT, (json.dumps(strict(content), indent=1) + "\n").encode())


def _shown(value: Any) -> Any:
    return "none" if value is None else value
