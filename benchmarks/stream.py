"""Memory use over time of image streaming from parquet shards.

    python benchmarks/stream.py --out results/stream.json --picture docs/pictures/stream_memory.png

Writes shards of 10,000 images each, 32×32 RGB JPEGs of as many distinct pictures as there are in a
shard, into a temporary folder; then passes an epoch through the training loader, once in this
process and once with two workers. Memory is the part not backed by a file, by /proc (Pss_Anon and
Pss_Shmem), of this process and its workers together. Each pass is a fresh process. Speeds are of
one machine that may be busy with other work. Exit code 1: memory grows by more than it should
between the first quarter and the last.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from smallfry.data import load_data
from smallfry.report.figure import COLOURS, new_figure, save, style
from smallfry.training.augment import Augment
from smallfry.training.batches import TrainBatches
from smallfry.training.config import AugmentConfig
from smallfry.training.loader import TrainLoader
from smallfry.training.provenance import provenance

SHARD, GROUP, CLASSES, SIZE, BATCH = 10_000, 1_000, 10, 32, 256
SAMPLES = 200  # of memory, in a pass
MOST_GROWTH = 0.05  # of the mean of the first quarter, to that of the last


def write_shards(folder: Path, count: int) -> int:
    """Write shards of generated images; return their bytes."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (SHARD, 8, 8, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    cells = []
    for pixels in coarse + random.integers(0, 8, (SHARD, SIZE, SIZE, 3), dtype=np.uint8):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        cells.append({"bytes": stream.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array(cells, kind)
    for number in range(-(-count // SHARD)):
        size = min(SHARD, count - number * SHARD)
        labels = random.integers(0, CLASSES, size)
        table = pa.table({"image": images[:size], "label": labels})
        pq.write_table(table, folder / f"train-{number:05}.parquet", row_group_size=GROUP)
    return sum(file.stat().st_size for file in folder.iterdir())


def memory(process: int) -> float:
    """Measure the private memory of a process in MB, with its share of shared pages."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return 0.0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) / 1024


def stream_through(folder: Path, cache: Path, workers: int, answer: Any) -> None:
    """Stream one epoch through the loader, sampling memory."""
    # this process was spawned; the loader's workers are to come as they do elsewhere
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.environ["SMALLFRY_CACHE"] = str(cache)
    torch.set_num_threads(1)
    libraries = memory(os.getpid())
    began = time.monotonic()
    data = load_data(str(folder), stream=True, validation=0.0, test=0.0)
    mean, std = data.mean, data.std
    prepared = time.monotonic() - began
    config = AugmentConfig(crop_padding=4, flip=True, mixup=0.0, cutmix=0.0)
    augment = Augment(config, SIZE, CLASSES, mean, std, flip=True)
    made = TrainBatches(data.train, augment, BATCH, 0)
    every = max(1, made.steps_per_epoch // SAMPLES)
    seen, rows, began = 0, [], time.monotonic()
    for step, batch in enumerate(TrainLoader(made, range(made.steps_per_epoch), workers, False)):
        seen += len(batch.inputs)
        if step % every == 0:
            processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            used = sum(memory(process) for process in processes if process)
            rows.append((seen, round(used, 2), round(time.monotonic() - began, 2)))
    seconds = time.monotonic() - began
    told = {"images": seen, "prepared_seconds": prepared, "seconds": seconds, "rows": rows}
    answer.put(told | {"libraries": libraries})


def measure(folder: Path, cache: Path, workers: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=stream_through, args=(folder, cache, workers, answer))
    process.start()
    told = answer.get()
    process.join()
    used = [row[1] for row in told["rows"]]
    quarter = max(1, len(used) // 4)
    first, last = np.mean(used[quarter // 2 : quarter]), np.mean(used[-quarter:])
    return {
        "workers": workers,
        "images": told["images"],
        "images_per_second": round(told["images"] / told["seconds"]),
        "prepared_seconds": round(told["prepared_seconds"], 1),
        "megabytes_of_libraries": round(told["libraries"], 1),  # before any data
        "megabytes_first_quarter": round(float(first), 1),
        "megabytes_last_quarter": round(float(last), 1),
        "megabytes_peak": max(used),
        "growth": round(float(last / first - 1), 4),
        "images_and_megabytes": [row[:2] for row in told["rows"]],
    }


def draw(passes: list[dict[str, Any]], size: float, file: Path) -> None:
    with style():
        figure = new_figure(6, 3.2)
        axes = figure.subplots()
        for colour, told in zip(COLOURS, passes, strict=False):
            images, used = zip(*told["images_and_megabytes"], strict=True)
            workers = told["workers"]
            name = f"{workers} workers and the main process" if workers else "one process"
            axes.plot([n / 1e6 for n in images], used, color=colour, label=name)
        axes.axhline(size, color="#6b7280", linestyle=":", label="all encoded images")
        axes.set_ylim(0)
        axes.set_xlabel("images that have passed (millions)")
        axes.set_ylabel("memory (MB)")
        axes.legend()
        save(figure, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "shards")
        folder.mkdir()
        size = write_shards(folder, arguments.images)
        print(f"{arguments.images:,} images, {size / 1e6:,.0f} MB in {len(list(folder.iterdir()))}")
        passes = []
        for workers in arguments.workers:
            told = measure(folder, Path(place, "cache"), workers)
            passes.append(told)
            shown = {k: v for k, v in told.items() if k != "images_and_megabytes"}
            print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    if arguments.picture is not None:
        draw(passes, size / 1e6, arguments.picture)
    if arguments.out is not None:
        measured = {"bytes_on_disk": size, "passes": passes}
        note = "images_per_second is of two cores that other work kept busy meanwhile"
        record = {"measured": measured, "note": note, "provenance": provenance(torch.device("cpu"))}
        arguments.out.write_text(json.dumps(record) + "\n")
    return 0 if all(told["growth"] <= MOST_GROWTH for told in passes) else 1


if __name__ == "__main__":
    sys.exit(main())
