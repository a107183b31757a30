"""Files of fitted modules: weights as safetensors, and a manifest with settings and hash.

modules.safetensors   weights, θ, delays, assignments, activity
manifest.json         settings, number of places, threshold, silenced neurons, hash of the former
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.numpy

from smallfry.errors import RunError, UsageError
from smallfry.io.replace import replacing
from smallfry.kits.places.modules import ModularSNN, Settings

__all__ = ["load_modules", "save_modules"]

WEIGHTS, MANIFEST = "modules.safetensors", "manifest.json"
FORMAT = 1
ARRAYS = ("weights", "theta", "delays", "assignment", "activity")


def save_modules(modules: ModularSNN, folder: Path) -> None:
    """Write fitted modules into a new or former folder of them, which is replaced as a whole.

    Raises:
        RunError: The folder holds something else, or can't be written.
    """

    def require_ours() -> None:
        others = [] if not folder.exists() else [each.name for each in folder.iterdir()]
        if {*others} - {WEIGHTS, MANIFEST}:
            raise RunError(f"{folder}: holds other files; name a new folder")

    content = safetensors.numpy.save({name: getattr(modules, name) for name in ARRAYS})
    manifest = {
        "format": FORMAT,
        "settings": asdict(modules.settings),
        "places": modules.places,
        "threshold": modules.threshold,
        "silenced": int(modules.silenced.sum()),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    try:
        with replacing(folder, require_ours) as new:
            (new / WEIGHTS).write_bytes(content)
            (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{folder}: the modules could not be written ({error})") from error


def load_modules(folder: Path) -> ModularSNN:
    """Read modules that ``save_modules`` wrote.

    Raises:
        RunError: Missing, damaged, or of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        content = (folder / WEIGHTS).read_bytes()
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise ValueError(f"{WEIGHTS} is not the file that was written")
        modules = ModularSNN(Settings(**manifest["settings"]))
        arrays = safetensors.numpy.load(content)
        for name in ARRAYS:
            setattr(modules, name, arrays[name])
        modules.places, modules.threshold = int(manifest["places"]), int(manifest["threshold"])
        _require_fitting(modules)
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise RunError(f"{folder}: no readable modules ({error!r})") from error
    return modules


def _require_fitting(modules: ModularSNN) -> None:
    """Refuse arrays of other shapes than the settings have, and other numbers of places."""
    count, inputs, neurons = modules.weights.shape
    settings = modules.settings
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(ARRAYS[1:], (count, neurons))
    wanted["delays"] = (count if settings.delays else 0, inputs, neurons)
    others = [name for name, shape in wanted.items() if getattr(modules, name).shape != shape]
    if others or (inputs, neurons) != (settings.side**2, settings.neurons):
        raise ValueError(f"the settings of {MANIFEST} are not those of {WEIGHTS}")
    if modules.places <= modules.assignment.max(initial=-1) or modules.threshold < 0:
        raise ValueError(f"{MANIFEST} has {modules.places} places, threshold {modules.threshold}")
