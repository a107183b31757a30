"""Latency of the HTTP server under simultaneous clients.

    python benchmarks/serve.py EXPORT [--clients 50] [--seconds 20] [--out results/serve.json]

The server runs in a process of its own on one thread of the model; clients are threads of this
process, each of which sends one PNG after another. Every answer is compared with the runtime's own.
On two cores clients and server compete, so that latencies are upper bounds.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from smallfry.training.provenance import provenance
from smallfry_runtime import Runtime

PICTURES = 20


def pictures(size: int, channels: int) -> list[bytes]:
    """Encode random images as PNG."""
    made, generator = [], np.random.default_rng(0)
    for _ in range(PICTURES):
        shape = (size, size) if channels == 1 else (size, size, channels)
        stream = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(stream, "PNG")
        made.append(stream.getvalue())
    return made


def measure(url: str, sent: list[bytes], expected: list[str], clients: int, seconds: float):
    """Send requests from all clients; return latencies in seconds, and what was wrong."""
    latencies: list[float] = []
    wrong: list[str] = []
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while (begin := time.perf_counter()) < end:
                which = number % len(sent)
                number += 1
                response = client.post("/predict", content=sent[which])
                latencies.append(time.perf_counter() - begin)
                if response.status_code != 200:
                    wrong.append(f"{response.status_code}: {response.text}")
                elif response.json()["predictions"][0]["class"] != expected[which]:
                    wrong.append(f"another class for image {which}")

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
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("results/serve.json"))
    given = parser.parse_args()
    runtime = Runtime(given.export, threads=1)
    sent = pictures(runtime.manifest.image_size, runtime.manifest.channels)
    expected = [runtime.classes[row.argmax()] for row in runtime.predict(sent).probabilities]
    words = ["-m", "smallfry_runtime.serving", str(given.export), "--port", "0", "--threads", "1"]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    record, failed = {}, False
    try:
        url = re.search(r"http://\S+/", server.stdout.readline())[0]
        for clients in given.clients:
            latencies, wrong = measure(url, sent, expected, clients, given.seconds)
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
