"""Latency of the deployed paper model on a CPU, against its plain form in PyTorch.

    python benchmarks/deploy.py --threads 1 --out results/deploy.json     # --quick takes a minute

ViTRM small with random weights, from uint8 pixels to probabilities. "plain" is the method as the
paper writes it down, in eager PyTorch (tests/plain_vitrm.py); the others are smallfry's model. All
take turns, and ratios are plain's median to theirs. int8's ranges are measured on noise, which
changes no time. The saving of early exit depends on a trained model: smallfry benchmark RUN
measures it.
--cpu_time counts what the process computes, not the time on the wall: for a busy machine and one
thread. Exit code 1: a wanted ratio was missed.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from torch import nn

import smallfry  # noqa: F401  registers the models
from smallfry.deploy import Manifest, Runtime
from smallfry.deploy.graphs import exported_program, to_onnx, whole_graph
from smallfry.deploy.latency import take_turns
from smallfry.deploy.quantize import quantize
from smallfry.training.augment import Normalize
from smallfry.training.provenance import provenance
from smallfry_runtime.manifest import MANIFEST

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain_vitrm import PlainViTRM

MODEL = "vitrm_small_patch4_32"
CLASSES, SIDE, CHANNELS = 10, 32, 3
CALIBRATION_IMAGES = 32
STATISTICS = (0.5,) * CHANNELS
PLAIN, EAGER, COMPILED = "plain", "smallfry, eager", "smallfry, compiled"
ONNX = {"float32": "ONNX float32", "int8": "ONNX int8", "int8_dynamic": "ONNX int8 dynamic"}
WANTED = {ONNX["float32"]: 1.3, ONNX["int8"]: 2.0}  # ratio to plain at one image

Work = Callable[[], object]


def in_pytorch(model: Callable[..., object], pixels: np.ndarray) -> Work:
    normalize = Normalize(STATISTICS, STATISTICS)

    @torch.no_grad()
    def answer() -> object:
        said = model(normalize(torch.from_numpy(pixels)))
        return (said[0] if isinstance(said, tuple) else said).softmax(dim=1)

    return answer


def in_onnx_runtime(model: nn.Module, folder: Path, threads: int, pixels: np.ndarray) -> dict:
    graph = whole_graph(model, torch.zeros(2, CHANNELS, SIDE, SIDE))
    graphs = {"model": to_onnx(graph, exported_program(graph)).SerializeToString()}
    shape = (CALIBRATION_IMAGES, CHANNELS, SIDE, SIDE)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    works = {}
    for precision, name in ONNX.items():
        content = graphs if precision == "float32" else quantize(graphs, precision, noise)
        place = folder / precision
        place.mkdir()
        (place / "model.onnx").write_bytes(content["model"])
        manifest = Manifest(
            form="whole",
            precision=precision,
            model={"name": MODEL},
            classes=tuple(map(str, range(CLASSES))),
            image_size=SIDE,
            channels=CHANNELS,
            mean=STATISTICS,
            std=STATISTICS,
            recursion_steps=1,
            files={"model.onnx": hashlib.sha256(content["model"]).hexdigest()},
        )
        (place / MANIFEST).write_text(manifest.to_json())
        runtime = Runtime(place, threads)
        works[name] = lambda runtime=runtime: runtime.predict(pixels, batch_size=len(pixels))
    return works


def field(pixels: np.ndarray, threads: int, compiled: bool, folder: Path) -> dict[str, Work]:
    model = timm.create_model(MODEL, num_classes=CLASSES).eval()
    works = {PLAIN: in_pytorch(PlainViTRM().eval(), pixels), EAGER: in_pytorch(model, pixels)}
    if compiled:
        works[COMPILED] = in_pytorch(torch.compile(model, dynamic=False), pixels)
        try:
            works[COMPILED]()
        except Exception as error:  # whatever a compiler stumbles over
            print(f"left out: {COMPILED} ({next(iter(str(error).splitlines()), error)})")
            del works[COMPILED]
    return works | in_onnx_runtime(model, folder, threads, pixels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a second each, nothing compiled")
    parser.add_argument("--cpu_time", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    seconds, rounds = (1.0, 5) if arguments.quick else (arguments.seconds, arguments.rounds)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    shape = (arguments.batch, CHANNELS, SIDE, SIDE)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with TemporaryDirectory() as folder:
        works = field(pixels, arguments.threads, not arguments.quick, Path(folder))
        found = take_turns(works, seconds, rounds, clock=clock)
    unit = "CPU time" if arguments.cpu_time else "wall time"
    print(
        f"batch {arguments.batch}, {arguments.threads} threads, {unit}     p50, ms  p95, ms  ratio"
    )
    missed, measured = [], {}
    for name, taken in found.items():
        ratio = found[PLAIN].p50 / taken.p50
        measured[name] = taken._asdict() | {"ratio": ratio}
        line = f"  {name:32}{taken.p50:12.2f} {taken.p95:8.2f} {ratio:6.2f}"
        if name in WANTED and arguments.batch == 1:
            reached = ratio >= WANTED[name]
            line += f"   wanted {WANTED[name]}: {'reached' if reached else 'MISSED'}"
            missed += [] if reached else [name]
        print(line)
    if arguments.out is not None:
        settings = {"threads": arguments.threads, "batch": arguments.batch, "clock": unit}
        record = {"settings": settings, "measured": measured}
        record |= {"wanted": WANTED, "provenance": provenance(torch.device("cpu"))}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print("missed:", ", ".join(missed) if missed else "nothing")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
