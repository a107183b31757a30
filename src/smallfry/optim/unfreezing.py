"""Unfreezing of layers after the optimizer was built."""

from typing import Any

from smallfry.curvature import Block, Taps, cover
from smallfry.errors import UsageError
from smallfry.optim.groups import build_adamw, natural_groups, split_groups
from smallfry.optim.one_hot import with_embeddings
from smallfry.optim.preconditioned import PreconditionedOptimizer


def unfreeze(optimizer: PreconditionedOptimizer, group: dict[str, Any]) -> None:
    """Add parameters of the model; the curvature of other layers stays.

    Args:
        optimizer: The optimizer.
        group: As for ``torch.optim``; what it leaves out is as for the first parameters.

    Raises:
        UsageError: A parameter is trained already, is frozen, or is not the model's.
    """
    model = optimizer.model()
    assert model is not None
    defaults = {"fallback_lr": optimizer.fallback_lr, **optimizer.defaults}
    groups = natural_groups(model, [group], **defaults)
    new = [p for each in groups for p in each["params"]]
    if not new:
        raise UsageError("the parameters of the group are frozen: call requires_grad_() first")
    twice = next((optimizer.names[p] for p in new if p in optimizer.names), None)
    if twice is not None:
        raise UsageError(f"parameter '{twice}' is trained by this optimizer already")
    trained = {*optimizer.names, *new}
    coverage = cover(model, trained, optimizer.exclude, optimizer.tied)
    owner = optimizer.preconditioner
    owner.approximation = with_embeddings(owner.approximation, coverage.blocks)
    known = {_key(block): block for block in optimizer.blocks}
    blocks = tuple(known.get(_key(block), block) for block in coverage.blocks)
    natural = {p for block in blocks for p in block.parameters.values()}
    covered, rest = split_groups(groups, natural)
    optimizer.preconditioner.cover(blocks, [b.name for b in blocks if _key(b) in known])
    optimizer.uncovered = coverage.uncovered
    optimizer.names = {p: name for name, p in model.named_parameters() if p in trained}
    for p in new:
        optimizer.frozen.pop(optimizer.names[p], None)
    optimizer.observer.watch(Taps(blocks))
    optimizer.observer.needs_identity = optimizer.preconditioner.needs_identity
    optimizer.overdue = optimizer.overdue_inverse = True
    optimizer.checked = False
    optimizer.param_groups += covered
    if rest and optimizer.adamw is None:
        optimizer.adamw = build_adamw(rest)
        assert optimizer.adamw is not None
        optimizer.param_groups += optimizer.adamw.param_groups
    elif optimizer.adamw is not None:
        for each in rest:
            optimizer.adamw.add_param_group(each)
            optimizer.param_groups.append(optimizer.adamw.param_groups[-1])


def _key(block: Block) -> tuple[Any, ...]:
    return (block.name, tuple(block.parameters), tuple(block.layers), block.shape)
