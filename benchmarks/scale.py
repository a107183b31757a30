"""Speed-up of two processes over one: images per second, seconds of a refresh.

    python benchmarks/scale.py --out results/scale.json      # minutes, on a machine with two cores
    python benchmarks/scale.py --quick                       # the same in small
    python benchmarks/scale.py --plan                        # on paper, for GPUs: no measurement

Two processes, one core and one thread each, joined by gloo; for one process the other one waits.
Both take turns in rounds. (a) The training loop with ViTRM small on random images, the same batch
in one and in two processes, and a batch for each. (b) Refreshes of the curvature with whole
factors, of the same batch, of the MNIST and FACES auto-encoders and of a recursive transformer
(benchmarks/optim.py): statistics, inverses and what is sent, without the drawn gradients' backward
pass, which is divided by samples as training is. What the machine can do is measured beside it, and
goes into the model of cost of smallfry/optim/distribution.py. Exit code 1: less than wanted.
"""

import argparse
import json
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.fabric import Fabric
from optim import Recursive
from scale_plan import print_plan
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from smallfry.curvature.kronecker import damped_inverse, eigendecompose
from smallfry.data import ImageData, Split
from smallfry.optim import EKFAC, KFAC, KPSVD
from smallfry.optim.distribution import Machine, refresh_time
from smallfry.tasks.classification import Classification
from smallfry.training.augment import Augment
from smallfry.training.config import AugmentConfig, OptimizerConfig, TrainConfig
from smallfry.training.loop import Trainer
from smallfry.training.objective import Supervised
from smallfry.training.processes import Processes, start
from smallfry.training.progress import QuietReporter
from smallfry.training.provenance import provenance
from smallfry.training.run import RunFolder

WANTED = {"training": 1.7, "refresh": 1.6}
CLASSES, SIDE = 10, 32
SIZES = {  # those of Hinton and Salakhutdinov (2006), and the mirror image
    "MNIST auto-encoder": (784, 1000, 500, 250, 30),
    "FACES auto-encoder": (625, 2000, 1000, 500, 30),
}
Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

METHODS: dict[str, Callable[..., Any]] = {
    "KFAC": lambda m, **s: KFAC(m, 1e-5, factor_rank=None, **s),
    "EKFAC": lambda m, **s: EKFAC(m, 1e-5, factor_rank=None, sharing="expand", **s),
    "KPSVD": lambda m, **s: KPSVD(m, 1e-5, factor_rank=None, sharing="expand", **s),
}


# (a) training


class Rates(QuietReporter):
    """Recorder of images per second at every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, loss: float, images_per_second: float) -> None:
        self.seen.append(images_per_second)


def random_data(images: int) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels, rows = torch.arange(images) % CLASSES, torch.arange(images)
    few, names = Split(pixels, rows[:2], labels[:2]), tuple(map(str, range(CLASSES)))
    return ImageData("random", "random", names, SIDE, 3, Split(pixels, rows, labels), few, few)


def training_rate(model: str, batch: int, steps: int, processes: Processes) -> float:
    """Measure images a second of all processes together, after the first step."""
    config = TrainConfig(
        augment=AugmentConfig(crop_padding=4, flip=True, mixup=0.2, cutmix=0.0),
        optimizer=OptimizerConfig("adamw", lr=1e-4),
        epochs=1,
        batch_size=batch,
        device="cpu",
        precision="32-true",
        workers=0,
        threads=1,
    )
    augment = Augment(config.augment, SIDE, CLASSES, (0.5,) * 3, (0.25,) * 3, flip=True)
    network, rates = timm.create_model(model, num_classes=CLASSES), Rates()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            network,
            random_data(batch * (1 + steps)),
            Supervised(Classification()),
            augment,
            config,
            RunFolder(Path(folder)),
            {},
            rates,
            processes,
        ).fit()
    return statistics.harmonic_mean(rates.seen[1:]) if processes.is_first else 0.0


def measure_training(setting: dict[str, Any], pair: Processes) -> dict[str, Any]:
    alone = Processes(Fabric(accelerator="cpu", devices=1))
    model, batch, steps = setting["model"], setting["batch"], setting["steps"]
    cases = {
        "1 process": (batch, alone),
        "2 processes, same batch": (batch, pair),
        "2 processes, a batch each": (2 * batch, pair),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(setting["rounds"]):
        for name, (size, processes) in cases.items():
            dist.barrier()
            if processes is pair or pair.is_first:
                found[name].append(training_rate(model, size, steps, processes))
            dist.barrier()
    if not pair.is_first:
        return {}
    rounds = {name: found[name] for name in cases}
    one = rounds["1 process"]
    result: dict[str, Any] = {"model": model, "batch": batch, "images per second": {}, "ratio": {}}
    for name, rates in rounds.items():
        result["images per second"][name] = middle(rates)
        if rates is not one:
            result["ratio"][name] = middle([b / a for a, b in zip(one, rates, strict=True)])
    return result


# (b) refreshes


def autoencoding(name: str, batch: int) -> tuple[nn.Module, Batch, Loss, dict[str, Any]]:
    sizes = [*SIZES[name], *SIZES[name][-2::-1]]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(batch, sizes[0], generator=generator) > 0.8).float()

    def loss(model: nn.Module, part: Batch) -> Tensor:
        summed = F.binary_cross_entropy_with_logits(model(part[0]), part[1], reduction="sum")
        return summed / len(part[0])

    return nn.Sequential(*layers[:-1]), (images, images), loss, {"likelihood": "bernoulli"}


def classifying(batch: int) -> tuple[nn.Module, Batch, Loss, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, 129, 384, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)

    def loss(model: nn.Module, part: Batch) -> Tensor:
        return F.cross_entropy(model(part[0]), part[1])

    return Recursive(), (tokens, labels), loss, {}


class Case:
    """One method on one network, in one or two processes."""

    def __init__(self, network: str, method: str, batch: int, together: bool) -> None:
        torch.manual_seed(0)
        made = autoencoding(network, batch) if network in SIZES else classifying(batch)
        model, whole, self.loss, told = made
        rank = dist.get_rank()
        half = slice(rank * batch // 2, (rank + 1) * batch // 2) if together else slice(None)
        self.part = whole[0][half], whole[1][half]
        self.model = DistributedDataParallel(model) if together else model
        group = None if together else False
        self.optimizer = METHODS[method](
            model, statistics_every=1, burn_in=0, process_group=group, **told
        )
        self.seconds: list[tuple[float, float]] = []  # of the refresh, of the whole step
        self._refresh = self.optimizer.preconditioner.refresh
        self.optimizer.preconditioner.refresh = self._timed
        self.together = together

    def _timed(self, *arguments: Any) -> None:
        if self.together:
            dist.barrier()  # whose waiting belongs to the backward pass
        began = time.perf_counter()
        self._refresh(*arguments)
        self.refreshing = time.perf_counter() - began

    def step(self) -> None:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model, self.part).backward()
        self.optimizer.step()
        both = torch.tensor([self.refreshing, time.perf_counter() - began])
        if self.together:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        self.seconds.append((float(both[0]), float(both[1])))


def measure_refreshes(setting: dict[str, Any], machines: dict[str, Any]) -> dict[str, Any]:
    first, found = dist.get_rank() == 0, {}
    for network, batch in setting["networks"].items():
        for method in METHODS:
            pair = Case(network, method, batch, True)
            alone = Case(network, method, batch, False) if first else None
            for number in range(setting["rounds"] + 1):  # the first one warms up
                dist.barrier()
                if alone is not None:
                    alone.step()
                dist.barrier()
                pair.step()
                if number == 0:
                    for case in (alone, pair):
                        if case is not None:
                            case.seconds.clear()
            sent = told_by_all(pair.optimizer.collectives.bytes)
            if alone is not None:
                found[f"{network}, {method}"] = compared(alone, pair, sent, machines, method)
    return found


def compared(
    alone: Case, pair: Case, sent: dict[str, int], machines: dict[str, Any], method: str
) -> dict[str, Any]:
    optimizer = alone.optimizer
    rows = max(len(alone.part[0]), min(optimizer.settings.max_rows, uses_of(alone)))
    costs = optimizer.costs(rows)
    result: dict[str, Any] = {"rows": rows, "refresh": {}, "step with refresh": {}}
    ones, twos = alone.seconds, pair.seconds
    for number, kind in enumerate(("refresh", "step with refresh")):
        one, two = [s[number] for s in ones], [s[number] for s in twos]
        result[kind] = {
            "1 process": middle(one),
            "2 processes": middle(two),
            "ratio": middle([a / b for a, b in zip(one, two, strict=True)]),
        }
    result["bytes"] = {"sent": sent, "all": sum(sent.values())}
    for count, name in ((1, "1 process"), (2, "2 processes")):
        machine = Machine(*(machines[f"{name}, {method}"]))
        planned = refresh_time(costs, count, machine)
        result["refresh"][name]["predicted"] = planned.seconds
        if count == 2:
            result["bytes"]["predicted"] = planned.bytes
            result["predicted parts"] = planned._asdict()
    return result


def uses_of(case: Case) -> int:
    """Return the largest product of samples and uses over the layers."""
    shape = case.part[0].shape
    return shape[0] * (4 * shape[1] if len(shape) > 2 else 1)


def told_by_all(mine: dict[str, int]) -> dict[str, int]:
    """Sum the bytes exchanged, by kind, each message once."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return {kind: max(each.get(kind, 0) for each in said) for kind in mine}


# What the machine can do


def calibrate(pair: bool) -> dict[str, float]:
    """Measure multiply-adds a second of one process; with two at work, of the slower."""
    a, b = torch.randn(1000, 256), torch.randn(256, 1000)
    square = b.T @ b / 256 + torch.eye(1000)
    whole, some, cube = square[None], torch.full((1,), 0.1), 1000.0**3
    tasks = {
        "products": (lambda: a @ b, 1000 * 256 * 1000.0),
        "cholesky": (lambda: damped_inverse(whole, some), cube),
        "eigenvectors": (lambda: eigendecompose(whole), 9 * cube),
    }
    speeds = {}
    for name, (task, macs) in tasks.items():
        if pair:
            dist.barrier()
        speeds[name] = macs / fastest(task, 4)
    return speeds


def wires() -> dict[str, float]:
    """Measure bandwidth of large messages and latency of a small one, between the processes."""
    large, small = torch.zeros(4 * 10**6), torch.zeros(1)

    def exchange() -> None:
        dist.reduce(large, 0)
        dist.broadcast(large, 1)
        dist.barrier()

    return {
        "bandwidth": 2 * large.nbytes / fastest(exchange, 6),
        "latency": fastest(lambda: dist.all_reduce(small), 50),
    }


def fastest(task: Callable[[], Any], times: int) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        task()
        found.append(time.perf_counter() - began)
    return min(found)


def measure_machine() -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the machine, with the cost model's parameters by method."""
    one: dict[str, float] = {}
    for _ in range(2):
        dist.barrier()
        if dist.get_rank() == 0:
            one = calibrate(False)
        dist.barrier()
        mine = calibrate(True)
        said: list[Any] = [None, None]
        dist.all_gather_object(said, mine)
        two = {name: min(each[name] for each in said) for name in mine}
    wire = wires()
    machines = {}
    for name, speeds in (("1 process", one), ("2 processes", two)):
        for method in METHODS:
            solver = "eigenvectors" if method == "EKFAC" else "cholesky"
            if speeds:
                rest = wire["bandwidth"], wire["latency"]
                machines[f"{name}, {method}"] = (speeds["products"], speeds[solver], *rest)
    return {"alone": one, "both at once": two, **wire}, machines


# Rounds, processes, output


def middle(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def work(rank: int, settings: dict[str, Any], place: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    pair = start("cpu", "32-true", "ddp")
    measured, machines = measure_machine()
    found: dict[str, Any] = {"machine": measured}
    if "training" in settings:
        found["training"] = measure_training(settings["training"], pair)
    if "refresh" in settings:
        found["refresh"] = measure_refreshes(settings["refresh"], machines)
    if rank == 0:
        record = found | {"provenance": provenance(torch.device("cpu"))}
        Path(place).write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "found.json"
        mp.start_processes(work, (settings, str(place)), nprocs=2, start_method="spawn")
        return json.loads(place.read_text())


def settings_of(quick: bool) -> dict[str, Any]:
    if quick:
        training = {"model": "vitrm_tiny_patch4_32", "batch": 4, "steps": 1, "rounds": 1}
        return {
            "training": training,
            "refresh": {"networks": {"MNIST auto-encoder": 32}, "rounds": 1},
        }
    return {
        "training": {"model": "vitrm_small_patch4_32", "batch": 16, "steps": 3, "rounds": 3},
        "refresh": {
            "networks": {
                "MNIST auto-encoder": 512,
                "FACES auto-encoder": 1024,
                "recursive transformer": 16,
            },
            "rounds": 4,
        },
    }


def show(found: dict[str, Any]) -> bool:
    """Print the figures; return whether all targets are met."""
    reached = True
    machine = found["machine"]
    for kind, speeds in (("alone", machine["alone"]), ("both", machine["both at once"])):
        told = ", ".join(f"{name} {speed / 1e9:.1f}" for name, speed in speeds.items())
        print(f"a core, {kind:5} GMAC/s: {told}")
    print(f"wire: {machine['bandwidth'] / 1e9:.2f} GB/s, {1e6 * machine['latency']:.0f} µs")
    for training in [found["training"]] if "training" in found else []:
        print(f"{training['model']}, batch {training['batch']}")
        for name, rate in training["images per second"].items():
            line, ratio = f"  {name:26} {rate['median']:8.2f} images/s", training["ratio"].get(name)
            if ratio is not None:
                reached &= ratio["median"] >= WANTED["training"]
                line += f"  ×{spread(ratio)}, wanted {WANTED['training']}"
            print(line)
    for name, row in found.get("refresh", {}).items():
        one, two = row["refresh"]["1 process"], row["refresh"]["2 processes"]
        ratio, step = row["refresh"]["ratio"], row["step with refresh"]["ratio"]
        reached &= ratio["median"] >= WANTED["refresh"]
        print(
            f"{name:29} refresh {1e3 * one['median']:7.1f} ms (predicted "
            f"{1e3 * one['predicted']:7.1f}), two {1e3 * two['median']:7.1f} (predicted "
            f"{1e3 * two['predicted']:7.1f})  ×{spread(ratio)}, wanted {WANTED['refresh']}; with "
            f"its step ×{step['median']:.2f}; {row['bytes']['all'] / 1e6:.1f} MB sent (predicted "
            f"{row['bytes']['predicted'] / 1e6:.1f})"
        )
    return reached


def spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['least']:.2f} to {found['most']:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="Print a plan for GPUs, and no more.")
    parser.add_argument("--quick", action="store_true", help="One small round of a part of it.")
    parser.add_argument("--only", choices=("training", "refresh"), help="One half of it.")
    parser.add_argument("--out", type=Path, help="Write the figures as JSON.")
    arguments = parser.parse_args()
    if arguments.plan:
        print_plan()
        return 0
    settings = settings_of(arguments.quick)
    if arguments.only is not None:
        settings = {arguments.only: settings[arguments.only]}
    found = measure(settings)
    reached = show(found)
    if arguments.out is not None:
        kept = found.pop("provenance")
        record = {"measured": found, "wanted": WANTED, "provenance": kept}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if reached or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
