"""Work assignment and communication cost of a distributed refresh.

A block belongs to one process. Blocks are given away from the costliest on, each to the process
that has least to do (LPT, Graham 1969): the longest share is never above

    total / m + largest · (1 − 1/m),  nor above (4/3 − 1/(3m)) of the best division there is.

Time is modelled as work / speed for what is computed and as bytes / bandwidth plus a latency for
each message; a sum or a spread among all processes sends its bytes over each link once, as rings
and pipelined trees do. Every process gets every inverse, which is KAISA's COMM-OPT (Pauloski et al.
2021, arXiv 2107.01739). Everything here is arithmetic on sizes: no process is needed to plan.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from smallfry.curvature import Block
    from smallfry.optim.approximation import Approximation


class Machine(NamedTuple):
    """Processor and interconnect of a group of equal processes."""

    macs: float  # multiply-adds a second, in products of matrices
    solver_macs: float  # multiply-adds a second, in factorisations
    bandwidth: float  # bytes a second, each way
    latency: float  # seconds that a message takes at least


class Traffic(NamedTuple):
    """Bytes of one refresh of one block, each message counted once."""

    summed: int  # sums over samples, to the owner
    spread: int  # from the owner to all
    rows: int  # samples of all processes, to the owner, which has its own share already
    everywhere: int  # sums that all need


class Cost(NamedTuple):
    """Cost of one refresh of one block."""

    shared: int  # multiply-adds that are divided by samples
    owned: int  # multiply-adds of the owner alone
    traffic: Traffic


class Refresh(NamedTuple):
    """Seconds of one refresh, and the bytes on each link."""

    shared: float
    owned: float  # of the process that has most to do
    sending: float
    bytes: int

    @property
    def seconds(self) -> float:
        """Total without overlap."""
        return self.shared + self.owned + self.sending


def assign(costs: Sequence[float], processes: int) -> list[int]:
    """Assign blocks to processes, the costliest to the least loaded; equal in all processes."""
    loads, owners = [0.0] * processes, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(processes), key=lambda rank: (loads[rank], rank))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


def loads(costs: Sequence[float], owners: Sequence[int], processes: int) -> list[float]:
    """Sum the cost of each process."""
    sums = [0.0] * processes
    for cost, owner in zip(costs, owners, strict=True):
        sums[owner] += cost
    return sums


def owners_of(blocks: "Sequence[Block]", method: "Approximation", processes: int) -> dict[str, int]:
    """Return the owner of each block."""
    found = assign([method.burden(block) for block in blocks], processes)
    return {block.name: owner for block, owner in zip(blocks, found, strict=True)}


def cost_of(block: "Block", method: "Approximation", rows: int) -> Cost:
    """Compute the cost of a refresh of a block.

    Args:
        block: The block.
        method: Its approximation.
        rows: Uses of all samples that statistics are taken from, in the whole batch.
    """
    groups, outputs, inputs = block.shape
    width = max(4, next(iter(block.parameters.values())).element_size())
    state = method.cost(block, {})[1]
    summed, owned = method.summed(block), method.burden(block)
    if summed is None:
        sent = groups * rows * (inputs + outputs)
        return Cost(0, owned, Traffic(0, width * state, width * sent, 0))
    spread = state - summed.everywhere + summed.spread
    traffic = Traffic(width * summed.numbers, width * spread, 0, width * summed.everywhere)
    return Cost(rows * summed.macs, owned, traffic)


def refresh_time(
    costs: Mapping[str, Cost], processes: int, machine: Machine, messages: int = 4
) -> Refresh:
    """Estimate the duration of a refresh.

    Args:
        costs: Cost of each block.
        processes: Number of processes.
        machine: Processor of each process.
        messages: Rounds of messages, each of one for every owner.
    """
    owned = [cost.owned for cost in costs.values()]
    longest = max(loads(owned, assign(owned, processes), processes))
    shared = sum(cost.shared for cost in costs.values()) / processes
    if processes == 1:
        return Refresh(shared / machine.macs, longest / machine.solver_macs, 0.0, 0)
    sent = sum(c.traffic.summed + c.traffic.spread for c in costs.values())
    others = sum(2 * c.traffic.everywhere + c.traffic.rows for c in costs.values())
    link = sent + others * (processes - 1) // processes
    sending = link / machine.bandwidth + machine.latency * messages * processes
    return Refresh(shared / machine.macs, longest / machine.solver_macs, sending, link)


def gradient_time(parameters: int, processes: int, machine: Machine) -> float:
    """Estimate seconds to average 4-byte gradients in a ring, as in every data-parallel step."""
    if processes == 1:
        return 0.0
    link = 2 * 4 * parameters * (processes - 1) / processes
    return link / machine.bandwidth + 2 * machine.latency * (processes - 1)
