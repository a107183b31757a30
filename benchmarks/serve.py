"""Latency of the HTTP server under simultaneous clients.

    python benchmarks/serve.py EXPORT [--clients 50] [--seconds 20] [--decoding JSON] [--out FILE]

The server runs in a process of its own on one thread of the model; clients are threads of this
process, each of which sends one random input after another, of any task whose answers the runtime
decodes: pictures, arrays or puzzles. Every answer is compared with the runtime's own: numbers to a
thousandth, as batches round in other ways, and pictures in answers by their names alone.
On two cores clients and server compete, so that latencies are upper bounds.
"""

import argparse
import io
import json
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from smallfry.training.provenance import provenance
from smallfry_runtime import Runtime
from smallfry_runtime.arrays import random_inputs
from smallfry_runtime.inputs import InputImage
from smallfry_runtime.serving.server import input_of

INPUTS = 20


def inputs_of(runtime: Runtime) -> list[bytes]:
    """Draw random inputs of an export, as files."""
    kind, _ = input_of(runtime)
    frame, channels = runtime.manifest.frame, runtime.manifest.channels
    if kind == "text":
        symbols, generator = runtime.classes[1:], np.random.default_rng(0)
        grids = generator.choice(symbols, (INPUTS, frame.height * frame.width))
        return ["".join(grid).encode() for grid in grids]
    made = []
    for values in random_inputs(INPUTS, frame, channels):
        stream = io.BytesIO()
        if kind in ("array", "pair"):
            np.save(stream, values)
        else:
            Image.fromarray(values[0] if channels == 1 else values.transpose(1, 2, 0)).save(
                stream, "PNG"
            )
        made.append(stream.getvalue())
    return made


def answers_of(runtime: Runtime, inputs: list[bytes], settings: dict[str, Any]) -> list[Any]:
    """Compute the runtime's own answers."""
    found = runtime.answer_each([InputImage("", each) for each in inputs], settings)
    return [answer.to_dict() for answer in found]


def is_same(found: Any, expected: Any) -> bool:
    """Return whether two answers are the same, but for rounding and names of inputs."""
    if isinstance(expected, dict):
        rest = [name for name in expected if name not in ("image", "file")]
        return {*rest} <= {*found} and all(
            "_png" in name or is_same(found[name], expected[name]) for name in rest
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-3)
    return bool(found == expected)


def measure(
    url: str,
    sent: list[bytes],
    expected: list[Any],
    clients: int,
    seconds: float,
    settings: dict[str, Any],
):
    """Send requests from all clients; return latencies in seconds, and what was wrong."""
    latencies: list[float] = []
    wrong: list[str] = []
    query = {name: json.dumps(value) for name, value in settings.items()}
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while (begin := time.perf_counter()) < end:
                which = number % len(sent)
                number += 1
                response = client.post("/predict", content=sent[which], params=query)
                latencies.append(time.perf_counter() - begin)
                if response.status_code != 200:
                    wrong.append(f"{response.status_code}: {response.text}")
                elif not is_same(response.json()["predictions"][0], expected[which]):
                    wrong.append(f"another answer for input {which}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--decoding", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("results/serve.json"))
    given = parser.parse_args()
    runtime = Runtime(given.export, threads=1)
    settings = given.decoding or ({"top_k": 1} if runtime.manifest.is_classifier else {})
    sent = inputs_of(runtime)
    expected = answers_of(runtime, sent, settings)
    words = ["-m", "smallfry_runtime.serving", str(given.export), "--port", "0", "--threads", "1"]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    record, failed = {}, False
    try:
        url = re.search(r"http://\S+/", server.stdout.readline())[0]
        for clients in given.clients:
            latencies, wrong = measure(url, sent, expected, clients, given.seconds, settings)
            times = np.percentile(np.array(latencies) * 1e3, (50, 95, 99)).round(1).tolist()
            record[str(clients)] = {
                "requests": len(latencies),
                "wrong": len(wrong),
                "requests_per_second": round(len(latencies) / given.seconds, 1),
                "milliseconds": dict(zip(("p50", "p95", "p99"), times, strict=True)),
            }
            failed |= bool(wrong)
            print(clients, record[str(clients)], *wrong[:3], flush=True)
        batches = dict(
            re.findall(
                r"^smallfry_(batch_images_(?:sum|count)) ([\d.]+)$",
                httpx.get(url + "metrics").text,
                re.M,
            )
        )
        record["images_per_batch"] = round(
            float(batches["batch_images_sum"]) / float(batches["batch_images_count"]), 2
        )
    finally:
        server.terminate()
        server.wait()
    content = {
        "export": given.export.name,
        "clients": record,
        "provenance": provenance(torch.device("cpu")),
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
