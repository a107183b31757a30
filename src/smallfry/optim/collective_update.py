"""Update of block states by their owners, from the rows of all processes.

Sums over samples are divided by samples: each process adds up its own, and the sum goes to the
block's owner. What can't be divided so, factorisations and searches for products, is divided by
blocks. Methods that are no function of sums get the rows of all processes into the owner instead.
One process owns everything and sends nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smallfry.curvature import Block, Rows
from smallfry.curvature.kronecker import NotFiniteError
from smallfry.optim.approximation import Approximation, State, Sum, Updating
from smallfry.optim.checks import warn
from smallfry.optim.collectives import Collectives
from smallfry.optim.numerics import statistics_dtype

Versions = dict[str, dict[str, tuple[Tensor, int]]]


class CollectiveUpdate:
    """Update of several blocks in all processes at once.

    Args:
        blocks: The blocks, by name.
        method: Their approximation.
        states: By block; changed in place.
        owners: The process of each block.
        collectives: Messages between processes.
        generator: Random number generator.
        reseed: Brings the generator into the state that it has in all processes for a block.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        method: Approximation,
        states: Mapping[str, State],
        owners: Mapping[str, int],
        collectives: Collectives,
        generator: torch.Generator,
        reseed: Callable[[str], None],
    ) -> None:
        self.blocks, self.method, self.states, self.owners = blocks, method, states, owners
        self.collectives, self.generator, self.reseed = collectives, generator, reseed
        self.failed: list[str] = []  # blocks of this process whose statistics were not finite
        self.everywhere: set[tuple[str, str]] = set()  # block and key of sums that all got

    def run(
        self,
        rows: Mapping[str, Sequence[Rows]],
        samples: Mapping[str, float],
        kept: Mapping[str, float],
    ) -> None:
        """Update all states with a batch.

        Args:
            rows: Rows of each block in this process.
            samples: That blocks saw in all processes; those without any are left alone.
            kept: Share of each block's old statistics.
        """
        if not self.method.divides:
            self._update_owned({name: rows[name] for name in samples}, kept)
            return
        updates: dict[str, Updating] = {}
        requests: dict[str, Any] = {}
        for name in samples:
            self.reseed(name)
            updates[name] = self.method.updating(
                self.blocks[name],
                self.states[name],
                rows[name],
                samples[name],
                kept[name],
                self.generator,
            )
            requests[name] = next(updates[name])
        while requests:
            requests = self._advance(updates, requests)

    def _update_owned(self, rows: Mapping[str, Sequence[Rows]], kept: Mapping[str, float]) -> None:
        first = next(iter(next(iter(self.blocks.values())).parameters.values()))
        like = first.new_empty((), dtype=statistics_dtype(first.dtype))
        gathered = self.collectives.rows_to_owners(rows, self.owners, like)
        for name, whole in gathered.items():
            block, state = self.blocks[name], self.states[name]
            self.reseed(name)
            try:
                self.method.update(block, state, whole, kept[name], self.generator)
                state["shape"] = list(block.shape)
            except NotFiniteError as error:
                self._fail(name, error)

    def _advance(
        self, updates: Mapping[str, Updating], requests: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Serve the requests of all blocks, and collect their next ones."""
        sums = {name: one for name, one in requests.items() if isinstance(one, Sum)}
        for_all = {name: one.parts for name, one in sums.items() if one.everywhere}
        for_owners = {name: one.parts for name, one in sums.items() if not one.everywhere}
        self.everywhere |= {(name, key) for name, parts in for_all.items() for key in parts}
        made: dict[str, State] = {}
        for name, one in requests.items():
            if name in sums:
                continue
            if self.owners[name] == self.collectives.rank:
                made[name] = one.make()
            else:
                made[name] = {key: torch.empty_like(t) for key, t in one.like.items()}
        served: dict[str, Any] = {}
        if for_all:
            served |= self.collectives.sums_for_all(for_all)
        if for_owners:
            served |= self.collectives.sums_to_owners(for_owners, self.owners)
        if made:
            served |= self.collectives.from_owners(made, self.owners)
        following = {}
        for name in requests:
            try:
                following[name] = updates[name].send(served.get(name))
            except StopIteration:
                if self.owners[name] == self.collectives.rank:
                    self.states[name]["shape"] = list(self.blocks[name].shape)
            except NotFiniteError as error:  # at the very end, in the owner
                self._fail(name, error)
        return following

    def _fail(self, name: str, error: Exception) -> None:
        self.failed.append(name)
        layer = next(iter(self.blocks[name].layers))
        warn(f"layer '{layer}': {error}; the last statistics are kept")


def versions_of(states: Mapping[str, State]) -> Versions:
    """Return the tensors of all states, with their in-place versions."""
    return {
        name: {key: (t, t._version) for key, t in state.items() if isinstance(t, Tensor)}
        for name, state in states.items()
    }


def share_states(
    states: Mapping[str, State],
    before: Versions,
    owners: Mapping[str, int],
    collectives: Collectives,
    *failed: list[str],
) -> tuple[list[str], ...]:
    """Broadcast the owners' changes to all processes.

    Args:
        states: By block, in the order of the blocks.
        before: As they were when all processes had the same.
        owners: The process of each block.
        collectives: Messages between processes.
        failed: Lists of blocks that failed in this process.

    Returns:
        Each of those lists, of all processes.
    """
    if collectives.count == 1:
        return failed
    mine: dict[str, dict[str, Any]] = {}
    messages: dict[str, dict[str, Tensor]] = {}
    for name, state in states.items():
        if owners[name] != collectives.rank:
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
    gathered = collectives.all_gather_object((mine, failed))
    changes = {name: facts for theirs, _ in gathered for name, facts in theirs.items()}
    for name, facts in changes.items():
        if owners[name] != collectives.rank:
            messages[name] = {
                key: _room(states[name].get(key), shape, dtype, collectives.device)
                for key, (shape, dtype) in facts["tensors"].items()
            }
    ordered = {name: messages[name] for name in states}
    for name, tensors in collectives.from_owners(ordered, owners).items():
        if owners[name] != collectives.rank:
            states[name].update(tensors)
    for name, facts in changes.items():
        states[name].update(facts["plain"])
    by_list = zip(*(theirs for _, theirs in gathered), strict=True)
    return tuple([name for names in lists for name in names] for lists in by_list)


def _room(
    old: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor to receive into: the old one, if it fits."""
    if old is not None and tuple(old.shape) == tuple(shape) and old.dtype == dtype:
        return old
    return torch.empty(shape, dtype=dtype, device=device)


def _same(before: tuple[Tensor, int] | None, now: Tensor) -> bool:
    return before is not None and before[0] is now and before[1] == now._version
