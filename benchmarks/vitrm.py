"""Training and inference speed of ViTRM, against the paper's plain form and other models.

    python benchmarks/vitrm.py --out results/vitrm.json     # --quick takes a minute or two

Random 32×32 images, the paper's model, a training step (forward, loss, backward, AdamW) and
inference. "plain" is the method as the paper writes it down: nn.MultiheadAttention, the whole
block every time, dropout 0.1; tests/models/test_vitrm_plain.py proves smallfry equal to it.
"savings alone" is smallfry with the products of matrices that PyTorch chooses itself, as smallfry
does on Intel's processors unless SMALLFRY_ONEDNN=1 is set. All
contestants take turns in rounds, so that a machine that slows down slows all; ratios are medians
over rounds of plain's time in the same round. "of peak" is relative to the fastest product of two
2048×2048 matrices that PyTorch makes in that precision, by whatever library. Exit code 1: a wanted
ratio was missed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from smallfry import cost
from smallfry.models import ViTRM
from smallfry.models.linear import Linear
from smallfry.training.provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain_vitrm import PlainViTRM

CLASSES = 10
FLOAT, SAVINGS, NO_ATTENTION_DROPOUT = "smallfry", "savings alone", "no attention dropout"
BF16, COMPILED = "bf16", "bf16 compiled"
WANTED = {  # (what, batch of one image) -> ratio to plain
    ("train", False): {FLOAT: 1.33, NO_ATTENTION_DROPOUT: 1.6, BF16: 2.1},
    ("infer", False): {FLOAT: 1.2, COMPILED: 2.3},
    ("infer", True): {FLOAT: 1.16},
}
WANTED_SHARE = 0.35  # of a GPU's bfloat16 peak, in training at batch 512


class Contestant(NamedTuple):
    model: nn.Module
    bf16: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Figures(NamedTuple):
    images_per_second: float
    ratio: float  # to plain
    share_of_peak: float
    peak_bytes: int  # of tensors, beyond weights, gradients and optimizer state


def contestants(device: torch.device, wanted: set[str] | None) -> dict[str, Contestant]:
    def no_onednn() -> AbstractContextManager[Any]:
        return torch.backends.mkldnn.flags(enabled=False)

    built = {
        "plain": lambda: Contestant(PlainViTRM()),
        FLOAT: lambda: Contestant(ViTRM()),
        SAVINGS: lambda: Contestant(ViTRM(), around=no_onednn),
        NO_ATTENTION_DROPOUT: lambda: Contestant(ViTRM(attn_drop_rate=0.0)),
        BF16: lambda: Contestant(ViTRM(), bf16=True),
        COMPILED: lambda: Contestant(torch.compile(ViTRM(), dynamic=False), bf16=True),
        "ViT-S": lambda: Contestant(vit_s()),
        "ResNet-18, 7×7 stem": lambda: Contestant(timm.create_model("resnet18", num_classes=10)),
        "ResNet-18, 3×3 stem": lambda: Contestant(resnet18_small_stem()),
    }
    found = {}
    for name, build in built.items():
        if wanted is None or name in wanted | {"plain"}:
            contestant = build()
            contestant.model.to(device)
            found[name] = contestant
    return found


def vit_s() -> nn.Module:
    """Build the paper's ViT-S with 16.9M parameters."""
    return VisionTransformer(
        img_size=32,
        patch_size=4,
        num_classes=CLASSES,
        embed_dim=512,
        depth=8,
        num_heads=8,
        mlp_ratio=2,
        qkv_bias=False,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
    )


def resnet18_small_stem() -> nn.Module:
    model = timm.create_model("resnet18", num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output[0] if isinstance(output, tuple) else output


def work(what: str, contestant: Contestant, images: Tensor) -> Callable[[], None]:
    """Run one training step, or one inference."""
    model, labels = contestant.model, torch.arange(len(images), device=images.device) % CLASSES
    cast = torch.autocast(images.device.type, torch.bfloat16, enabled=contestant.bf16)

    def infer() -> None:
        model.eval()
        with torch.no_grad(), cast, contestant.around():
            logits_of(model, images)

    if what == "infer":
        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        model.train()
        with contestant.around():
            with cast:
                loss = F.cross_entropy(logits_of(model, images), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def clock(function: Callable[[], None], device: torch.device, at_least: float = 0.2) -> float:
    """Measure seconds a call, over enough calls."""
    calls, began = 0, time.perf_counter()
    while True:
        function()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        if took >= at_least:
            return took / calls


def peak_bytes(function: Callable[[], None], device: torch.device) -> int:
    """Measure peak tensor memory of a call above the baseline."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def peak_flops(device: torch.device) -> dict[str, float]:
    found = {}
    for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items():
        layer = Linear(2048, 2048, bias=False, device=device, dtype=dtype)
        a = torch.randn(2048, 2048, device=device, dtype=dtype)
        with torch.no_grad():
            products = (lambda a=a: a @ a, lambda a=a, layer=layer: layer(a))
            for product in products:
                product()
            fastest = min(clock(product, device, 0.5) for product in products)
        found[name] = 2 * 2048**3 / fastest
    return found


def macs_of(model: nn.Module) -> int:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = getattr(model, "_orig_mod", model)

        def forward(self, images: Tensor) -> Tensor:
            return logits_of(self.model, images)

    sample = torch.zeros(2, 3, 32, 32, device=next(model.parameters()).device)
    torch.backends.mha.set_fastpath_enabled(False)  # its arithmetic is not counted
    try:
        return cost(Logits(), sample).macs // 2
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def compete(
    what: str, batch: int, field: dict[str, Contestant], rounds: int, peaks: dict[str, float]
) -> dict[str, Figures]:
    device = next(field["plain"].model.parameters()).device
    images = torch.randn(batch, 3, 32, 32, device=device)
    works = {name: work(what, contestant, images) for name, contestant in field.items()}
    memory, times = {}, {name: [] for name in works}
    for name, function in works.items():
        function()  # warms up, compiles
        memory[name] = peak_bytes(function, device)
    for _ in range(rounds):
        for name, function in works.items():
            times[name].append(clock(function, device))
    figures = {}
    for name, contestant in field.items():
        seconds = statistics.median(times[name])
        flops = 2 * macs_of(contestant.model) * batch * (3 if what == "train" else 1)
        peak = peaks["bf16" if contestant.bf16 else "float32"]
        ratio = statistics.median(p / t for p, t in zip(times["plain"], times[name], strict=True))
        share = flops / seconds / peak
        figures[name] = Figures(batch / seconds, ratio, share, memory[name])
    return figures


def show(what: str, batch: int, figures: dict[str, Figures]) -> list[str]:
    """Print a table; return missed targets."""
    print(f"{what}, batch {batch:<20} images/s   ratio  of peak    memory")
    wanted, missed = WANTED.get((what, batch == 1), {}), []
    for name, found in figures.items():
        extra = f"{found.peak_bytes / 2**20:8,.0f} MiB"
        line = f"  {name:28}{found.images_per_second:10,.1f} {found.ratio:7.2f} "
        line += f"{found.share_of_peak:7.0%}  {extra}"
        if name in wanted:
            reached = found.ratio >= wanted[name]
            line += f"   wanted {wanted[name]}: {'reached' if reached else 'MISSED'}"
            if not reached:
                missed.append(f"{what}, batch {batch}, {name}")
        print(line, flush=True)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 128, 512])
    parser.add_argument("--only", nargs="+", help="contestants, besides plain")
    parser.add_argument("--quick", action="store_true", help="batches 1 and 16, two rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    batches, rounds = ([1, 16], 2) if arguments.quick else (arguments.batches, arguments.rounds)
    only = None if arguments.only is None else set(arguments.only)
    if arguments.quick and only is None:
        only = {FLOAT, SAVINGS, NO_ATTENTION_DROPOUT, BF16, COMPILED}
    torch.manual_seed(0)
    peaks = peak_flops(device)
    print("peak:", ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in peaks.items()))
    measured: dict[str, Any] = {"peak_flops": peaks, "rounds": rounds}
    missed = []
    for what in ("infer", "train"):
        for batch in batches:
            if (what, batch) == ("train", 1):
                continue  # batch normalisation can't
            field = contestants(device, only)
            if what == "train" and device.type == "cpu":
                field.pop(COMPILED, None)  # minutes of compilation for no gain
            figures = compete(what, batch, field, rounds, peaks)
            missed += show(what, batch, figures) if device.type == "cpu" else []
            if device.type == "cuda":
                show(what, batch, figures)
                best = max(figures[name].share_of_peak for name in (BF16, COMPILED))
                if (what, batch) == ("train", 512) and best < WANTED_SHARE:
                    missed.append(f"{WANTED_SHARE:.0%} of the bfloat16 peak at batch 512")
            measured[f"{what} {batch}"] = {k: v._asdict() for k, v in figures.items()}
            if arguments.out is not None:
                record = {"measured": measured, "provenance": provenance(device)}
                arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print("missed:", "; ".join(missed) if missed else "nothing")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
