"""Choice of redundant channels by their saliency, with survivors rounded to multiples.

Ours plans to the end in each period: blocks of channels go from the groups where they are least
salient until the number is met within half a block, or the cost; the lowest of them go first. The
authors' rule rounds up in each period and takes channels by their index, and removes fewer than
asked for.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from smallfry.transforms.groups import ChannelGroup

Chosen = list[list[int]]  # channels of each group, ascending


def block_size(group: ChannelGroup, divisible: int) -> int:
    """Return the number whose multiples the survivors of a group are; 1 for heads."""
    step = 1 if group.counts or group.channels <= divisible else divisible
    return max(step, group.divisor)


def can_lose(group: ChannelGroup, divisible: int) -> bool:
    """Return whether a group has more channels than it must keep."""
    least = 1 if group.counts else divisible
    return group.zero_invariant and group.channels > max(least, group.divisor)


def lowest(scores: Sequence[Tensor], among: Chosen, number: int) -> Chosen:
    """Choose the least salient of some channels.

    Args:
        scores: Saliencies of each group, (channels,).
        among: Channels to choose from.
        number: How many to choose, at most all.
    """
    every = sorted(
        (float(score[channel]), group, channel)
        for group, (score, channels) in enumerate(zip(scores, among, strict=True))
        for channel in channels
    )
    chosen: Chosen = [[] for _ in scores]
    for _, group, channel in every[:number]:
        chosen[group].append(channel)
    return [sorted(each) for each in chosen]


def lowest_blocks(
    scores: Sequence[Tensor], gone: Chosen, number: int, steps: Sequence[int]
) -> Chosen:
    """Choose channels so that survivors are multiples and ``number`` are gone in all.

    Args:
        scores: Saliencies of each group, (channels,).
        gone: Channels that are not there any more; they count.
        number: Channels of all groups to be gone, met within half a block where it can be.
        steps: Block size of each group; survivors are a multiple, or all.
    """
    queues = []
    for group, score in enumerate(scores):
        taken = set(gone[group])
        order = score.sort(stable=True).indices.tolist()
        queues.append([c for c in order if c not in taken])
    chosen: Chosen = [[] for _ in scores]
    for group, step in enumerate(steps):  # what was begun is brought to a multiple
        if gone[group]:
            _take(chosen[group], queues[group], len(queues[group]) % step)
    total = sum(map(len, gone)) + sum(map(len, chosen))
    while total < number:
        blocks = {
            group: size
            for group, step in enumerate(steps)
            if (size := len(queues[group]) % step or step) <= len(queues[group]) - step
        }
        if not blocks:
            break
        means = {g: float(scores[g][queues[g][:size]].mean()) for g, size in blocks.items()}
        best = min(means, key=lambda group: (means[group], group))
        if total + blocks[best] - number > number - total:
            break
        _take(chosen[best], queues[best], blocks[best])
        total += blocks[best]
    return [sorted(each) for each in chosen]


def give_back(
    scores: Sequence[Tensor], chosen: Chosen, steps: Sequence[int], fits: Callable[[Chosen], bool]
) -> Chosen:
    """Return chosen blocks as long as the rest still fits, the most salient first.

    Args:
        scores: Saliencies of each group, (channels,).
        chosen: Channels of each group.
        steps: Block size of each group.
        fits: Predicate of a choice.
    """
    queues = [
        sorted(channels, key=lambda c: float(score[c]))
        for score, channels in zip(scores, chosen, strict=True)
    ]
    open_groups = {g for g, queue in enumerate(queues) if len(queue) >= steps[g]}
    while open_groups:
        means = {g: float(scores[g][queues[g][-steps[g] :]].mean()) for g in open_groups}
        best = max(means, key=lambda group: (means[group], -group))
        trial = [q[: len(q) - steps[best]] if g == best else q for g, q in enumerate(queues)]
        if fits([sorted(each) for each in trial]):
            queues = trial
        if queues is not trial or len(queues[best]) < steps[best]:
            open_groups.discard(best)
    return [sorted(each) for each in queues]


def fewest_within(
    choose: Callable[[int], Chosen], value: Callable[[Chosen], float], most: float, limit: int
) -> int:
    """Return the smallest number whose choice costs at most ``most``; ``limit`` if none does.

    Args:
        choose: Channels that are gone, by their number; costs never rise with it.
        value: Cost of what remains.
        most: The budget.
        limit: Largest number.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high) // 2
        if value(choose(middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return low


def reference_choice(
    scores: Sequence[Tensor], ever: Chosen, gone: Chosen, number: int, divisible: int
) -> Chosen:
    """Choose as only_train_once does: by index among the lowest, rounded up in each period.

    Args:
        scores: Saliencies of each group, (channels,).
        ever: Channels chosen in earlier periods, even if they were kept after all.
        gone: Those that were removed.
        number: Channels of this period.
        divisible: Survivors are a multiple of it.
    """
    every = torch.cat(list(scores))
    before = sum(map(len, ever))
    low = set(every.topk(before + number, largest=False).indices.tolist())
    chosen: Chosen = [[] for _ in scores]
    offset = 0
    for group, score in enumerate(scores):
        for channel in range(len(score)):
            fresh = offset + channel in low and channel not in ever[group]
            if fresh and sum(map(len, chosen)) < number:
                chosen[group].append(channel)
        offset += len(score)
    return [
        each[: _reference_room(len(score), len(out), len(each), divisible)]
        for score, out, each in zip(scores, gone, chosen, strict=True)
    ]


def _reference_room(channels: int, gone: int, active: int, divisible: int) -> int:
    left = channels - gone - active
    if left % divisible == 0 and left > 0:
        return active
    keep = min(channels, max((left // divisible + 1) * divisible, divisible))
    return max(0, channels - gone - keep)


def _take(chosen: list[int], queue: list[int], count: int) -> None:
    chosen += queue[:count]
    del queue[:count]


def without(channels: Collection[int], total: int) -> Tensor:
    """Return the other channels of a group, int64."""
    gone = set(channels)
    return torch.tensor([c for c in range(total) if c not in gone], dtype=torch.int64)
