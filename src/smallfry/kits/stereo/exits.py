"""Shorter models of a trained one: the first exits alone, without what only later ones need."""

from dataclasses import replace

from smallfry.errors import UsageError
from smallfry.kits.stereo.models import RTS2Net
from smallfry.training.run import TrainedModel
from smallfry.transforms.build import build

__all__ = ["cut"]


def cut(trained: TrainedModel, exits: int) -> TrainedModel:
    """Return the model with its first exits alone.

    Its outputs equal the longer model's of the same names. It is saved, evaluated, exported and
    timed as any other.

    Args:
        trained: A trained stereo network, as ``smallfry.load`` returns it, not compressed.
        exits: How many to keep, from 1 to those it has.

    Raises:
        UsageError: Another model, a compressed one, or a number of exits out of range.

    Example:
        >>> cut(smallfry.load("runs/stereo"), 1).save("runs/stereo-1")  # doctest: +SKIP
    """
    model, spec = trained.model, trained.spec
    if not isinstance(model, RTS2Net) or spec.transforms:
        raise UsageError("exits are cut off trained stereo networks, before they are compressed")
    if not 1 <= exits <= model.exits:
        raise UsageError(f"the network has {model.exits} exits: keep 1 to {model.exits}")
    short = replace(spec, arguments={**spec.arguments, "exits": exits})
    later = tuple(f"stages.{number}." for number in range(exits, model.exits))
    kept = {name: v for name, v in model.state_dict().items() if not name.startswith(later or "/")}
    return trained.compressed(build(short, kept).eval(), short, ())
