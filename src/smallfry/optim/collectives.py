"""Collectives for distributed curvature, with byte counts; a single process sends nothing.

Each block has an owner, which alone does the work that can't be divided by samples. Sums over
samples go to the owner, what it makes of them goes to all. Messages for one owner travel as one
flat tensor for each precision, so that a refresh takes a few large messages and not thousands of
small ones. Every process holds the whole state in the end, bit for bit the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from smallfry.curvature import Rows
from smallfry.errors import UsageError

Message = dict[str, Tensor]
Parts = list[tuple[str, str, torch.Size]]


class Collectives:
    """Process group; without one, this process alone.

    Args:
        group: The processes whose gradients are averaged: a group of ``torch.distributed``, None
            for all there are, False for this one alone.
        device: Device of small messages.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.device = torch.device("cpu") if device is None else device
        ready = dist.is_available() and dist.is_initialized()
        if group not in (None, False) and not ready:
            raise UsageError("process_group= needs torch.distributed.init_process_group() first")
        self.group = group if group not in (None, False) else None
        alone = group is False or not ready
        self.rank = 0 if alone else dist.get_rank(self.group)
        if self.rank < 0:
            raise UsageError(
                "process_group= must contain this process; create the optimizer only in the "
                "members of the group"
            )
        self.count = 1 if alone else dist.get_world_size(self.group)
        self.bytes: dict[str, int] = {}  # by kind of message, since the last ``reset_bytes``
        self._rooms: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def reset_bytes(self) -> None:
        """Reset the byte counts."""
        self.bytes = {}

    # Small things, for all

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place, for all."""
        if self.count > 1:
            self._count("summed for all", tensor)
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over processes."""
        if self.count == 1:
            return [float(value) for value in values]
        return self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def any_process(self, holds: bool) -> bool:
        """Return whether a condition holds in any process."""
        return self.sums([holds])[0] > 0

    @contextmanager
    def publish_failure(self) -> Iterator[None]:
        """Raise a failure of a block of code in all processes; the block must not communicate.

        Raises:
            UsageError: Another process failed, with its message.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.any_process(failure is not None):
            messages = self.all_gather_object(None if failure is None else str(failure))
            first = next(message for message in messages if message is not None)
            raise failure or UsageError(f"another process failed: {first}")

    # Large things, for and from owners

    def sums_for_all(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Sum each block over processes, for all; ``messages`` are buffers."""
        if self.count == 1:
            return dict(messages)
        waiting = []
        for flat, parts in self._flat("for all", 0, messages, list(messages)):
            self._count("summed for all", flat)
            waiting.append((dist.all_reduce(flat, group=self.group, async_op=True), flat, parts))
        for work, flat, parts in waiting:
            work.wait()
            _unflatten(flat, parts, messages)
        return dict(messages)

    def sums_to_owners(
        self, messages: Mapping[str, Message], owners: Mapping[str, int]
    ) -> dict[str, Message]:
        """Sum each block over processes, for its owner, which uses ``messages`` as buffers."""
        if self.count == 1:
            return dict(messages)
        waiting = []
        for owner, names in _by_owner(messages, owners).items():
            for flat, parts in self._flat("sums", owner, messages, names):
                self._count("summed for owners", flat)
                work: Any = dist.reduce(flat, self._global(owner), group=self.group, async_op=True)
                waiting.append((work, owner, flat, parts))
        found: dict[str, Message] = {}
        for work, owner, flat, parts in waiting:
            work.wait()
            if owner == self.rank:
                _unflatten(flat, parts, messages)
                found |= {name: messages[name] for name, _, _ in parts}
        return found

    def from_owners(
        self, messages: Mapping[str, Message], owners: Mapping[str, int]
    ) -> dict[str, Message]:
        """Broadcast each block's data from its owner; elsewhere ``messages`` are buffers."""
        if self.count == 1:
            return dict(messages)
        waiting = []
        for owner, names in _by_owner(messages, owners).items():
            mine = owner == self.rank
            for flat, parts in self._flat("states", owner, messages, names, filled=mine):
                self._count("spread by owners", flat)
                work: Any = dist.broadcast(
                    flat, self._global(owner), group=self.group, async_op=True
                )
                waiting.append((work, mine, flat, parts))
        for work, mine, flat, parts in waiting:
            work.wait()
            if not mine:
                _unflatten(flat, parts, messages)
        return dict(messages)

    def rows_to_owners(
        self, mine: Mapping[str, Sequence[Rows]], owners: Mapping[str, int], like: Tensor
    ) -> dict[str, list[Rows]]:
        """Gather the rows of all processes, in order, at each block's owner.

        Args:
            mine: By block; a process may have none.
            owners: By block.
            like: A tensor with the device and the precision of rows.
        """
        if self.count == 1:
            return {name: list(rows) for name, rows in mine.items()}
        shapes = self.all_gather_object(
            {n: [(tuple(r.inputs.shape), tuple(r.gradients.shape)) for r in mine[n]] for n in mine}
        )
        work, pieces, kept = [], {}, []
        for sender in range(self.count):
            for owner, names in _by_owner(mine, owners).items():
                if self.rank not in (sender, owner):
                    continue
                if self.rank == sender:
                    flat = [
                        t.flatten()
                        for name in names
                        for rows in mine[name]
                        for t in (rows.inputs, rows.gradients)
                    ]
                    if owner == sender or not flat:
                        continue
                    kept.append(torch.cat(flat).to(like.dtype))
                    self._count("rows to owners", kept[-1])
                    work.append(dist.isend(kept[-1], self._global(owner), group=self.group))
                    continue
                sizes = [n for name in names for pair in shapes[sender][name] for n in pair]
                if sizes:
                    flat_in = like.new_empty(sum(torch.Size(size).numel() for size in sizes))
                    pieces[sender] = flat_in
                    work.append(dist.irecv(flat_in, self._global(sender), group=self.group))
        for each in work:
            if each is not None:
                each.wait()
        found: dict[str, list[Rows]] = {}
        for sender in range(self.count):
            start = 0
            for name in (n for n in mine if owners[n] == self.rank):
                if sender == self.rank:
                    found.setdefault(name, []).extend(mine[name])
                    continue
                for pair in shapes[sender][name]:
                    tensors = []
                    for size in pair:
                        stop = start + torch.Size(size).numel()
                        tensors.append(pieces[sender][start:stop].view(size))
                        start = stop
                    found.setdefault(name, []).append(Rows(*tensors))
        return found

    def all_gather_object(self, mine: Any) -> list[Any]:
        """Gather plain data of all processes, for all."""
        if self.count == 1:
            return [mine]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def _flat(
        self,
        kind: str,
        owner: int,
        messages: Mapping[str, Message],
        names: Sequence[str],
        filled: bool = True,
    ) -> list[tuple[Tensor, Parts]]:
        """Concatenate all tensors of some blocks for each precision, or allocate as much."""
        found = []
        for told in _by_precision(messages, names).values():
            tensors = [tensor for _, _, tensor in told]
            flat = self._room(kind, owner, tensors[0], sum(tensor.numel() for tensor in tensors))
            if filled:
                torch.cat([tensor.flatten() for tensor in tensors], out=flat)
            found.append((flat, [(name, key, tensor.shape) for name, key, tensor in told]))
        return found

    def _room(self, kind: str, owner: int, like: Tensor, numbers: int) -> Tensor:
        """Return a message buffer, on a CPU the same each time.

        There malloc gives large blocks back, and to get new ones page by page takes longer than to
        fill them.
        """
        place = kind, owner, like.dtype
        room = self._rooms.get(place)
        if room is None or room.numel() < numbers:
            room = like.new_empty(numbers)
            if like.device.type == "cpu":
                self._rooms[place] = room
        return room[:numbers]

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _count(self, kind: str, tensor: Tensor) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0) + tensor.nbytes


def _by_owner(names: Mapping[str, Any], owners: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(owners[name], []).append(name)
    return dict(sorted(found.items()))


def _by_precision(
    messages: Mapping[str, Message], names: Sequence[str]
) -> dict[torch.dtype, list[tuple[str, str, Tensor]]]:
    kinds: dict[torch.dtype, list[tuple[str, str, Tensor]]] = {}
    for name in names:
        for key, tensor in messages[name].items():
            kinds.setdefault(tensor.dtype, []).append((name, key, tensor))
    return dict(sorted(kinds.items(), key=lambda item: str(item[0])))


def _unflatten(flat: Tensor, parts: Parts, into: Mapping[str, Message]) -> None:
    start = 0
    for name, key, shape in parts:
        stop = start + shape.numel()
        into[name][key].copy_(flat[start:stop].view(shape))
        start = stop
