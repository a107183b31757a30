"""Smoke test of all features on CUDA against the CPU, a part of benchmarks/gpu.py.

Each check is a process of its own, all at the same time, so that the minute is spent computing. A
rehearsal has the CPU in the place of the GPU, and another seed of the optimizers' random draws.
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from gpu_common import HERE, TINY, Record, Settings, fit, noise, read_settings, readable
from torch import Tensor, nn
from torch.nn import functional as F

from smallfry import cli
from smallfry.data import load_data
from smallfry.errors import Stopped
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import (
    AugmentConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from smallfry.training.objective import Batch, DeepSupervision
from smallfry.training.optimization import NATURAL
from smallfry.training.progress import QuietReporter

ITERATIVE = ("rank", "pcg", "lanczos", "deflation")  # methods that stop at a tolerance
DIGITS = 400  # images: six steps an epoch
Outcome = dict[str, Any]


# Against the CPU


def optimizers(settings: Settings) -> Outcome:
    """Compare losses, weights and factors of every method, in float64, without sampled targets."""
    methods = _module(HERE / "tests" / "optim" / "conftest.py").METHODS
    net = _module(HERE / "tests" / "mixed_net.py").Net
    random = torch.Generator().manual_seed(3)
    x = torch.randn(48, 5, generator=random, dtype=torch.float64)
    y = (x @ torch.randn(5, 3, generator=random, dtype=torch.float64)).argmax(1)
    torch.manual_seed(0)
    base, found, wrong = net().double(), {}, []
    for name, (kind, fixed) in methods.items():
        try:
            ends = [
                _steps(kind, fixed, deepcopy(base), x, y, device, seed)
                for seed, device in enumerate(("cpu", settings.device))
            ]
            apart = [_apart(a, b) for a, b in zip(*ends, strict=True)]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:1000]
            wrong.append(name)
            continue
        found[name] = dict(zip(("losses", "weights", "factors"), apart, strict=True))
        tolerance = 1e-3 if any(word in name for word in ITERATIVE) else 1e-6
        if not max(apart[:2]) <= tolerance:
            wrong.append(name)
    return _judged(found, wrong, f"{len(found)} methods")


def _steps(
    kind: Any, fixed: dict[str, Any], model: nn.Module, x: Tensor, y: Tensor, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    model, x, y = model.to(device), x.to(device), y.to(device)
    settings = {"burn_in": 0, "statistics_every": 2, "fisher": "exact", "seed": seed, **fixed}
    optimizer = kind(model, lr=0.1, **settings)
    losses = []
    for step in range(6):
        part = slice(16 * (step % 3), 16 * (step % 3) + 16)
        loss = F.cross_entropy(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.counters["failed_refreshes"] == 0, optimizer.counters
    weights = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    factors = [
        torch.linalg.vector_norm(value.double()).cpu().view(1)  # bases may turn, lengths stay
        for state in optimizer.curvature.values()
        for _, value in sorted(state.items())
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    return torch.tensor(losses), weights, torch.cat(factors or [torch.ones(1)])


def _apart(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return math.inf
    distance = (first - second).norm() / first.norm().clamp_min(1e-300)
    return math.inf if distance.isnan() else distance.item()


def models(settings: Settings) -> Outcome:
    """Compare outputs and gradients of a training step without dropout, in float64 and float32."""
    torch.backends.cudnn.allow_tf32 = False
    names = ["vitrm_small_patch4_32", "vitrm_thrifty_patch4_32", "vitrm_plus_small_32"]
    names += ["cct_7_3x1_32", "resnet18_cifar"]
    if settings.rehearse:
        names = ["vitrm_tiny_patch4_32", "resnet18_cifar"]
    found, wrong = {}, []
    for name in names:
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
            torch.manual_seed(0)
            model = without_chance(timm.create_model(name, drop_rate=0.0)).to(dtype)
            images = torch.randn(4, 3, 32, 32, dtype=dtype)
            ends = [
                _gradients(deepcopy(model).to(d), images.to(d)) for d in ("cpu", settings.device)
            ]
            apart = max(_apart(a, b) for a, b in zip(*ends, strict=True))
            found[f"{name} {dtype}".replace("torch.", "")] = apart
            if not apart <= tolerance:
                wrong.append(f"{name} {dtype} {apart:.1e}")
    return _judged(found, wrong, f"{len(found)} comparisons, apart by {max(found.values()):.1e}")


def without_chance(model: nn.Module) -> nn.Module:
    """Disable dropout and stochastic depth, whose draws differ between devices."""
    for module in model.modules():
        for name in ("p", "drop_prob", "attn_drop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    labels = torch.arange(len(images), device=images.device)
    targets = F.one_hot(labels, 10).to(images.dtype)
    batch = Batch(images, ClassTargets(labels, targets))
    if hasattr(model, "advance"):
        objective = DeepSupervision(Classification())
        step = next(iter(objective(objective.prepare(model), batch)))
        loss, output = step.loss, step.logits
    else:
        output = model(images)
        loss = F.cross_entropy(output, targets)
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [output.detach().cpu().double(), torch.cat(gradients).cpu().double()]


# Training


def digits(settings: Settings, *options: str) -> Outcome:
    """Run ``smallfry train`` on digits, and its model on the CPU afterwards."""
    run = _fresh(settings)
    words = ["train", "--device", settings.device, "--run", str(run), "--references", "false"]
    words += ["--epochs", "2"] if settings.rehearse else []
    code = cli.main([*words, *options, "--debug"])
    assert code == 0, f"exit code {code}"
    summary = json.loads((run / "summary.json").read_text())["measured"]
    accuracy, seconds = summary["test"]["accuracy"], summary["training_seconds"]
    from smallfry.deploy.pretrained import load_trained
    from smallfry.training.evaluation import predict, score
    from smallfry.training.evaluation_data import load_like

    trained = load_trained(str(run))
    _, split, _ = load_like(trained, str(run))
    again = score(predict(trained.model, split, trained.normalize))["accuracy"]
    wrong = [] if abs(again - accuracy) < 0.01 else [f"{again:.4f} on the CPU"]
    if accuracy < 0.97 and not settings.rehearse:  # CPU seeds: 99.2 to 99.7 %
        wrong.append("accuracy")
    found = {"accuracy": accuracy, "on the CPU": again, "training_seconds": seconds}
    return _judged(found, wrong, f"accuracy {accuracy:.2%} in {seconds:.0f} s")


def natural(settings: Settings) -> Outcome:
    """Train two epochs of digits with every optimizer of the natural-gradient family."""
    found, wrong, images = {}, [], load_data("digits", limit=DIGITS)
    for name in NATURAL:
        optimizer = OptimizerConfig(name, lr=0.02, options={"damping": 1.0})
        config = _small(settings, optimizer=optimizer, run=_fresh(settings, name))
        began = time.monotonic()
        try:
            rows = fit(config, images).progress.history  # raises if a loss is not finite
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:1000]
            wrong.append(name)
            continue
        losses = [row["train_loss"] for row in rows]
        found[name] = {"losses": losses, "seconds": time.monotonic() - began}
    return _judged(found, wrong, f"{len(found)} optimizers")


def _small(settings: Settings, **changes: Any) -> TrainConfig:
    """Build two epochs of digits with all sources of randomness."""
    small = TINY | {"latent_steps": 2}
    return replace(
        TrainConfig(
            model=ModelConfig(options=small, drop_rate=0.1),
            augment=AugmentConfig(crop_padding=1, flip=True, mixup=0.2, cutmix=1.0),
            objective=ObjectiveConfig(supervision_steps=2),
            epochs=2,
            batch_size=64,
            device=settings.device,
            checkpoint_seconds=1000.0,
            references=False,
            progress="quiet",
        ),
        **changes,
    )


# Resuming


class _StopAt(QuietReporter):
    """Sends this process a signal after some steps."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, loss: float, images_per_second: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def resumption(settings: Settings, kinds: Sequence[str], modes: Sequence[str]) -> Outcome:
    """Compare repeated and resumed runs bit for bit.

    First as they are, then with PyTorch's deterministic algorithms: GPUs add in any order where
    nothing forbids it, so a difference is a fault of resuming only where two runs are alike.
    """
    found, wrong = {}, []
    for mode in modes:
        torch.use_deterministic_algorithms(mode == "deterministic", warn_only=True)
        for name in kinds:
            base = _fresh(settings, f"{mode}-{name}")
            try:
                same = _three_runs(settings, base, KINDS[name])
            except Exception as error:
                found[f"{name}, {mode}"] = f"{type(error).__name__}: {error}"[:1000]
                wrong.append(f"{name}, {mode}")
                continue
            found[f"{name}, {mode}"] = same
            if same["twice"] and not same["resumed"]:
                wrong.append(f"{name}, {mode}")
    alike = [k for k, v in found.items() if isinstance(v, dict) and v["resumed"]]
    return _judged(found, wrong, f"{len(alike)} of {len(found)} the same to the bit: {alike}")


KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, bf16, RandAugment": {
        "precision": "bf16-mixed",
        "augment": AugmentConfig(crop_padding=1, flip=True, randaugment_ops=1),
    },
    "kfac": {"optimizer": OptimizerConfig("kfac")},
    "convolutions": {
        "model": ModelConfig("resnet10t", options={"stem_width": 8}),
        "objective": ObjectiveConfig("cross_entropy"),
    },
    "adamw, compiled": {"compile": True},
}


def _three_runs(settings: Settings, base: Path, changes: dict[str, Any]) -> dict[str, bool]:
    data = load_data("digits", limit=DIGITS)

    def told(name: str) -> TrainConfig:
        return _small(settings, **changes, run=base / name)

    fit(told("one"), data)
    fit(told("two"), data)
    try:
        fit(told("parted"), data, _StopAt(8))  # in the second epoch
    except Stopped:
        fit(told("parted"), data, checkpoint=base / "parted" / "last")
    else:
        raise AssertionError("the run did not stop")
    one, two, parted = (_weights(base / name) for name in ("one", "two", "parted"))
    return {"twice": _equal(one, two), "resumed": _equal(one, parted)}


def _weights(run: Path) -> dict[str, Tensor]:
    checkpoint = load_checkpoint(run / "last")
    assert checkpoint.trainer is not None
    return checkpoint.weights | {f"raw {k}": v for k, v in checkpoint.trainer["weights"].items()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


# Getting ready


def data(settings: Settings) -> Outcome:
    """Check the table library on available CIFAR-10, or noise."""
    return readable(settings)


def compiled(settings: Settings, form: str) -> Outcome:
    """Compile the step of ViTRM small on noise, measure the cost, and fill the caches."""
    from gpu_parts import fitted, forms

    rows, facts = fitted(forms(settings)[form], _fresh(settings), noise(settings), epochs=3)
    took = [row["seconds"] for row in rows]
    compiling = took[0] - (took[1] - took[0])
    brief = f"{rows[-1]['images_per_second']:,.0f} images/s beside others, {compiling:.0f} s before"
    return {"brief": brief, "rows": rows, **facts}


CHECKS: dict[str, Callable[[Settings], Outcome]] = {
    "data": data,
    "models": models,
    "optimizers": optimizers,
    "compiled short": lambda s: compiled(s, "512"),
    "compiled strong": lambda s: compiled(s, "512, strong"),
    "digits float32": digits,
    "digits bf16 compiled": lambda s: digits(
        s, "--precision", "bf16-mixed", "--compile", "true", "--epochs", "2" if s.rehearse else "30"
    ),
    "natural": natural,
    "resumption": lambda s: resumption(s, list(KINDS)[:-1], ("as it is", "deterministic")),
    "resumption compiled": lambda s: resumption(s, list(KINDS)[-1:], ("as it is",)),
}


def _judged(found: dict[str, Any], wrong: list[str], brief: str) -> Outcome:
    if wrong:
        raise AssertionError(f"{found}\nwrong: {'; '.join(wrong)}")
    return {"brief": brief, "found": found}


def _fresh(settings: Settings, name: str = "run") -> Path:
    """Return an unused run folder."""
    word = f"{settings.check}-{name}".replace(" ", "-").replace(",", "")
    return settings.scratch / "smoke" / f"{word}-{os.getpid()}"


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"from_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def together(settings: Settings) -> int:
    """Run all checks, each in its process, and record the finished ones."""
    record = Record(settings)
    chosen = [settings.check] if settings.check else list(CHECKS)
    at_once = 2 if settings.rehearse else len(chosen)
    folder = settings.scratch / "checks"
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running = list(chosen), dict[str, subprocess.Popen[bytes]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            running[name] = _start(settings, name, folder)
        late = settings.left < 5
        for name, child in list(running.items()):
            if late and child.poll() is None:
                child.kill()
                child.wait()
            if child.poll() is not None:
                del running[name]
                record[name] = _outcome(folder / f"{name}.json", child, late)
        if late:
            for name in waiting:
                record[name] = {"error": "not begun: out of seconds"}
            break
        time.sleep(0.2)
    return int(record.failed)


def _start(settings: Settings, name: str, folder: Path) -> "subprocess.Popen[bytes]":
    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, f"one:{name}", f"--until={settings.until:.1f}"]
    command += [f"--file={file}", f"--scratch={settings.scratch}", f"--device={settings.device}"]
    command += [f"--root={settings.root}"] if settings.root is not None else []
    command += ["--rehearse"] if settings.rehearse else []
    threads = {"OMP_NUM_THREADS": "1" if settings.rehearse else "4"}
    threads["TORCHINDUCTOR_COMPILE_THREADS"] = "8"  # of each of four that compile
    fixed = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if "resumption" in name else {}
    return subprocess.Popen(command, env=os.environ | threads | fixed)


def _outcome(file: Path, child: "subprocess.Popen[bytes]", late: bool) -> dict[str, Any]:
    try:
        found: dict[str, Any] = next(iter(json.loads(file.read_text()).values()))
    except (OSError, ValueError, StopIteration):
        why = "out of seconds" if late else "see the log"
        found = {"error": f"ended with {child.returncode} before its figures: {why}"}
    return found


def main() -> int:
    settings = read_settings()
    if not settings.part.startswith("one:"):
        return together(settings)
    name = settings.part.removeprefix("one:")
    settings = settings._replace(check=name)
    record = Record(settings)
    record.attempt(name, lambda: CHECKS[name](settings))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
