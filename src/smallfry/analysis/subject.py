"""Subject of an analysis, from run folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smallfry.analysis.question import Subject
from smallfry.data import Split
from smallfry.data.splits import hold_out
from smallfry.deploy.pretrained import load_trained
from smallfry.errors import UsageError
from smallfry.training.checkpoint import weights_digest
from smallfry.training.evaluation_data import load_like
from smallfry.training.run import require_classes, require_classifier
from smallfry_runtime.names import path_of

__all__ = ["Loaded", "load_subject"]

IMAGES = 2000
WORDS = {"all": "the other half", "validation": "the validation split", "test": "the test split"}


class Loaded(NamedTuple):
    """Subject with the facts of its provenance."""

    subject: Subject
    facts: dict[str, Any]


def load_subject(
    run: str,
    against: Sequence[str] = (),
    data: str | None = None,
    root: Path | None = None,
    *,
    checkpoint: str = "best",
    images: int = IMAGES,
    corruptions: Sequence[tuple[str, int]] = (),
    seed: int = 0,
) -> Loaded:
    """Load a model, images of its training and test split, and versions to compare with.

    Args:
        run: Run folder, shared folder or name on the hub.
        against: Further versions of the model, likewise.
        data: Data instead of the run's own. Without a test and a validation split of its own, half
            of it counts as training images, and the others as test images.
        root: Folder of a named data set.
        checkpoint: ``best`` or ``last``.
        images: At most so many of each split, in a seeded draw.
        corruptions: Names of corruptions with severities.
        seed: Seed of all random choices.

    Raises:
        UsageError: No classifier, or models of other classes.
    """
    trained = load_trained(run, checkpoint)
    require_classifier(trained)
    loaded, test, found = load_like(trained, run, data, root, "test")
    require_classes(trained, loaded.classes, loaded.origin)
    others = {_name(each): load_trained(each) for each in against}
    if len(others) < len(against) or _name(run) in others:
        raise UsageError("against: models need folders of different names")
    for name, other in others.items():
        if other.classes != trained.classes or other.input_shape != trained.input_shape:
            raise UsageError(f"against: {name} takes other images or classes than {run}")
    generator = torch.Generator().manual_seed(seed)
    training = loaded.train
    if found == "all":
        training, test = hold_out(test, 0.5, seed)
    training, test = _drawn(training, images, generator), _drawn(test, images, generator)
    subject = Subject(_name(run), trained, training, test, others, tuple(corruptions), seed)
    facts = {
        "model": run,
        "weights": f"SHA-256 {weights_digest(trained.model.state_dict())}",
        "against": list(against) or "nothing",
        "data": f"{path_of(loaded.name).name} ({'generated' if loaded.generated else 'real'})",
        "images": f"{len(training):,} of training, {len(test):,} of {WORDS[found]}",
        "seed": seed,
    }
    return Loaded(subject, facts)


def _name(run: str) -> str:
    return run.rstrip("/").rpartition("/")[2]


def _drawn(split: Split, images: int, generator: torch.Generator) -> Split:
    if len(split) <= images:
        return split
    return split.take(torch.randperm(len(split), generator=generator)[:images].sort().values)
