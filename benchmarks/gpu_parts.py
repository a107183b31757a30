"""Measuring parts of benchmarks/gpu.py: speed, accuracy, fast, optimizers, rivals, tests."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu import read
from gpu_common import (
    HERE,
    Record,
    Settings,
    fit,
    noise,
    read_settings,
    readable,
    recipe,
    synchronize,
)

from smallfry import cost
from smallfry.data import ImageData
from smallfry.errors import Stopped
from smallfry.training import train as training
from smallfry.training.config import AugmentConfig, ScheduleConfig, TrainConfig
from smallfry.training.evaluation import predict, score
from smallfry.training.evaluation_data import load_config_data
from smallfry.training.progress import PlainReporter, QuietReporter
from smallfry.training.provenance import provenance
from smallfry.training.run import RunFolder, load_run

DATASHEET = 989e12  # operations a second of an H100 in bfloat16, without sparsity
PAPER_ACCURACY = 0.931  # reported, best test epoch of 1,000
STRONG = AugmentConfig(crop_padding=4, flip=True, randaugment_ops=1, mixup=0.2, cutmix=1.0)
RECIPES_BATCH = 128  # that the rates of recipes/short are for
FAST_EPOCHS = (12, 19, 30, 45)  # of LoopNet, until one reaches FAST_ACCURACY
FAST_ACCURACY = 0.94  # without flips at the test
FAST_OVERHEAD = 12.0  # seconds of a run beside its epochs
OVERHEAD = 55.0  # seconds beside the epochs: start, compilation, test, pictures, grace
MOST_FILE = 15 * 2**20  # bytes of what is handed back in one file


def forms(settings: Settings) -> dict[str, TrainConfig]:
    """List the forms of ViTRM small to time, all through the training loop."""
    short = recipe(settings, "short/vitrm_small_cifar10", batch_size=512)
    paper = replace(short, augment=replace(STRONG, randaugment_ops=2))
    strong = replace(short, augment=STRONG, model=replace(short.model, drop_rate=0.0))
    return {
        "512": short,
        "512, strong": strong,
        "512, strong, loader": replace(strong, resident=False),
        "256, strong, loader": replace(strong, resident=False, batch_size=short.batch_size // 2),
        "1024": replace(short, batch_size=2 * short.batch_size),
        "512, eager": replace(short, compile=False),
        "512, RandAugment twice": paper,
    }


def fitted(
    config: TrainConfig, run: Path, data: ImageData, epochs: int
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train for some epochs without a test; return rows and cost."""
    config = replace(config, epochs=epochs, run=run, schedule=ScheduleConfig(epochs / 4))
    cuda = config.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    trainer = fit(config, data)
    device = trainer.batches.split.rows.device.type
    facts = {
        "images on": device,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "train images": trainer.batches.steps_per_epoch * trainer.batches.batch_size,
        "macs": _macs(trainer.raw_model),
    }
    return trainer.progress.history, facts


def _macs(model: torch.nn.Module) -> int:
    device = next(model.parameters()).device
    return cost(model, torch.zeros(1, 3, 32, 32, device=device)).macs


# Speed


def speed(settings: Settings, record: Record) -> None:
    """Measure epochs of every form, device peaks, and the breakdown of a step."""
    record.attempt("data", lambda: readable(settings))
    found = record.attempt("peaks", lambda: peaks(settings))
    peak = (found or {}).get("bf16", DATASHEET)
    try:
        config = recipe(settings, "short/vitrm_small_cifar10")
        data = load_config_data(config.data)
    except Exception as error:
        record["noise instead of CIFAR-10"] = repr(error)
        data = noise(settings, 45_056)
    for name, form in forms(settings).items():
        if settings.left < 25:
            record[name] = {"error": "left out: out of seconds"}
            continue
        run = settings.scratch / "speed" / f"{name.replace(', ', '-')}-{os.getpid()}"
        record.attempt(name, lambda form=form, run=run: _epoch(form, run, data, peak))
        if name == "1024":
            record.attempt("kernels", lambda: kernels(settings, data))
            record.attempt("augmentation", lambda: augmentation(settings, data))


def _epoch(form: TrainConfig, run: Path, data: ImageData, peak: float) -> dict[str, Any]:
    rows, facts = fitted(form, run, data, epochs=3)
    stamps = [row["seconds"] for row in rows]
    epoch = min(b - a for a, b in pairwise(stamps))
    speed = max(row["images_per_second"] for row in rows[1:])
    operations = 6 * facts["macs"] * speed  # three forward passes' worth, two an accumulation
    brief = f"{speed:,.0f} images/s, epoch {epoch:.2f} s, first {stamps[0]:.0f} s"
    brief += f", MFU {operations / DATASHEET:.1%} of 989, {operations / peak:.1%} of measured"
    return {
        "brief": brief,
        "epoch_seconds": epoch,
        "seconds_for_image": epoch / facts["train images"],
        "images_per_second": speed,
        "mfu_datasheet": operations / DATASHEET,
        "mfu_measured": operations / peak,
        "rows": rows,
        **facts,
    }


def peaks(settings: Settings) -> dict[str, Any]:
    """Measure peak operations a second of large products, and bytes a second of a copy."""
    side = 256 if settings.rehearse else 8192
    found: dict[str, Any] = {}
    for name, dtype in {"bf16": torch.bfloat16, "float32": torch.float32}.items():
        a, b = (torch.randn(side, side, device=settings.device, dtype=dtype) for _ in range(2))
        found[name] = 2 * side**3 / clock(lambda a=a, b=b: a @ b, settings.device)
    many = torch.randn(2**18 if settings.rehearse else 2**29, device=settings.device)
    other = torch.empty_like(many)
    copied = clock(lambda: other.copy_(many), settings.device)
    found["copy"] = 2 * many.nbytes / copied
    told = f"{found['bf16'] / 1e12:.0f} and {found['float32'] / 1e12:.0f} TFLOP/s"
    return found | {"brief": f"bf16 and float32 {told}, copy {found['copy'] / 1e12:.2f} TB/s"}


def clock(function: Callable[[], Any], device: str, repeats: int = 20) -> float:
    """Measure the median seconds of synchronised calls."""
    times = []
    for number in range(repeats + 3):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        if number >= 3:
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def augmentation(settings: Settings, data: ImageData) -> dict[str, Any]:
    """Measure milliseconds to augment a batch of 512 on the device."""
    from smallfry.training.augment import Augment
    from smallfry.training.batches import TrainBatches, resident

    images = resident(data.train, torch.device(settings.device), None)
    found: dict[str, Any] = {}
    for name, config in {
        "crop and flip": AugmentConfig(4, True, mixup=0.0, cutmix=0.0),
        "and mixing": AugmentConfig(4, True),
        "and RandAugment": STRONG,
    }.items():
        augment = Augment(config, 32, 10, data.mean, data.std, True)
        batches = TrainBatches(images, augment, 512, 0)
        count = iter(range(10**6))
        found[name] = 1e3 * clock(lambda b=batches, c=count: b[next(c)], settings.device)
    return found | {"brief": ", ".join(f"{k} {v:.2f} ms" for k, v in found.items())}


def kernels(settings: Settings, data: ImageData) -> dict[str, Any]:
    """Profile twelve steps of the loop by kernel, with idle time."""
    from torch.profiler import ProfilerActivity, profile

    form = forms(settings)["512, strong, loader"]
    run = settings.scratch / "speed" / f"kernels-{os.getpid()}"
    steps = 2 if settings.rehearse else 12
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if settings.device == "cuda" else []
    traced = profile(activities=activities, acc_events=True)
    spent: dict[str, Any] = {}

    class Watching(QuietReporter):
        done = 0

        def step(self, loss: float, images_per_second: float) -> None:
            self.done += 1
            if self.done == 12:  # compiled and warm
                synchronize(settings.device)
                traced.start()
                spent["from"] = time.perf_counter()
            if self.done == 12 + steps:
                synchronize(settings.device)
                spent["wall"] = time.perf_counter() - spent["from"]
                traced.stop()
                raise KeyboardInterrupt

    torch.compiler.reset()
    with contextlib.suppress(KeyboardInterrupt):
        fit(replace(form, epochs=20 if settings.rehearse else 1, run=run), data, Watching())
    rows = sorted(traced.key_averages(), key=_device_time, reverse=True)
    total = sum(map(_device_time, rows)) / 1e6
    top = [[round(_device_time(e) / 1e3 / steps, 3), e.count, e.key[:110]] for e in rows[:40]]
    wall = spent["wall"]
    brief = f"{1e3 * wall / steps:.2f} ms a step traced, kernels {1e3 * total / steps:.2f} ms"
    return {"brief": brief, "busy": total / wall, "milliseconds, calls, kernel": top}


def _device_time(event: Any) -> float:
    """Sum microseconds of kernels alone, without the enclosing calls."""
    from torch.autograd import DeviceType

    marks = ("Optimizer.", "##", "Torch-Compiled", "ProfilerStep")
    marked = getattr(event, "is_user_annotation", False) or event.key.startswith(marks)
    is_kernel = event.device_type == DeviceType.CUDA and not marked
    return float(event.self_device_time_total) if is_kernel else 0.0


# Accuracy


def accuracy(settings: Settings, record: Record) -> None:
    """Train ViTRM small for as many epochs as fit, by the epochs that ``speed`` timed."""
    record.attempt("data", lambda: readable(settings))
    form, epoch = _fastest(settings, record) or _timed(
        settings, record, forms(settings)["512, strong, loader"]
    )
    _train_for(settings, record, form, epoch)


def rivals(settings: Settings, record: Record) -> None:
    """Train another model of recipes/short in the remaining time, equally augmented."""
    record.attempt("data", lambda: readable(settings))
    name = settings.model or "cct_7_3x1"
    rival = recipe(
        settings, f"short/{name}_cifar10", augment=STRONG, batch_size=512, resident=False
    )
    _train_for(settings, record, *_timed(settings, record, rival))


def fast(settings: Settings, record: Record) -> None:
    """Train LoopNet 2m by the fast recipe in more and more epochs, until it is good enough."""
    record.attempt("data", lambda: readable(settings))
    form = recipe(settings, "fast/loopnet_2m_cifar10", compile=False)
    epoch = 0.0  # seconds, at least; known after the first run
    for epochs in (1, 2) if settings.rehearse else FAST_EPOCHS:
        if settings.left < FAST_OVERHEAD + epochs * epoch:
            record[f"{epochs} epochs"] = {"error": "left out: out of seconds"}
            return
        run = settings.scratch / f"fast-{epochs}-{os.getpid()}"
        config = replace(form, epochs=epochs, run=run)
        found = record.attempt(f"{epochs} epochs", lambda c=config: _fast(c))
        if found is None or found["test"]["accuracy"] >= FAST_ACCURACY:
            return
        epoch = found["seconds"] / epochs


def _fast(config: TrainConfig) -> dict[str, Any]:
    found = _train(config)
    seconds, test = found["rows"][-1]["seconds"], found["test"]["accuracy"]
    flips = found.get("summary", {}).get("test_flips", {}).get("accuracy")
    brief = f"test accuracy {test:.2%}" + ("" if flips is None else f", with flips {flips:.2%}")
    return found | {"seconds": seconds, "brief": f"{brief}, {seconds:.1f} s of training"}


def _train_for(settings: Settings, record: Record, form: TrainConfig, epoch: float) -> None:
    """Choose the epochs, train and test."""
    data = replace(form.data, validation=0.05)  # more to train on
    epoch *= (1 - data.validation) / (1 - form.data.validation)
    seconds = 0.95 * (settings.left - OVERHEAD)  # a twentieth for what drifts
    epochs = 2 if settings.rehearse else max(2, math.floor(seconds / epoch))
    assert form.optimizer.lr is not None
    lr = form.optimizer.lr * math.sqrt(form.batch_size / RECIPES_BATCH)
    config = replace(
        form,
        data=data,
        epochs=epochs,
        run=settings.scratch / f"{settings.part}-{os.getpid()}",
        optimizer=replace(form.optimizer, lr=lr),
        schedule=ScheduleConfig(warmup_epochs=max(1.0, epochs / 20)),
    )
    record["planned"] = {
        "brief": f"{epochs} epochs of {epoch:.2f} s, batch {config.batch_size}, rate {lr:.1e}",
        "config": config.to_dict(),
    }
    record.attempt("trained", lambda: _train(config))
    record.attempt("handed back", lambda: _hand_back(settings, config))


def _fastest(settings: Settings, record: Record) -> tuple[TrainConfig, float] | None:
    """Return the form with the shortest epochs in ``speed``, if any."""
    timed = read(settings.file.parent / "speed.json")
    half = "256, strong, loader"
    names = ("512, strong, loader", half, "512, strong")
    found = [(name, timed.get(name, {}).get("epoch_seconds")) for name in names]
    times = {name: seconds for name, seconds in found if seconds is not None}
    if not times:
        return None
    name = min(times, key=times.__getitem__)
    if times.get(half, math.inf) < 1.08 * times[name]:
        name = half  # twice the steps for hardly more seconds
    record["form"] = name
    return forms(settings)[name], times[name]


def _timed(settings: Settings, record: Record, form: TrainConfig) -> tuple[TrainConfig, float]:
    """Return the form and its seconds per epoch, eager if it does not compile."""
    data = load_config_data(form.data)
    for name, config in (("timing", form), ("timing, eager", replace(form, compile=False))):
        run = settings.scratch / f"{settings.part}-{name.replace(', ', '-')}-{os.getpid()}"
        found = record.attempt(name, lambda c=config, r=run: _epoch(c, r, data, DATASHEET))
        if found is not None:
            return config, found["epoch_seconds"]
    raise RuntimeError("no form of the model trains here")


def _train(config: TrainConfig) -> dict[str, Any]:
    assert config.run is not None
    stopped, failed = None, None
    try:
        measured = training.train(config, PlainReporter())["measured"]
        facts = {"test": measured["test"], "summary": measured}
    except Stopped as stop:
        stopped, facts = str(stop), _tested(config)
    except Exception as error:
        if not RunFolder(config.run).best.exists():
            raise
        failed, facts = repr(error)[:2000], _tested(config)
    rows = RunFolder(config.run).read_metrics()
    reached = facts["test"]["accuracy"]
    last = rows[-1]
    brief = f"test accuracy {reached:.2%} (paper, 1,000 epochs: {PAPER_ACCURACY:.1%}) after "
    brief += f"{len(rows)} of {config.epochs} epochs, {last['seconds']:.0f} s of training"
    evidence = provenance(torch.device(config.device))
    more = {"stopped": stopped, "failed": failed, "rows": rows, "provenance": evidence}
    return {"brief": brief, **facts, **more}


def _tested(config: TrainConfig) -> dict[str, Any]:
    """Test the best weights so far of an unfinished run."""
    assert config.run is not None
    trained = load_run(config.run, "best")
    data = load_config_data(config.data)
    device = torch.device(config.device)
    found = predict(trained.model.to(device), data.test, trained.normalize, device)
    return {"test": score(found)}


def _hand_back(settings: Settings, config: TrainConfig) -> dict[str, Any]:
    """Pack the run into one file, without the state for resuming."""
    run = config.run
    assert run is not None
    file = settings.file.with_name(f"{settings.part}_run.tar.gz")
    kept = ("config.yaml", "metrics.csv", "summary.json", "pictures", "best")
    for names in (kept, kept[:3]):
        with tarfile.open(file, "w:gz") as archive:
            for name in names:
                if (run / name).exists():
                    archive.add(run / name, arcname=f"run/{name}")
        if file.stat().st_size < MOST_FILE:
            break
    return {"brief": f"{file.name}, {file.stat().st_size / 1e6:.1f} MB"}


# Optimizers


def optimizers(settings: Settings, record: Record) -> None:
    """Run benchmarks/optim.py for each network, the small ones first."""
    for network in "cab":
        if settings.left < 15:
            record[network] = {"error": "left out: out of seconds"}
            continue
        record.attempt(network, lambda n=network: _ratios(settings, n))


def _ratios(settings: Settings, network: str) -> dict[str, Any]:
    file = settings.scratch / f"optim_{network}.json"
    file.unlink(missing_ok=True)
    words = ["--only", network, "--device", settings.device, "--out", str(file)]
    words += ["--rounds", "1" if settings.rehearse else "5", "--threads", "4"]
    words += [] if settings.rehearse else ["--more", "KPSVD", "EKFAC"]
    _call(
        [sys.executable, str(HERE / "benchmarks" / "optim.py"), *words], settings.left - 4, (0, 1)
    )
    found: dict[str, Any] = json.loads(file.read_text())
    shown = [f"{k} {v['ratio every 10']:.2f}" for k, v in found["measured"][network].items()]
    return {"brief": "every 10, over AdamW's: " + ", ".join(shown), **found}


def _call(command: list[str], seconds: float, allowed: tuple[int, ...] = (0,)) -> str:
    """Run a command, and return the end of its output.

    Raises:
        RuntimeError: It failed, or ran out of seconds.
    """
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE
    )
    try:
        said, _ = child.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        child.kill()
        said, _ = child.communicate()
        raise RuntimeError(f"out of seconds:\n{said[-3000:]}") from None
    print(said, flush=True)
    if child.returncode not in allowed:
        raise RuntimeError(f"exit code {child.returncode}:\n{said[-5000:]}")
    return said[-2000:]


# Tests


def tests(settings: Settings, record: Record) -> None:
    """Test NCCL with one process, and optimizers and curvature with this PyTorch."""
    run = str(settings.scratch / f"nccl-{os.getpid()}")
    told = ["-m", "smallfry.cli", "train", "--data.limit", "500", "--epochs", "2"]
    told += ["--references", "false", "--device", settings.device, "--run", run]
    alone = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
    record.attempt("one process", lambda: {"said": _call([*alone, *told], settings.left - 5)})
    chosen = ["tests/optim/test_every_method.py", "tests/curvature", "tests/models"]
    chosen = ["tests/curvature/test_terms.py"] if settings.rehearse else chosen
    chosen = [name for name in chosen if (HERE / name).exists()] or ["tests/curvature"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    pytest += [] if settings.rehearse else ["-n", "12"]
    record.attempt("pytest", lambda: {"brief": _call(pytest, settings.left - 5).splitlines()[-1]})


PARTS = {each.__name__: each for each in (speed, accuracy, fast, optimizers, rivals, tests)}


def main() -> int:
    settings = read_settings()
    # training stops and saves by a handler of its own; what follows it may use the grace
    signal.signal(signal.SIGTERM, lambda *_: None)
    record = Record(settings)
    record["device"] = _device(settings)
    try:
        PARTS[settings.part](settings, record)
    except Exception as error:
        record["error"] = f"{traceback.format_exc()}\n{error!r}"
        raise
    return int(record.failed)


def _device(settings: Settings) -> dict[str, Any]:
    if settings.device != "cuda":
        return {"brief": "cpu", "provenance": provenance(torch.device("cpu"))}
    properties = torch.cuda.get_device_properties(0)
    evidence = provenance(torch.device("cuda"))
    return {"brief": f"{properties.name}, torch {torch.__version__}", "provenance": evidence}


if __name__ == "__main__":
    sys.exit(main())
