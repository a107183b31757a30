"""Measure training steps of models on CIFAR-sized noise: images a second.

    python benchmarks/train_speed.py loopnet_70k loopnet_300k loopnet_2m cct_2_3x2_32 --threads 2

Forward pass, backward pass and a step of SGD in bfloat16; without augmentation and evaluation.
"""

import argparse
import time

import timm
import torch
from torch.nn import functional as F

import smallfry  # noqa: F401  # registers the models


def images_per_second(name: str, batch: int, steps: int, plain: bool) -> float:
    """Train a model for some steps, after one that is not timed."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    if not plain:
        model.to(memory_format=torch.channels_last)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    began = 0.0
    for step in range(steps + 1):
        began = time.perf_counter() if step == 1 else began
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not plain):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return batch * steps / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--plain", action="store_true", help="float32, channels first")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.models:
        speed = images_per_second(name, given.batch, given.steps, given.plain)
        print(f"{name:28} {speed:7,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
