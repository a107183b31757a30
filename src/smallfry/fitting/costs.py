"""Cost of a candidate before it is trained: size and latency of its exported, untrained model.

Weights change neither, so figures are kept in the user's cache folder, by model, image size,
classes, machine and versions.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from smallfry.costing import macs
from smallfry.data import ImageData
from smallfry.data.cache import cache_folder
from smallfry.data.fingerprint import digest
from smallfry.deploy.export import export_precisions
from smallfry.deploy.latency import take_turns
from smallfry.deploy.pretrained import gather
from smallfry.deploy.targets import Target
from smallfry.fitting.zoo import Entry
from smallfry.io.replace import write_whole
from smallfry.training.augment import Normalize
from smallfry.training.config import ModelConfig
from smallfry.training.model_source import create_model
from smallfry.training.provenance import provenance
from smallfry.training.run import TrainedModel
from smallfry_runtime.runtime import Runtime

FORMAT = 2  # changes whenever what is measured does
FOLDER = "fit"  # in the user's cache folder
PRECISIONS = ("float32", "int8")
ROUNDS, SECONDS = 40, 0.2  # of timed calls
LIBRARIES = ("smallfry", "torch", "timm")
JITTER = 0.01  # added to weights, as equal constants would be stored once


@dataclass(frozen=True)
class Costs:
    """Costs of a model.

    Args:
        parameters: Unique parameters.
        macs: Multiply-accumulates for one image.
        kb: Size of the export by precision, in kB of 1,000 bytes.
        ms: CPU milliseconds for one image on one core, by precision.
    """

    parameters: int
    macs: int
    kb: Mapping[str, float]
    ms: Mapping[str, float]

    @property
    def overhead_kb(self) -> float:
        """Size of the int8 export beside its weights."""
        return max(0.0, self.kb["int8"] - self.parameters / 1000)

    @property
    def four_bit_kb(self) -> float:
        """Estimated size with weights of four bits."""
        return self.overhead_kb + self.parameters / 2000


def build(entry: Entry, data: ImageData) -> TrainedModel:
    """Build an untrained candidate with the data's classes and image size.

    Raises:
        UsageError: It can't be built for these images.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ModelConfig(entry.model, options=dict(entry.options))
        model, spec = create_model(config, data)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(JITTER * torch.randn_like(parameter))
    manifest = {
        "model": spec.to_dict(),
        "task": "classification",
        "classes": list(data.classes),
        "input": {
            "size": data.image_size,
            **({} if data.resize == "crop" else {"resize": data.resize}),
            "channels": data.channels,
            "mean": list(data.mean),
            "std": list(data.std),
            "bit_depth": data.bit_depth,
        },
        "data": {"name": "unknown", "fingerprint": "unknown"},
    }
    normalize = Normalize(data.mean, data.std)
    shape = (data.classes, data.image_size, data.channels)
    return TrainedModel(model.eval(), *shape, normalize, manifest, data.bit_depth)


def rough_costs(model: nn.Module, data: ImageData) -> tuple[int, int]:
    """Return parameters and multiply-accumulates of a model, which take no export."""
    image = torch.zeros(1, *data.input_shape)
    return sum(p.numel() for p in model.parameters()), macs(model, image)


def measure_costs(entry: Entry, data: ImageData, target: Target) -> Costs:
    """Measure a candidate, or read what was measured of it on this machine.

    Raises:
        SmallfryError: It can't be built or exported.
    """
    file = cache_folder() / FOLDER / f"{_key(entry, data, target)}.json"
    known = _read(file)
    if known is not None:
        return known
    trained = build(entry, data)
    facts = gather(trained, "best")[1]
    kb, ms = {}, {}
    with TemporaryDirectory() as place:
        folders = {precision: Path(place) / precision for precision in PRECISIONS}
        export_precisions(trained, facts, folders, data, target.name)
        for precision, folder in folders.items():
            answering = Runtime(folder, threads=1)
            kb[precision] = answering.file_bytes / 1000
            ms[precision] = latency(answering, data)
    costs = Costs(*rough_costs(trained.model, data), kb, ms)
    with suppress(OSError):  # without a place for it, it is measured again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(asdict(costs), indent=1).encode())
    return costs


def latency(answering: Runtime, data: ImageData, threshold: float | None = None) -> float:
    """Measure the CPU milliseconds of one image, from pixels to probabilities.

    CPU time of the process, which is the time on the clock of an idle core. A quarter of the calls
    takes less: others that share caches or a core's units only add to it.
    """
    pixels = np.zeros((1, *data.input_shape), np.uint8)
    call = partial(answering.predict, pixels, threshold=threshold)
    taken = take_turns({"model": call}, SECONDS, ROUNDS, clock=time.process_time)
    return taken["model"].low


@contextmanager
def without_details() -> Iterator[None]:
    """Leave the messages of exports out of the log; warnings stay."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _key(entry: Entry, data: ImageData, target: Target) -> str:
    parts: Mapping[str, Any] = {
        "format": FORMAT,
        "model": entry.model,
        "options": entry.options,
        "images": [data.channels, data.image_size, len(data.classes)],
        "target": target.name,
        "machine": str(provenance(torch.device("cpu"))["device"]).partition(",")[0],
        "versions": {name: _version(name) for name in (*LIBRARIES, *target.packages)},
    }
    return digest(json.dumps(parts, sort_keys=True))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # in another distribution, as of a processor
        return ""


def _read(file: Path) -> Costs | None:
    """Read cached costs; None if there are none, or not of this form."""
    try:
        content = json.loads(file.read_text())
        found = Costs(**content)
        numbers = [found.parameters, found.macs, *found.kb.values(), *found.ms.values()]
        complete = {*found.kb} == {*found.ms} == {*PRECISIONS}
        return found if complete and all(number > 0 for number in numbers) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
