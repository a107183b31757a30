"""Shared settings, record and data of the parts of benchmarks/gpu.py."""

import argparse
import functools
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu import write

from smallfry.data import ImageData, Split
from smallfry.training import train as training
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import DataConfig, ModelConfig, TrainConfig, read_config
from smallfry.training.evaluation_data import load_config_data
from smallfry.training.loop import Trainer
from smallfry.training.model_source import ModelSource
from smallfry.training.own_code import OwnCode
from smallfry.training.processes import start
from smallfry.training.progress import QuietReporter, Reporter
from smallfry.training.run import RunFolder

HERE = Path(__file__).parents[1]
RECIPES = HERE / "recipes"
TINY = {"embed_dim": 32, "num_heads": 2, "mlp_hidden_dim": 32, "depth": 1, "latent_steps": 1}
LONGEST = 6000  # characters of an error


class Settings(NamedTuple):
    """Settings of a part."""

    part: str
    until: float  # by time.time()
    file: Path
    scratch: Path
    device: str
    root: Path | None
    rehearse: bool
    eager: bool
    model: str | None
    check: str | None

    @property
    def left(self) -> float:
        """Seconds left to the part."""
        return self.until - time.time()


def read_settings() -> Settings:
    """Parse the settings of a part; a rehearsal compiles without Inductor."""
    parser = argparse.ArgumentParser(description="A part of benchmarks/gpu.py, which starts it.")
    parser.add_argument("part")
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--check")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    settings = Settings(**vars(parser.parse_args()))
    if settings.rehearse:
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    return settings


class Record:
    """Figures of a part, rewritten after each."""

    def __init__(self, settings: Settings) -> None:
        self.file = settings.file
        self.found: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.found[name] = value
        write(self.file, self.found)

    def attempt(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Run a measurement, with its duration; an error is recorded and gives None."""
        began = time.monotonic()
        found: dict[str, Any] | None = None
        try:
            found = do()
            self[name] = found | {"took": round(time.monotonic() - began, 2)}
        except Exception:
            told = traceback.format_exc()
            print(told, file=sys.stderr, flush=True)
            self[name] = {"error": told[-LONGEST:], "took": round(time.monotonic() - began, 2)}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    @property
    def failed(self) -> bool:
        """True if an attempt raised."""
        return any(isinstance(v, dict) and "error" in v for v in self.found.values())


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def fit(
    config: TrainConfig,
    data: ImageData,
    reporter: Reporter | None = None,
    checkpoint: Path | None = None,
) -> Trainer:
    """Run the training loop from the start or a checkpoint, without the final test."""
    assert config.run is not None
    config.run.mkdir(parents=True, exist_ok=True)
    processes = start(config.device, config.precision, config.strategy)
    folder = RunFolder(config.run)
    source = ModelSource(None, None if checkpoint is None else load_checkpoint(checkpoint).manifest)
    reporter = reporter or QuietReporter()
    trainer = training._build(config, data, folder, reporter, processes, source, OwnCode())
    if checkpoint is not None:
        training._restore(trainer, load_checkpoint(checkpoint))
    trainer.fit()
    return trainer


def recipe(settings: Settings, name: str, **changes: Any) -> TrainConfig:
    """Load a recipe for the device, with the local images."""
    config = read_config(RECIPES / f"{name}.yaml")
    config = replace(
        config,
        device=settings.device,
        compile=not settings.eager,
        references=False,
        progress="plain",
        data=cifar(settings, config.data),
    )
    config = replace(config, **changes)
    return smaller(config) if settings.rehearse else config


def smaller(config: TrainConfig) -> TrainConfig:
    """Shrink a recipe for a rehearsal."""
    name = config.model.name
    model = replace(config.model, options=TINY) if name.startswith("vitrm") else config.model
    if name.startswith("cct"):
        model = ModelConfig("cct_2_3x2_32")
    if name.startswith("loopnet"):
        model = ModelConfig("loopnet_70k")
    return replace(
        config,
        model=model,
        data=replace(config.data, limit=200),
        batch_size=min(config.batch_size // 8, 64),
        precision="32-true",
        test_flips=False,
        workers=None if config.resident is None else 1,
    )


def cifar(settings: Settings, wanted: DataConfig) -> DataConfig:
    """Find CIFAR-10: its parquet files, or folders of the images in them."""
    folders = settings.scratch / "folders"
    if folders.is_dir():
        return replace(wanted, name=str(folders), root=None)
    return replace(wanted, root=settings.root)


def readable(settings: Settings) -> dict[str, Any]:
    """Decode CIFAR-10 once, or write its tables as folders if they are unreadable."""
    began = time.monotonic()
    found: dict[str, Any] = {}
    try:
        data = load_config_data(cifar(settings, DataConfig("cifar10")))
    except Exception:
        found["instead of parquet"] = traceback.format_exc()[-LONGEST:]
        assert settings.root is not None
        as_folders(settings.root, settings.scratch / "folders")
        data = load_config_data(cifar(settings, DataConfig("cifar10")))
    counts = f"{len(data.train)} + {len(data.validation)} to train, {len(data.test)} to test"
    return found | {"brief": f"{counts}, decoded in {time.monotonic() - began:.1f} s"}


def as_folders(root: Path, folder: Path) -> None:
    """Write the images of parquet files into one folder per class, still encoded."""
    import pyarrow.parquet

    part = folder.with_name(f"{folder.name}.part")
    for file in sorted(root.glob("*.parquet")):
        table = pyarrow.parquet.read_table(file)
        columns = {"img", "image"} & set(table.column_names)
        images, labels = table.column(columns.pop()), table.column("label")
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = part / file.name.partition("-")[0] / str(label)
            place.mkdir(parents=True, exist_ok=True)
            encoded = image["bytes"].as_py()
            kind = "webp" if encoded[:4] == b"RIFF" else "png"
            (place / f"{file.stem}-{row}.{kind}").write_bytes(encoded)
    os.replace(part, folder)


def noise(settings: Settings, count: int = 20_480) -> ImageData:
    """Make random images in place of CIFAR-10, where only time matters."""
    count = 256 if settings.rehearse else count
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    rows = torch.arange(count)
    few = Split(pixels, rows[:64], labels[:64])
    names = tuple(map(str, range(10)))
    return ImageData("noise", "noise", names, 32, 3, Split(pixels, rows, labels), few, few)
