"""Cost model of natural-gradient training on 1, 8 and 64 GPUs.

``python benchmarks/scale.py --plan`` prints it. Nothing here was measured: speeds are those of a
card's data sheet times an assumed efficiency, sizes are those of the models, and times follow from
the model of cost in smallfry/optim/distribution.py. Batches grow with the number of GPUs.

    step     forward and backward passes (3 multiply-adds for each of the forward pass), the solves
             with the inverses (in every process alike), and averaging gradients, none hidden
    refresh  drawn gradients (a backward pass without those of weights), sums over samples,
             inversions of the process that has most to do, and what is sent, none hidden
"""

import math
from typing import Any, NamedTuple

import timm
import torch

import smallfry
from smallfry.optim import KFAC
from smallfry.optim.distribution import Machine, gradient_time, refresh_time

COUNTS = (1, 8, 64)
SHARE = 0.1  # of the time, that refreshes may take


class Card(NamedTuple):
    """Assumed GPU of the class of an H100 or H200 with SXM."""

    training: float = 0.40 * 989e12 / 2  # multiply-adds a second, dense bf16 at 40 %
    single: float = 0.60 * 67e12 / 2  # of products in float32, without TF32, at 60 %
    solver: float = 1e12  # n³ a second of a Cholesky inverse in float32, n about 2,000
    within: float = 0.8 * 450e9  # bytes a second each way, NVLink 4 at 80 %
    between: float = 0.8 * 50e9  # one 400 Gb/s InfiniBand port for each GPU, at 80 %
    latency_within: float = 1e-5
    latency_between: float = 2e-5

    def machine(self, processes: int) -> Machine:
        """Build machines of eight GPUs; beyond them the slower network counts."""
        inside = processes <= 8
        bandwidth = self.within if inside else self.between
        latency = self.latency_within if inside else self.latency_between
        return Machine(self.single, self.solver, bandwidth, latency)


class Subject(NamedTuple):
    """Model with its input and images per GPU and step."""

    name: str
    size: int
    batch: int


SUBJECTS = (
    Subject("vitrm_small_patch4_32", 32, 256),
    Subject("vit_base_patch16_224", 224, 128),
    Subject("resnet50", 224, 128),
)


class Row(NamedTuple):
    """Costs of one model on a number of GPUs, in seconds."""

    processes: int
    compute: float  # of a step
    solves: float
    gradients: float
    drawn: float  # of a refresh
    sums: float
    inversions: float
    sending: float
    bytes: int  # of a refresh, on each link

    @property
    def step(self) -> float:
        return self.compute + self.solves + self.gradients

    @property
    def refresh(self) -> float:
        return self.drawn + self.sums + self.inversions + self.sending

    @property
    def every(self) -> int:
        """Steps between refreshes for a tenth of the time."""
        return max(1, math.ceil(self.refresh * (1 - SHARE) / SHARE / self.step))


class Plan(NamedTuple):
    """Costs of one model on growing numbers of GPUs."""

    subject: Subject
    rank: int | None  # of the factors; None: whole
    total: int  # multiply-adds of all inversions
    largest: int  # of the costliest block's
    layer: str  # which that is
    rows: list[Row]

    @property
    def useful(self) -> int:
        """Number of GPUs beyond which inversions take no less time."""
        return math.ceil(self.total / max(1, self.largest))


def plan(subject: Subject, rank: int | None, card: Card) -> Plan:
    model = timm.create_model(subject.name, num_classes=1000 if subject.size > 32 else 10)
    macs = smallfry.cost(model, torch.zeros(1, 3, subject.size, subject.size))
    optimizer = KFAC(model, factor_rank=rank)
    rows = []
    for count in COUNTS:
        machine = card.machine(count)
        # uses are drawn at random beyond max_rows, but no sample is left out
        costs = optimizer.costs(max(optimizer.settings.max_rows or 0, subject.batch * count))
        refresh = refresh_time(costs, count, machine)
        forward = subject.batch * macs.macs / card.training
        rows.append(
            Row(
                count,
                3 * forward,
                sum(solve_macs(b.shape, optimizer.approximation, b) for b in optimizer.blocks)
                / card.single,
                gradient_time(macs.parameters, count, machine),
                forward,
                refresh.shared,
                refresh.owned,
                refresh.sending,
                refresh.bytes,
            )
        )
    burdens = {b.name: optimizer.approximation.burden(b) for b in optimizer.blocks}
    layer = max(burdens, key=lambda name: burdens[name])
    optimizer.close()
    return Plan(subject, rank, sum(burdens.values()), burdens[layer], layer, rows)


def solve_macs(shape: tuple[int, int, int], method: Any, block: Any) -> int:
    """Count the multiply-adds of (F̂ + λ I)⁻¹ times a gradient."""
    groups, outputs, inputs = shape
    sides = {"a": inputs, "g": outputs}
    thin = {side: method.rank_of(block, side) for side in sides}
    each = (size if thin[side] is None else 2 * thin[side] for side, size in sides.items())
    return groups * outputs * inputs * sum(each)


def print_plan() -> None:
    card = Card()
    print(__doc__)
    print(
        f"Assumed: {card.training / 1e12:.0f} T multiply-adds/s in bf16 (0.40 of 989 TFLOPS), "
        f"{card.single / 1e12:.0f} T in float32 (0.60 of 67), {card.solver / 1e12:.0f} T n³/s in "
        f"Cholesky inverses, {card.within / 1e9:.0f} GB/s each way up to 8 GPUs, "
        f"{card.between / 1e9:.0f} GB/s beyond, {1e6 * card.latency_within:.0f} and "
        f"{1e6 * card.latency_between:.0f} µs a message."
    )
    for subject in SUBJECTS:
        for rank in (None, 64):
            print(f"\n{table(plan(subject, rank, card))}")


def table(found: Plan) -> str:
    factors = "full factors" if found.rank is None else f"factors of rank {found.rank}"
    lines = [
        f"{found.subject.name}, {found.subject.batch} images per GPU, KFAC with {factors}",
        "",
        "| GPUs | step, ms (compute + solves + gradients) | refresh, ms (drawn + sums + inversions "
        "+ sending) | MB a link | refresh every | images/s | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = rate(found, found.rows[0])
    for row in found.rows:
        step = " + ".join(f"{1e3 * t:.1f}" for t in (row.compute, row.solves, row.gradients))
        parts = (row.drawn, row.sums, row.inversions, row.sending)
        refresh = " + ".join(f"{1e3 * t:.1f}" for t in parts)
        speed = rate(found, row)
        lines.append(
            f"| {row.processes} | {1e3 * row.step:.1f} ({step}) | {1e3 * row.refresh:.1f} "
            f"({refresh}) | {row.bytes / 1e6:.0f} | {row.every} | {speed:,.0f} | "
            f"{speed / alone / row.processes:.0%} |"
        )
    share = found.largest / max(1, found.total)
    lines += [
        "",
        f"Costliest block: {found.layer}, {share:.0%} of all inversions; beyond {found.useful} "
        "GPUs they take no less.",
    ]
    return "\n".join(lines)


def rate(found: Plan, row: Row) -> float:
    """Compute images a second, with the recommended refresh interval."""
    seconds = row.step + row.refresh / row.every
    return found.subject.batch * row.processes / seconds
