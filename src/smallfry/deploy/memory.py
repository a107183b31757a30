r"""Memory of inference, measured in a fresh process.

    python -m smallfry.deploy.memory \
        '{"kind": "export", "folder": "…", "batch_sizes": [1], "threads": 1}'

prints bytes as JSON: what the libraries take before a model is there, and the peak up to each batch
size. They are the resident set as Linux counts it for this process alone. (``ru_maxrss``, the usual
figure, begins with what the parent had in memory when it started the process.) The counter of the
peak is set back once the libraries are loaded.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from smallfry_runtime.arrays import random_inputs
from smallfry_runtime.frames import PIXELS, Frame

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MODEL, WEIGHTS = (
    "model.json",
    "model.safetensors",
)  # a spec with the shape of an image
ANSWERS = 3  # of each batch size
LONGEST = 600  # seconds

Answer = Callable[[NDArray[Any]], object]


class Memory(NamedTuple):
    """Resident memory of a process, in bytes."""

    libraries: int  # before the model is loaded
    peaks: dict[int, int]  # with libraries; of a batch size after all smaller ones


def measure_memory(
    kind: str, folder: Path, batch_sizes: Sequence[int], threads: int
) -> Memory | None:
    """Measure the memory that a fresh process needs to load and run a model.

    Args:
        kind: ``export``, for ONNX Runtime; or ``pytorch``, for a model in eager mode.
        folder: The export; or a folder with ``model.json`` and ``model.safetensors``.
        batch_sizes: Images at a time.
        threads: CPU threads.

    Returns:
        None where the system has no figure, or where the process fails.
    """
    if not os.access(CLEAR, os.W_OK):
        return None
    wanted = {"kind": kind, "folder": str(folder), "threads": threads}
    request = json.dumps(wanted | {"batch_sizes": sorted(batch_sizes)})
    command = [sys.executable, "-m", "smallfry.deploy.memory", request]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LONGEST)
        told = json.loads(done.stdout.splitlines()[-1])
        peaks = {int(size): int(peak) for size, peak in told["peaks"].items()}
        return Memory(int(told["libraries"]), peaks)
    except (OSError, subprocess.SubprocessError, ValueError, LookupError):
        return None


def main(wanted: Mapping[str, Any]) -> Memory:
    """Measure this process."""
    prepare = _with_onnx_runtime if wanted["kind"] == "export" else _with_pytorch
    load, (frame, channels) = prepare(Path(wanted["folder"]), wanted["threads"])
    libraries = _resident("VmRSS")
    CLEAR.write_text("5")  # from now on, VmHWM is the peak since now
    answer = load()
    peaks = {}
    for size in wanted["batch_sizes"]:
        for _ in range(ANSWERS):
            answer(random_inputs(size, frame, channels))
        peaks[size] = _resident("VmHWM")
    return Memory(libraries, peaks)


def _with_onnx_runtime(
    folder: Path, threads: int
) -> tuple[Callable[[], Answer], tuple[Frame, int]]:
    """Return a loader of the model, once the libraries are loaded, and frame and channels."""
    from smallfry_runtime.manifest import Manifest
    from smallfry_runtime.runtime import Runtime

    manifest = Manifest.read(folder)

    def load() -> Answer:
        runtime = Runtime(folder, threads)
        return lambda pixels: runtime.compute(pixels, batch_size=len(pixels))

    return load, (manifest.frame, manifest.channels)


def _with_pytorch(folder: Path, threads: int) -> tuple[Callable[[], Answer], tuple[Frame, int]]:
    import torch
    from safetensors.torch import load_file

    from smallfry.transforms import ModelSpec, build

    torch.set_num_threads(threads)
    content = json.loads((folder / MODEL).read_text())
    spec, frame = ModelSpec.from_dict(content), Frame(*content["frame"])

    def load() -> Answer:
        model = build(spec, load_file(folder / WEIGHTS))

        @torch.inference_mode()
        def answer(pixels: NDArray[Any]) -> object:
            inputs = torch.from_numpy(pixels).float()
            return model(inputs / 255 if frame.values == PIXELS else inputs)

        return answer

    return load, (frame, content["channels"])


def _resident(name: str) -> int:
    """Read the resident memory of this process: ``VmRSS`` now, or ``VmHWM`` at its peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))._asdict()))
