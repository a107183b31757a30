"""Refreshing the curvature in several processes that share each batch.

The result is that of one process with the whole batch. Sums over samples are divided by samples:
each process adds up its own and the sum goes to the block's owner. What can't be divided so,
factorisations and searches for products, is divided by blocks, and the owner sends the new state
to all. Methods that are no function of sums get the rows of all processes into the owner instead.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smallfry.curvature import Observation, Rows
from smallfry.curvature.kronecker import NotFiniteError
from smallfry.optim.approximation import State, Sum, Updating
from smallfry.optim.refresh import (
    balanced,
    invert,
    rows_seen,
    set_lambdas,
    share_kept,
    traces,
    warn,
    wide,
)

if TYPE_CHECKING:
    from smallfry.optim.base import NaturalGradient

Versions = dict[str, dict[str, tuple[Tensor, int]]]


def refresh_together(
    optimizer: "NaturalGradient", tapped: Sequence[Observation], inverse: bool
) -> None:
    """Statistics, damping, inverses, of all blocks; called in all processes alike."""
    method, exchange, blocks = optimizer.approximation, optimizer.exchange, optimizer.blocks
    exchange.forget()
    keep = share_kept(optimizer)
    before = _versions(optimizer)
    kept = {b.name: keep if optimizer.curvature[b.name] else 0.0 for b in blocks}
    with exchange.publish_failure(optimizer.device):
        rows = {b.name: rows_seen(optimizer, number, tapped) for number, b in enumerate(blocks)}
    if optimizer._monitoring and tapped:
        optimizer._latest = {name: seen for name, seen in rows.items() if seen}
    counts = [float(sum(part.samples for part in rows[b.name])) for b in blocks]
    masses = [float(sum(part.mass for part in rows[b.name])) for b in blocks]
    totals = exchange.sums(counts + masses, optimizer.device)
    samples = {b.name: n for b, n in zip(blocks, totals[: len(blocks)], strict=True) if n}
    for b, mass in zip(blocks, totals[len(blocks) :], strict=True):
        rows[b.name] = balanced(rows[b.name], samples.get(b.name, 0.0), mass)
    shared: set[tuple[str, str]] = set()
    unfolded, stuck = _update(optimizer, rows, samples, kept, shared), list[str]()
    now = _versions(optimizer)
    for name, key in shared:  # all have these
        before[name][key] = now[name][key]
    _share_lambdas(optimizer)
    for block in blocks:
        state, began = optimizer.curvature[block.name], time.perf_counter()
        mine = optimizer.owners[block.name] == exchange.rank
        if mine and state and (inverse or "inverted" not in state):
            failures = optimizer.counters["failed_refreshes"]
            invert(optimizer, block, state)
            if optimizer.counters["failed_refreshes"] > failures:
                optimizer.counters["failed_refreshes"] = failures
                stuck.append(block.name)
        optimizer.milliseconds[block.name] = 1e3 * (time.perf_counter() - began)
    unfolded, stuck = _share_states(optimizer, before, unfolded, stuck)
    if method.settles:
        settling = {name: count for name, count in samples.items() if name not in unfolded}
        _settle(optimizer, rows, settling, kept)
    _share_lambdas(optimizer)
    optimizer.counters["failed_refreshes"] += len(unfolded) + len(stuck)
    optimizer.counters["statistics"] += bool(samples)
    optimizer.counters["inverses"] += inverse


def _update(
    optimizer: "NaturalGradient",
    rows: dict[str, list[Rows]],
    samples: dict[str, float],
    kept: dict[str, float],
    shared: set[tuple[str, str]],
) -> list[str]:
    """Fold the batch into the states of the owners, and what is ``shared`` into all.

    Returns:
        Blocks of this process whose statistics were not finite.
    """
    method, exchange = optimizer.approximation, optimizer.exchange
    numbers = {b.name: number for number, b in enumerate(optimizer.blocks) if b.name in samples}
    failed: list[str] = []
    if not method.divides:
        first = next(iter(optimizer.blocks[0].parameters.values()))
        like = first.new_empty((), dtype=wide(first.dtype))
        seen = {name: rows[name] for name in numbers}
        for name, whole in exchange.rows_to_owners(seen, optimizer.owners, like).items():
            block, state = optimizer.blocks[numbers[name]], optimizer.curvature[name]
            optimizer._draw(2, numbers[name])
            try:
                method.update(block, state, whole, kept[name], optimizer.generator)
                state["shape"] = list(block.shape)
            except NotFiniteError as error:
                _complain(block.layers, error, failed, name)
        return failed
    running: dict[str, Updating] = {}
    asked: dict[str, Any] = {}
    for name, number in numbers.items():
        block = optimizer.blocks[number]
        optimizer._draw(2, number)
        running[name] = method.updating(
            block,
            optimizer.curvature[name],
            rows[name],
            samples[name],
            kept[name],
            optimizer.generator,
        )
        asked[name] = next(running[name])
    while asked:
        shared |= {
            (name, key)
            for name, one in asked.items()
            if isinstance(one, Sum) and one.everywhere
            for key in one.parts
        }
        asked = _answer(optimizer, running, asked, numbers, failed)
    return failed


def _answer(
    optimizer: "NaturalGradient",
    running: dict[str, Updating],
    asked: dict[str, Any],
    numbers: dict[str, int],
    failed: list[str],
) -> dict[str, Any]:
    """Give all blocks what they ask for, and take their next questions."""
    exchange, owners = optimizer.exchange, optimizer.owners
    sums = {name: one for name, one in asked.items() if isinstance(one, Sum)}
    for_all = {name: one.parts for name, one in sums.items() if one.everywhere}
    for_owners = {name: one.parts for name, one in sums.items() if not one.everywhere}
    spread = {name: one for name, one in asked.items() if not isinstance(one, Sum)}
    made: dict[str, State] = {}
    for name, one in spread.items():
        mine = owners[name] == exchange.rank
        made[name] = one.make() if mine else {k: torch.empty_like(t) for k, t in one.like.items()}
    answers: dict[str, Any] = {}
    if for_all:
        answers |= exchange.sums_for_all(for_all)
    if for_owners:
        answers |= exchange.sums_to_owners(for_owners, owners)
    if made:
        answers |= exchange.from_owners(made, owners)
    following = {}
    for name in asked:
        try:
            following[name] = running[name].send(answers.get(name))
        except StopIteration:
            block = optimizer.blocks[numbers[name]]
            if owners[name] == exchange.rank:
                optimizer.curvature[name]["shape"] = list(block.shape)
        except NotFiniteError as error:  # at the very end, in the owner
            _complain(optimizer.blocks[numbers[name]].layers, error, failed, name)
    return following


def _share_lambdas(optimizer: "NaturalGradient") -> None:
    """Each owner tells the traces of its blocks."""
    mine = traces(optimizer, only=optimizer.exchange.rank)
    names = [block.name for block in optimizer.blocks]
    told = [mine.get(name, 0.0) for name in names] + [float(name in mine) for name in names]
    values = optimizer.exchange.sums(told, optimizer.device)
    known = zip(names, values[: len(names)], values[len(names) :], strict=True)
    set_lambdas(optimizer, {name: value for name, value, there in known if there})


def _share_states(
    optimizer: "NaturalGradient", before: Versions, *failed: list[str]
) -> tuple[list[str], ...]:
    """Every process gets what the owners have changed.

    Returns:
        Each list of blocks that failed in their owners, of all processes.
    """
    exchange, owners = optimizer.exchange, optimizer.owners
    mine: dict[str, dict[str, Any]] = {}
    messages: dict[str, dict[str, Tensor]] = {}
    for name, state in optimizer.curvature.items():
        if owners[name] != exchange.rank:
            continue
        changed = {
            key: value.contiguous()
            for key, value in state.items()
            if isinstance(value, Tensor) and not _same(before[name].get(key), value)
        }
        messages[name] = changed
        plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        mine[name] = {
            "plain": plain,
            "tensors": {key: (tuple(t.shape), t.dtype) for key, t in changed.items()},
        }
    said = exchange.tell((mine, failed))
    told = {name: facts for theirs, _ in said for name, facts in theirs.items()}
    for name, facts in told.items():
        if owners[name] != exchange.rank:
            messages[name] = {
                key: _room(optimizer.curvature[name].get(key), shape, dtype, optimizer.device)
                for key, (shape, dtype) in facts["tensors"].items()
            }
    ordered = {block.name: messages[block.name] for block in optimizer.blocks}
    for name, tensors in exchange.from_owners(ordered, owners).items():
        if owners[name] != exchange.rank:
            optimizer.curvature[name] |= tensors
    for name, facts in told.items():
        optimizer.curvature[name] |= facts["plain"]
    together = zip(*(theirs for _, theirs in said), strict=True)
    return tuple([name for names in lists for name in names] for lists in together)


def _room(
    old: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What a new tensor can be put into: the old one, where it fits."""
    if old is not None and tuple(old.shape) == tuple(shape) and old.dtype == dtype:
        return old
    return torch.empty(shape, dtype=dtype, device=device)


def _settle(
    optimizer: "NaturalGradient",
    rows: dict[str, list[Rows]],
    samples: dict[str, float],
    kept: dict[str, float],
) -> None:
    method, moments = optimizer.approximation, dict[str, Tensor]()
    for block in optimizer.blocks:
        if block.name in samples:
            state = optimizer.curvature[block.name]
            found = method.moments(block, state, rows[block.name], samples[block.name])
            if found is not None:
                moments[block.name] = found
    for dtype in sorted({each.dtype for each in moments.values()}, key=str):
        some = {name: each for name, each in moments.items() if each.dtype == dtype}
        flat = optimizer.exchange.sum(torch.cat([each.flatten() for each in some.values()]))
        parts = torch.split(flat, [each.numel() for each in some.values()])
        for (name, each), part in zip(some.items(), parts, strict=True):
            method.settle(optimizer.curvature[name], part.view(each.shape).clone(), kept[name])


def _versions(optimizer: "NaturalGradient") -> Versions:
    return {
        name: {key: (t, t._version) for key, t in state.items() if isinstance(t, Tensor)}
        for name, state in optimizer.curvature.items()
    }


def _same(before: tuple[Tensor, int] | None, now: Tensor) -> bool:
    return before is not None and before[0] is now and before[1] == now._version


def _complain(layers: Any, error: Exception, failed: list[str], name: str) -> None:
    failed.append(name)
    warn(f"layer '{next(iter(layers))}': {error}; the last statistics are kept")
