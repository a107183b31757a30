"""Bits a pixel of images under hidden Chow–Liu trees, and lossless coding of test images.

    python benchmarks/circuits.py --out results/circuits.json [--root DIR]

Digits of scikit-learn (1,438 images to fit, 359 to test); MNIST (all 60,000, 10,000 to test) with
--root, which takes about 17 minutes of one core. Compared with independent pixels, zlib and lzma.
All test images are coded, decoded and compared.
"""

import argparse
import json
import lzma
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from smallfry.compress.codec import HCLT

Images = NDArray[np.uint8]
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"states": 16, "epochs": 50},
    "mnist": {"states": 32, "epochs": 20, "batch": 2048, "single": True, "pseudo_count": 0.32},
}


def digits() -> tuple[Images, Images]:
    """Load the digits of scikit-learn, split at random with seed 0."""
    images = load_digits().images.astype(np.uint8).reshape(-1, 64)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order[:1438]], images[order[1438:]]


def mnist(root: Path) -> tuple[Images, Images]:
    """Load all images of MNIST."""
    from smallfry.data import load_data

    data = load_data("mnist", root, validation=0.0)
    train, test = (split.images.flatten(1).numpy() for split in (data.train, data.test))
    return train, test


def independent(train: Images, test: Images, categories: int) -> float:
    """Compute bits a pixel of one histogram for each pixel, with a pseudo-count of 1."""
    counts = np.stack([np.bincount(column, minlength=categories) for column in train.T])
    shares = (counts + 1 / categories) / (len(train) + 1)
    bits = -np.log2(shares[np.arange(train.shape[1]), test])
    return float(bits.mean())


def measure(
    train: Images, test: Images, categories: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Fit a tree, and code and decode the test images."""
    clock = [time.process_time()]
    model = HCLT.fit(train, categories=categories, **settings)
    clock.append(time.process_time())
    bits = -float(model.log2_probability(test).sum())
    fit = -float(model.log2_probability(train[:: max(1, len(train) // 5000)]).mean())
    clock.append(time.process_time())
    coded = model.encode(test)
    clock.append(time.process_time())
    lossless = bool(np.array_equal(model.decode(coded), test))
    clock.append(time.process_time())
    raw = test.tobytes()
    return {
        "images": {"train": len(train), "test": len(test)},
        "settings": settings,
        "parameters": model.parameters,
        "bits_a_pixel": bits / test.size,
        "bits_a_pixel_of_training_images": fit / train.shape[1],
        "coded_bits_a_pixel": 8 * len(coded) / test.size,
        "excess_of_code": 8 * len(coded) / bits - 1,
        "lossless": lossless,
        "independent_pixels": independent(train, test, categories),
        "zlib": 8 * len(zlib.compress(raw, 9)) / test.size,
        "lzma": 8 * len(lzma.compress(raw, preset=9)) / test.size,
        "cpu_seconds": dict(
            zip(("fit", "probabilities", "encode", "decode"), np.diff(clock).tolist(), strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/circuits.json"))
    parser.add_argument("--root", type=Path, help="folder with mnist/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"digits": measure(*digits(), 17, SETTINGS["digits"])}
    if args.root is not None:
        found["mnist"] = measure(*mnist(args.root), 256, SETTINGS["mnist"])
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    for name, row in found.items():
        print(f"{name}: {row['coded_bits_a_pixel']:.3f} bits a pixel, lossless: {row['lossless']}")


if __name__ == "__main__":
    main()
