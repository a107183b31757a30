"""What processes that share a batch send each other, with every byte counted.

Each block has an owner, which alone does the work that can't be divided by samples. Sums over
samples go to the owner, what it makes of them goes to all. Messages for one owner travel as one
flat tensor for each precision, so that a refresh takes a few large messages and not thousands of
small ones. Every process holds the whole state in the end, bit for bit the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from smallfry.curvature import Rows
from smallfry.errors import UsageError

Message = dict[str, Tensor]


class Exchange:
    """A group of processes; without a group, this one alone.

    Args:
        group: The processes whose gradients are averaged: a group of ``torch.distributed``, None
            for all there are, False for this one alone.
    """

    def __init__(self, group: Any = None) -> None:
        ready = dist.is_available() and dist.is_initialized()
        if group not in (None, False) and not ready:
            raise UsageError("process_group= needs torch.distributed.init_process_group() first")
        self.group = group if group not in (None, False) else None
        alone = group is False or not ready
        self.rank = 0 if alone else dist.get_rank(self.group)
        if self.rank < 0:
            raise UsageError(
                "process_group= must be a group that this process is a member of; create the "
                "optimizer in the members alone"
            )
        self.count = 1 if alone else dist.get_world_size(self.group)
        self.bytes: dict[str, int] = {}  # by kind of message, since the last ``forget``

    def forget(self) -> None:
        """Begin to count bytes anew."""
        self.bytes = {}

    # Small things, for all

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place, for all."""
        if self.count > 1:
            self._count("summed for all", tensor)
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sums of some numbers."""
        if self.count == 1:
            return [float(value) for value in values]
        return self.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist()

    # Large things, for and from owners

    def sums_to_owners(
        self, messages: Mapping[str, Message], owners: Mapping[str, int]
    ) -> dict[str, Message]:
        """Of each block the sum over processes, in its owner; nothing in the others."""
        waiting = []
        for owner, names in _by_owner(messages, owners).items():
            for flat, parts in _flat(messages, names):
                self._count("summed for owners", flat)
                work: Any = dist.reduce(flat, self._global(owner), group=self.group, async_op=True)
                waiting.append((work, owner, flat, parts))
        found: dict[str, Message] = {}
        for work, owner, flat, parts in waiting:
            work.wait()
            if owner == self.rank:
                _unflatten(flat, parts, found)
        return found

    def from_owners(
        self, messages: Mapping[str, Message], owners: Mapping[str, int]
    ) -> dict[str, Message]:
        """What each block's owner has, in all; elsewhere ``messages`` tell the shapes only."""
        waiting = []
        for owner, names in _by_owner(messages, owners).items():
            for flat, parts in _flat(messages, names):
                self._count("spread by owners", flat)
                work: Any = dist.broadcast(
                    flat, self._global(owner), group=self.group, async_op=True
                )
                waiting.append((work, flat, parts))
        found: dict[str, Message] = {}
        for work, flat, parts in waiting:
            work.wait()
            _unflatten(flat, parts, found)
        return found

    def rows_to_owners(
        self, mine: Mapping[str, Sequence[Rows]], owners: Mapping[str, int], like: Tensor
    ) -> dict[str, list[Rows]]:
        """The rows of all processes, in their order, in each block's owner.

        Args:
            mine: By block; a process may have none.
            owners: By block.
            like: A tensor with the device and the precision of rows.
        """
        shapes = self.tell(
            {n: [(tuple(r.inputs.shape), tuple(r.gradients.shape)) for r in mine[n]] for n in mine}
        )
        work, pieces, kept = [], {}, []
        for sender in range(self.count):
            for owner, names in _by_owner(mine, owners).items():
                if self.rank not in (sender, owner):
                    continue
                if self.rank == sender:
                    flat = [t.flatten() for name in names for rows in mine[name] for t in rows]
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

    def tell(self, mine: Any) -> list[Any]:
        """What all processes say, plain data, in all."""
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, mine, group=self.group)
        return said

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _count(self, kind: str, tensor: Tensor) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0) + tensor.nbytes


def _by_owner(names: Mapping[str, Any], owners: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(owners[name], []).append(name)
    return dict(sorted(found.items()))


Parts = list[tuple[str, str, torch.Size]]


def _flat(messages: Mapping[str, Message], names: Sequence[str]) -> list[tuple[Tensor, Parts]]:
    """All tensors of some blocks as one, for each precision."""
    kinds: dict[torch.dtype, list[tuple[str, str, Tensor]]] = {}
    for name in names:
        for key, tensor in messages[name].items():
            kinds.setdefault(tensor.dtype, []).append((name, key, tensor))
    return [
        (
            torch.cat([tensor.flatten() for _, _, tensor in kinds[kind]]),
            [(name, key, tensor.shape) for name, key, tensor in kinds[kind]],
        )
        for kind in sorted(kinds, key=str)
    ]


def _unflatten(flat: Tensor, parts: Parts, into: dict[str, Message]) -> None:
    start = 0
    for name, key, shape in parts:
        stop = start + shape.numel()
        into.setdefault(name, {})[key] = flat[start:stop].view(shape).clone()
        start = stop
