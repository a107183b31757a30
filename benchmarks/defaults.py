"""Default settings of every natural-gradient method against AdamW at 1e-3, on common models.

    python benchmarks/defaults.py --seeds 0 1 2    # hours on a core; goes on where it ended
    python benchmarks/defaults.py --cells mlp cnn --methods KFAC EKFAC

Each cell is a model, its data and a batch size; all methods see the same batches for as many steps.
The loss is that of up to 512 training samples in the end, in evaluation mode. "divergence" is the
median real divergence of a step, on its own batch with the same dropout, with batch norm on a batch
that it has not seen, over what ``kl_clip`` promises (κ/2 for each target of a sample); it may be
below 1, as the learning rate limits steps too. Wanted of KFAC, EKFAC and KPSVD: a loss at most 1.1
times AdamW's; of all: no loss above its start, and a divergence at most 2. Results go to ``--out``
after each run. Data are those that come with scikit-learn, so that nothing is fetched; two of the
models need transformers.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from smallfry.curvature import Likelihood, as_likelihood
from smallfry.curvature.identity import mixes_samples
from smallfry.data.curves import read_curves
from smallfry.errors import UsageError
from smallfry.models.autoencoders import Autoencoder
from smallfry.optim import (
    EKFAC,
    KFAC,
    KPSVD,
    SNGD,
    Deflation,
    ExactNG,
    KFACCorrected,
    Lanczos,
    TwoLevel,
)
from smallfry.training.provenance import provenance

KINDS = (KFAC, EKFAC, KPSVD, Deflation, Lanczos, KFACCorrected, TwoLevel, SNGD, ExactNG)
METHODS: dict[str, Any] = {kind.__name__: kind for kind in KINDS}
LEADERS = ("KFAC", "EKFAC", "KPSVD")
PROMISED = 0.005  # κ/2 of the default
MEASURED = 7  # steps; no divisor of the period of refreshes, so that all phases are seen
Loss = Callable[[Any, Tensor], Tensor]


class Task(NamedTuple):
    """Model to train on pairs of inputs and targets."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Loss
    settings: dict[str, Any]  # what the optimizer is told of the loss


class Cell(NamedTuple):
    """Task with batch size and duration."""

    make: Callable[[], Task]
    batch: int
    steps: int


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def digits(model: nn.Module, side: int = 8, channels: int = 1) -> Task:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:1437, None] / 16
    if side != 8:
        images = F.interpolate(images, (side, side), mode="bilinear")
    images = images.expand(-1, channels, -1, -1).contiguous()
    return Task(model, images, torch.tensor(data.target[:1437]), F.cross_entropy, {})


def mlp() -> Task:
    layers = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
    return digits(nn.Sequential(*layers, nn.Linear(32, 10)))


def cnn() -> Task:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    return digits(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))


class Attention(nn.Module):
    """Attention layer of a small character model."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2)
        x = x + self.out(seen.reshape(b, t, d))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class CharacterModel(nn.Module):
    """Character-level language model: attention, or an LSTM."""

    def __init__(self, characters: int, length: int, recurrent: bool, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.recurrent = nn.LSTM(width, width, batch_first=True) if recurrent else None
        self.layers = nn.Sequential(*(Attention(width, 4) for _ in range(0 if recurrent else 2)))
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        if self.recurrent is not None:
            return self.head(self.recurrent(x)[0])
        return self.head(self.layers(x + self.places))


def text(length: int = 32) -> tuple[Tensor, Tensor, int]:
    """Cut windows of English prose, with each character's successor."""
    prose = load_digits().DESCR + load_diabetes().DESCR
    known = sorted(set(prose))
    codes = torch.tensor([known.index(c) for c in prose])
    windows = codes.unfold(0, length + 1, 3)
    return windows[:, :-1], windows[:, 1:], len(known)


def character_model(recurrent: bool) -> Task:
    inputs, targets, count = text()
    model = CharacterModel(count, inputs.shape[1], recurrent)
    return Task(model, inputs, targets, cross_entropy, {"loss_scale": "mean"})


def bert(samples: int) -> Task:
    from transformers import BertConfig, BertForSequenceClassification

    class Logits(BertForSequenceClassification):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).logits

    torch.manual_seed(1)
    tokens = torch.randint(4, 50, (samples, 12))
    # which of four tokens comes most often
    targets = torch.stack([(tokens % 4 == k).sum(1) for k in range(4)], 1).argmax(1)
    config = BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
        num_labels=4,
    )
    return Task(Logits(config), tokens, targets, F.cross_entropy, {})


def gpt2() -> Task:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Logits(GPT2LMHeadModel):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).logits

    inputs, targets, count = text()
    config = GPT2Config(vocab_size=count, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    return Task(Logits(config), inputs, targets, cross_entropy, {"loss_scale": "mean"})


def vitrm() -> Task:
    return digits(timm.create_model("vitrm_micro_patch4_8", num_classes=10))


def of_timm(name: str, **settings: Any) -> Callable[[], Task]:
    def make() -> Task:
        return digits(timm.create_model(name, num_classes=10, **settings), 32, 3)

    return make


def autoencoder(of: str) -> Task:
    def loss(logits: Tensor, images: Tensor) -> Tensor:
        whole = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
        return whole / len(images)

    if of == "digits":
        images = digits(nn.Identity()).inputs.flatten(1)
        sizes: Sequence[int] = (64, 100, 50, 10)
    else:
        train = read_curves().splits["train"]
        drawn = [torch.as_tensor(train.read(i)) for i in range(2000)]
        images = torch.stack(drawn).float().flatten(1) / 255
        sizes = (784, 200, 100, 50, 6)
    return Task(Autoencoder(sizes), images, images, loss, {"likelihood": "bernoulli"})


def regression() -> Task:
    data = load_diabetes()
    inputs = torch.tensor(data.data, dtype=torch.float32)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = torch.tensor(data.target, dtype=torch.float32)[:, None]
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    settings = {"likelihood": "gaussian", "loss_scale": "mean"}
    return Task(nn.Sequential(model, nn.Linear(64, 1)), inputs, targets, F.mse_loss, settings)


STEPS = {4: 400, 16: 400, 64: 300, 512: 150}
CELLS: dict[str, Cell] = {
    **{f"mlp {batch}": Cell(mlp, batch, steps) for batch, steps in STEPS.items()},
    **{f"cnn {batch}": Cell(cnn, batch, steps // 2) for batch, steps in STEPS.items()},
    "transformer": Cell(lambda: character_model(False), 16, 200),
    "lstm": Cell(lambda: character_model(True), 16, 200),
    "bert 6": Cell(lambda: bert(6), 6, 60),
    "bert 32": Cell(lambda: bert(512), 32, 150),
    "gpt2": Cell(gpt2, 16, 150),
    "vitrm": Cell(vitrm, 32, 120),
    "mobilenet": Cell(of_timm("mobilenetv3_small_050"), 16, 80),
    "convnext": Cell(of_timm("convnext_atto"), 16, 60),
    "vit": Cell(of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8), 16, 80),
    "autoencoder digits": Cell(lambda: autoencoder("digits"), 64, 300),
    "autoencoder curves": Cell(lambda: autoencoder("curves"), 128, 200),
    "regression": Cell(regression, 32, 300),
}


def train(name: str, method: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Train one model by one method.

    Returns:
        ``start`` and ``loss``; ``divergence`` over what was promised; ``seconds``. Where the
        method can't be built for the model, ``refused`` with the reason instead.
    """
    cell = CELLS[name]
    torch.manual_seed(seed)
    task = cell.make()
    steps = cell.steps if steps is None else steps
    likelihood = as_likelihood(task.settings.get("likelihood", "categorical"))
    began, moved, start = time.perf_counter(), list[float](), _loss(task)
    try:
        if method == "AdamW":
            optimizer: Any = torch.optim.AdamW(task.model.parameters(), 1e-3)
        else:
            optimizer = METHODS[method](task.model, **task.settings)
        picks, others = (torch.Generator().manual_seed(one) for one in (seed, seed + 1000))
        batches_mix = mixes_samples(task.model)
        for step in range(steps):
            chosen = torch.randperm(len(task.inputs), generator=picks)[: cell.batch]
            inputs, targets = task.inputs[chosen], task.targets[chosen]
            random = torch.get_rng_state()
            output = task.model(inputs)
            optimizer.zero_grad()
            task.loss(output, targets).backward()
            measured = step % MEASURED == 2
            if measured and batches_mix:
                chosen = torch.randperm(len(task.inputs), generator=others)[: cell.batch]
                inputs, targets = task.inputs[chosen], task.targets[chosen]
                output = _again(task.model, inputs, random)
            z = output.detach().requires_grad_()
            (residual,) = torch.autograd.grad(task.loss(z, targets), z)
            optimizer.step()
            if measured:
                after = _again(task.model, inputs, random)
                moved.append(_divergence(task, likelihood, output.detach(), after, residual))
    except UsageError as error:
        return {"refused": str(error)}
    return {
        "start": start,
        "loss": _loss(task),
        "divergence": statistics.median(moved) / PROMISED if moved else None,
        "steps": steps,
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def _loss(task: Task) -> float:
    """Compute the loss over the first training samples."""
    task.model.eval()
    loss = float(task.loss(task.model(task.inputs[:512]), task.targets[:512]))
    task.model.train()
    return loss if math.isfinite(loss) else math.inf


@torch.no_grad()
def _again(model: nn.Module, inputs: Tensor, random: Tensor) -> Tensor:
    """Run a model in training mode with a given state of the generator, and leave no trace."""
    with torch.random.fork_rng():
        torch.set_rng_state(random)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, buffers, (inputs,))


@torch.no_grad()
def _divergence(
    task: Task, likelihood: Likelihood, before: Tensor, after: Tensor, residual: Tensor
) -> float:
    """Compute the divergence of a step from outputs before and after it, per target."""
    scale = task.settings.get("loss_scale", 1.0)
    factor = likelihood.mean_factor((before,)) if scale == "mean" else float(scale)
    targets = likelihood.targets((before,), (residual * len(before) / factor,))
    found = float(likelihood.divergence((before,), (after,)).mean()) / targets
    return found if math.isfinite(found) else math.inf


def failures(results: dict[str, Any], longest: float = 2.0) -> list[str]:
    """List missed targets; ``longest`` is the largest ratio of divergence to its bound."""
    found = []
    for key, one in results.items():
        name, method, seed = key.split("/")
        adamw = results.get(f"{name}/AdamW/{seed}")
        if method == "AdamW" or "loss" not in one:
            continue
        if not one["loss"] <= one["start"]:
            found.append(f"{key}: {one['loss']:.4g} is above its start {one['start']:.4g}")
        if method in LEADERS and adamw and not one["loss"] <= 1.1 * adamw["loss"]:
            found.append(f"{key}: {one['loss']:.4g} is above 1.1 × AdamW's {adamw['loss']:.4g}")
        if one["divergence"] is not None and not one["divergence"] <= longest:
            found.append(f"{key}: the divergence is {one['divergence']:.2f} times the promised")
    return found


def table(results: dict[str, Any]) -> str:
    """Tabulate losses, with divergences, the worst over seeds."""
    methods = ["AdamW", *METHODS]
    lines = ["| cell | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name in CELLS:
        row = []
        for method in methods:
            runs = [r for k, r in results.items() if k.startswith(f"{name}/{method}/")]
            if not runs:
                row.append("")
            elif "refused" in runs[0]:
                row.append("refused")
            else:
                moved = [r["divergence"] for r in runs if r["divergence"] is not None]
                row.append(f"{max(r['loss'] for r in runs):.3g} ({max(moved, default=0):.2g})")
        if any(row):
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", nargs="+", default=[""], help="Parts of names of cells.")
    parser.add_argument("--methods", nargs="+", choices=["AdamW", *METHODS], default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("results/defaults.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())["measured"]
    for seed in arguments.seeds:
        for name in (n for n in CELLS if any(part in n for part in arguments.cells)):
            if name.split()[0] in ("bert", "gpt2") and not importlib.util.find_spec("transformers"):
                print(f"{name}: skipped, as transformers is not installed", flush=True)
                continue
            for method in ["AdamW", *arguments.methods]:
                key = f"{name}/{method}/{seed}"
                if key in results:
                    continue
                results[key] = train(name, method, seed)
                print(key, results[key], flush=True)
                record = {"measured": results, "provenance": provenance(torch.device("cpu"))}
                arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))
    wrong = failures(results)
    print("\n".join(wrong) or "All that was wanted is so.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
