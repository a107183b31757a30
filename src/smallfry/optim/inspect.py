"""Introspection of an optimizer: summary, diagnostics and distribution."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from smallfry.curvature import Block
from smallfry.optim.preconditioner import Preconditioner


class SummaryRow(NamedTuple):
    """Treatment of one block, or of one uncovered parameter."""

    layer: str
    parameters: int
    approximation: str
    memory: int  # bytes of state
    refresh: int  # multiply-adds of an inversion
    reason: str  # why it is not covered; empty if it is


class Summary(NamedTuple):
    """Treatment of each parameter of a model; ``str()`` is a table."""

    method: str
    rows: tuple[SummaryRow, ...]
    bound: str = ""  # what keeps a step's divergence in bounds

    @property
    def memory(self) -> int:
        """Bytes of state."""
        return sum(row.memory for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "parameters", "approximation", "memory", "refresh")
        lines = [
            (
                row.layer,
                f"{row.parameters:,}",
                row.approximation + (f" ({row.reason})" if row.reason else ""),
                f"{row.memory / 1e6:.2f} MB" if row.memory else "–",
                f"{row.refresh / 1e9:.3f} GMAC" if row.refresh else "–",
            )
            for row in self.rows
        ]
        return f"{_table(head, lines)}\n{self.bound}".rstrip()


class BlockDiagnosis(NamedTuple):
    """Diagnostics of one block."""

    layer: str
    inputs: tuple[float, float] | None  # eigenvalues of A, smallest and largest
    outputs: tuple[float, float] | None  # of G
    samples: tuple[float, float] | None  # of the Gram matrix, for exact natural gradient
    damping: float  # λ
    damping_ratio: float  # λ over the largest eigenvalue of the approximated Fisher
    fisher_error: float | None  # ‖F − F̂‖ / ‖F‖ on the last refresh's batch
    cosine: float | None  # between the gradient and its preconditioned version
    milliseconds: float  # of the last refresh


class Diagnosis(NamedTuple):
    """Diagnostics of an optimizer; ``str()`` is a table."""

    blocks: tuple[BlockDiagnosis, ...]
    clip: float  # factor on the last step
    damping_factor: float  # what adaptive damping multiplies damping with
    reduction_ratio: float | None
    energy: float | None  # changed by the last step's coarse level, in two-level methods
    counters: dict[str, int]
    divergence_ratio: float = 1.0  # of a step: measured over modelled, running average
    targets: float = 1.0  # of a sample, each of which may diverge by κ/2
    fallback_share: float = 0.0  # of the promised divergence, expected of the AdamW inside

    def __str__(self) -> str:
        head = ("layer", "A", "G", "λ", "λ / largest", "Fisher error", "cosine", "ms")
        lines = [
            (
                b.layer,
                _range(b.inputs or b.samples),
                _range(b.outputs),
                f"{b.damping:.2e}",
                f"{b.damping_ratio:.2e}",
                "–" if b.fisher_error is None else f"{b.fisher_error:.3f}",
                "–" if b.cosine is None else f"{b.cosine:.3f}",
                f"{b.milliseconds:.1f}",
            )
            for b in self.blocks
        ]
        counted = ", ".join(f"{k} {v}" for k, v in self.counters.items())
        energy = "" if self.energy is None else f"coarse energy {self.energy:.3g}; "
        standing = f"clip {self.clip:.3g}; divergence {self.divergence_ratio:.3g} × modelled"
        standing += f", AdamW inside {self.fallback_share:.2g} of the promised"
        return f"{_table(head, lines)}\n{standing}; {energy}{counted}"


class Share(NamedTuple):
    """Share of one process in a refresh, besides its part of the samples."""

    process: int
    layers: tuple[str, ...]
    work: int  # multiply-adds, about


class Distribution(NamedTuple):
    """Distribution of refreshes over processes; ``str()`` is a table."""

    shares: tuple[Share, ...]
    sent: dict[str, int]  # bytes of this process's messages in the last refresh, by kind

    def __str__(self) -> str:
        lines = [(str(s.process), f"{s.work / 1e9:.3f} GMAC", ", ".join(s.layers)) for s in self[0]]
        sent = ", ".join(f"{kind} {n / 1e6:.2f} MB" for kind, n in self.sent.items()) or "nothing"
        return f"{_table(('process', 'work', 'layers'), lines)}\nlast refresh: {sent}"


def distribution(preconditioner: Preconditioner) -> Distribution:
    """Describe the owner of each layer, and the messages of the last refresh."""
    method, collectives, shares = preconditioner.approximation, preconditioner.collectives, []
    for process in range(collectives.count):
        owners = preconditioner.owners
        mine = [b for b in preconditioner.blocks.values() if owners[b.name] == process]
        layers = tuple(", ".join(b.layers) for b in mine)
        shares.append(Share(process, layers, sum(method.burden(b) for b in mine)))
    return Distribution(tuple(shares), dict(collectives.bytes))


def summarize(preconditioner: Preconditioner, momentum: bool, beside: str) -> list[SummaryRow]:
    """Summarise each block: approximation, memory, cost of a refresh.

    Args:
        preconditioner: Preconditioner of the blocks.
        momentum: True if gradients are averaged, which takes as much memory as the weights.
        beside: Further words for each block.
    """
    rows = []
    for block in preconditioner.blocks.values():
        state = preconditioner.states[block.name]
        words, numbers, work = preconditioner.approximation.cost(block, state)
        width = next(iter(block.parameters.values())).element_size()
        memory = numbers * max(4, width)
        if state:  # what is really held, instead of what is to be expected
            memory = sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        memory += block.size * width if momentum else 0
        layers = ", ".join(block.layers)
        rows.append(SummaryRow(layers, block.size, words + beside, memory, work, ""))
    return rows


def left_out_rows(
    parameters: Mapping[str, torch.Tensor],
    uncovered: Mapping[str, str],
    frozen: Mapping[str, torch.Tensor],
) -> list[SummaryRow]:
    """List uncovered parameters: trained by AdamW, with the reason, or untrained."""
    rows = []
    for name, reason in uncovered.items():
        p = parameters[name]
        memory = 2 * p.numel() * p.element_size()
        rows.append(SummaryRow(name, p.numel(), "AdamW", memory, 0, reason))
    for name, p in frozen.items():
        rows.append(SummaryRow(name, p.numel(), "none", 0, 0, "frozen: requires no gradient"))
    return rows


@torch.no_grad()
def diagnose_blocks(preconditioner: Preconditioner) -> tuple[BlockDiagnosis, ...]:
    """Diagnose every block that has statistics."""
    found = []
    for name, block in preconditioner.blocks.items():
        state = preconditioner.states[name]
        if not state:
            continue
        rows = preconditioner.latest.get(name, [])
        spectra = preconditioner.approximation.diagnose(block, state, rows)
        damping = preconditioner.lambdas[name]
        tops = [spectra[key][1] for key in ("inputs", "outputs", "samples") if key in spectra]
        largest = float(torch.tensor(tops, dtype=torch.float64).prod())
        found.append(
            BlockDiagnosis(
                ", ".join(block.layers),
                spectra.get("inputs"),
                spectra.get("outputs"),
                spectra.get("samples"),
                damping,
                damping / largest if largest else float("inf"),
                spectra.get("fisher_error"),
                _cosine(preconditioner, block),
                preconditioner.milliseconds.get(name, 0.0),
            )
        )
    return tuple(found)


def _cosine(preconditioner: Preconditioner, block: Block) -> float | None:
    grads = {n: p.grad for n, p in block.parameters.items() if p.grad is not None}
    if len(grads) < len(block.parameters):
        return None
    directions = preconditioner.directions(grads)
    g = torch.cat([grads[n].flatten().double() for n in grads])
    v = torch.cat([directions[n].flatten().double() for n in grads])
    norms = torch.linalg.vector_norm(g) * torch.linalg.vector_norm(v)
    return float(g @ v / norms) if float(norms) > 0 else None


def _range(values: tuple[float, float] | None) -> str:
    return "–" if values is None else f"{values[0]:.1e} … {values[1]:.1e}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    rows = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in
            [head, *lines]]  # fmt: skip
    return "\n".join(row.rstrip() for row in rows)
