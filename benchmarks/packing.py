"""Bytes of packed weights beside those of plain ones, and speed of binary products.

    python benchmarks/packing.py --out results/packing.json

The models of results/models, rounded to 8 and 4 bits: the plain file has one byte, or half a byte,
for a code. Binary convolutions, 64 channels at 16×16 pixels: XOR and population counts in NumPy
beside float32 in PyTorch, one thread, best of five.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.nn import functional as F

import smallfry
from smallfry.compress import RoundWeights, apply_to_model
from smallfry.compress.coding.packing import pack
from smallfry.kernels.xnor import binary_conv2d, pack_signs

MODELS = Path(__file__).parents[1] / "results" / "models"


def packed(model: Any, bits: int) -> dict[str, Any]:
    """Round, pack and count."""
    small, _ = apply_to_model(model, [RoundWeights(bits=bits)])
    weights = small.state_dict()
    original = safetensors.torch.save(weights)
    codes = sum(each.numel() for each in weights.values() if each.dtype == torch.int8)
    plain = len(original) - codes + codes * bits // 8
    start = time.process_time()
    found = pack(original)
    return {
        "plain_bytes": plain,
        "packed_bytes": len(found.data),
        "ratio": len(found.data) / plain,
        "cpu_seconds": time.process_time() - start,
        "tensors": [row._asdict() for row in found.rows],
    }


def best(call: Callable[[], Any]) -> float:
    """Return the least seconds of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def speed() -> dict[str, float]:
    """Time a binary convolution of 64 channels in both engines."""
    random = np.random.default_rng(0)
    inputs, weight = random.normal(size=(8, 16, 16, 64)), random.normal(size=(64, 3, 3, 64))
    words, kernel = pack_signs(inputs), pack_signs(weight)
    images = torch.from_numpy(inputs).float().permute(0, 3, 1, 2)
    filters = torch.from_numpy(weight).float().permute(0, 3, 1, 2)
    return {
        "numpy_popcount_seconds": best(lambda: binary_conv2d(words, kernel, 64, padding=1)),
        "numpy_packing_seconds": best(lambda: pack_signs(inputs)),
        "torch_float32_seconds": best(lambda: F.conv2d(images, filters, padding=1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/packing.json"))
    parser.add_argument("--models", nargs="+", default=["loopnet_70k", "loopnet_2m"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"binary_convolution": speed()}
    for name in args.models:
        model = smallfry.load(MODELS / name).model
        found[name] = {f"{bits} bits": packed(model, bits) for bits in (8, 4)}
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k == "binary_convolution"}, indent=2))
    for name in args.models:
        print(name, {bits: round(row["ratio"], 3) for bits, row in found[name].items()})


if __name__ == "__main__":
    main()
