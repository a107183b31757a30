"""First measurements on one GPU: parts in order, within a time budget.

    python benchmarks/gpu.py --root DIR --out results/gpu --budget 720
    python benchmarks/gpu.py --rehearse --root DIR --out OUT   # on a CPU, tiny, every part

    smoke       optimizers, models, training and exact resumption on CUDA, held against the CPU
    speed       images a second of the training loop, and its share of the GPU's peak
    accuracy    ViTRM small on CIFAR-10 for the seconds that are left, then the test split
    fast        LoopNet 2m in more and more epochs, until it has 94 %
    optimizers  the ratios of benchmarks/optim.py
    rivals      another model, as long as the budget lasts
    tests       the tests of optimizers and curvature, and one process of NCCL

Each part is a process of its own (``gpu_parts.py``, ``gpu_smoke.py``) and rewrites its JSON file in
the folder of ``--out`` after every figure, so a part that fails, hangs or is killed costs neither
its earlier figures nor the next part. ``--parts`` chooses, in the order given.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Part(NamedTuple):
    """Script of a part, with its minimum and maximum seconds."""

    script: str
    least: float
    most: float
    reserved: float = 0.0  # kept free for it by earlier parts
    grace: float = 3.0  # of its seconds, those after it was asked to end


PARTS = {
    "smoke": Part("gpu_smoke.py", 30, 150),
    "speed": Part("gpu_parts.py", 30, 150),
    "accuracy": Part("gpu_parts.py", 90, 450, grace=15),
    "fast": Part("gpu_parts.py", 30, 150, reserved=75),
    "optimizers": Part("gpu_parts.py", 20, 75, reserved=60),
    "rivals": Part("gpu_parts.py", 90, 600, grace=15),
    "tests": Part("gpu_parts.py", 30, 200),
}
FIRST = ["smoke", "speed", "accuracy", "fast", "optimizers", "rivals"]


def seconds_for(part: str, left: float, later: list[str]) -> float:
    """Return the seconds for a part, out of those left; 0 if they don't suffice."""
    found = min(PARTS[part].most, left - sum(PARTS[name].reserved for name in later))
    return found if found >= PARTS[part].least else 0.0


def environment(scratch: Path) -> dict[str, str]:
    """Build the environment: caches in the scratch folder, no network, this checkout's package."""
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    given = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "SMALLFRY_CACHE": str(scratch / "decoded"),
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "MPLCONFIGDIR": str(scratch / "matplotlib"),
        "CI": "1",  # no progress bars
    }
    return os.environ | given


def run(part: str, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a part, and return its outcome."""
    file = arguments.out / f"{part}.json"
    until = time.time() + seconds
    command = [sys.executable, str(HERE / PARTS[part].script), part, f"--until={until:.1f}"]
    command += [f"--file={file}", f"--scratch={arguments.scratch}", f"--device={arguments.device}"]
    command += [f"--root={arguments.root}"] if arguments.root is not None else []
    command += ["--rehearse"] if arguments.rehearse else []
    command += ["--eager"] if arguments.eager else []
    command += [f"--model={arguments.model}"] if arguments.model is not None else []
    began = time.monotonic()
    with open(arguments.out / "log.txt", "a") as log:
        log.write(f"\n=== {part}: {seconds:.0f} s\n")
        log.flush()
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=environment(arguments.scratch),
            start_new_session=True,
        )
        ended = "by itself"
        try:
            child.wait(max(1.0, seconds - PARTS[part].grace))
        except subprocess.TimeoutExpired:
            ended = "asked to, out of seconds"
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(PARTS[part].grace)
            except subprocess.TimeoutExpired:
                ended = "killed, out of seconds"
        finally:
            _end_group(child)
    return {
        "ended": ended,
        "exit": child.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "allowed": round(seconds, 1),
    }


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Kill all processes that a part started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def read(file: Path) -> dict[str, Any]:
    """Read the record of a part so far."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        found = {"error": f"no figures: {error}"}
    return found


def write(file: Path, record: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(record, indent=1, default=str) + "\n")
    os.replace(part, file)


def show(part: str, record: dict[str, Any]) -> None:
    """Summarise a part in few lines, errors by their last line."""
    print(f"--- {part}: {record.get('process')}")
    for name, found in record.items():
        if name == "process":
            continue
        if isinstance(found, dict) and "error" in found:
            last = str(found["error"]).strip().splitlines()[-1]
            print(f"  {name}: FAILED {last[:300]}")
        elif isinstance(found, dict) and "brief" in found:
            print(f"  {name}: {found['brief']}")
        elif not isinstance(found, dict | list):
            print(f"  {name}: {str(found).strip().splitlines()[-1][:300] if found else found}")
    sys.stdout.flush()


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder of CIFAR-10's parquet files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=720.0, help="seconds in all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=FIRST)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", help="of rivals, such as resnet18_cifar")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "smallfry-gpu"
    )
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    arguments = parser.parse_args()
    if arguments.rehearse:
        arguments.device = "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    failed = 0
    for number, part in enumerate(arguments.parts):
        left = arguments.budget - (time.monotonic() - began)
        later = arguments.parts[number + 1 :]
        seconds = max(0.0, left) if arguments.rehearse else seconds_for(part, left, later)
        file = arguments.out / f"{part}.json"
        if not seconds:
            print(f"--- {part}: left out, {left:.0f} s were left", flush=True)
            continue
        file.unlink(missing_ok=True)
        ended = run(part, seconds, arguments)
        record = read(file) | {"process": ended}
        if not file.exists():  # it died before its first figure
            text = (arguments.out / "log.txt").read_text(errors="replace")
            record["error"] = "\n".join(text.splitlines()[-30:])
        write(file, record)
        show(part, record)
        failed += int(ended["exit"] != 0)
    print(f"{time.monotonic() - began:.0f} s of {arguments.budget:.0f}; {failed} parts not whole")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
