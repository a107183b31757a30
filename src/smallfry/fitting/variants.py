"""Compressed forms of a trained candidate, by its excess over the budget.

int8 fits      int8, and float32 if that fits too
otherwise      channels pruned while training (HESSO), distilled from the candidate, int8
only kB lack   also weights of four bits, trained with learned step sizes (LSQ)
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smallfry.fitting.config import Budget
from smallfry.fitting.costs import Costs
from smallfry.training.config import ModelConfig, TrainConfig
from smallfry.training.distillation_config import DistillationConfig

MARGIN = 0.9  # of what the budget allows, as channels go in whole groups
FEWER = 0.85  # of the channels, in a second attempt at most
MOST_PRUNED = 0.85  # of the channels
PRUNING, ROUNDING = 0.5, 0.1  # of the learning rate, in fine-tuning
SLOWER = {"hesso": 1.8, "lsq": 2.5}  # times the seconds of an epoch, with the teacher's


@dataclass(frozen=True)
class Variant:
    """Form of a candidate.

    Args:
        name: Such as int8.
        precision: Precision of the export.
        method: Entry of a method that acts while training, if any.
    """

    name: str
    precision: str
    method: dict[str, dict[str, Any]] | None = None

    @property
    def kind(self) -> str | None:
        """Name of the method."""
        return None if self.method is None else next(iter(self.method))


PRUNED = "pruned-int8"
INT8, FLOAT32 = Variant("int8", "int8"), Variant("float32", "float32")


def find_variants(costs: Costs, budget: Budget, precisions: tuple[str, ...]) -> list[Variant]:
    """Return the forms that may fit, the simplest first.

    Args:
        costs: Of the candidate before compression.
        budget: The limits.
        precisions: Those of the device format.
    """
    plain = [v for v in (INT8, FLOAT32) if budget.fits(costs.kb[v.name], costs.ms[v.name])]
    if plain:
        return [v for v in plain if v.precision in precisions]
    found = [_pruned(costs, budget)]
    lacks_size_only = budget.ms is None or min(costs.ms.values()) <= budget.ms
    small = budget.kb is None or costs.four_bit_kb <= budget.kb
    if lacks_size_only and small and "own_bits" in precisions:
        found.append(Variant("lsq4", "own_bits", {"lsq": {"weights": 4, "activations": None}}))
    return found


def _pruned(costs: Costs, budget: Budget) -> Variant:
    """Return pruning to the limit that lacks most."""
    kept_bytes = kept_macs = 1.0
    if budget.kb is not None:
        weights = costs.parameters / 1000
        kept_bytes = max(0.0, MARGIN * budget.kb - costs.overhead_kb) / weights
    if budget.ms is not None:
        kept_macs = MARGIN * budget.ms / costs.ms["int8"]
    # weights and arithmetic grow with the product of two layers' channels
    kept = max(1 - MOST_PRUNED, min(1.0, math.sqrt(min(kept_bytes, kept_macs))))
    sparsity = round(1 - kept, 3)
    return Variant(PRUNED, "int8", {"hesso": {"sparsity": sparsity, "divisible": 4}})


def harder(variant: Variant, excess: float) -> Variant | None:
    """Return pruning of more channels, after a result that exceeds the budget so many times.

    None after the second time, or where hardly a channel would be left.
    """
    assert variant.method is not None
    settings = variant.method["hesso"]
    kept = (1 - settings["sparsity"]) * min(FEWER, math.sqrt(MARGIN / excess))
    if variant.name != PRUNED or kept < 1 - MOST_PRUNED:
        return None
    changed = {"hesso": {**settings, "sparsity": round(1 - kept, 3)}}
    return replace(variant, name=f"{PRUNED}-more", method=changed)


def tuning(
    config: TrainConfig, run: Path, place: Path, variant: Variant, epochs: int
) -> TrainConfig:
    """Return the configuration of a variant's fine-tuning.

    Args:
        config: Of the candidate's training.
        run: Its run folder.
        place: New run folder.
        variant: The variant, with a method.
        epochs: Epochs of fine-tuning.
    """
    assert variant.method is not None
    rate = PRUNING if variant.kind == "hesso" else ROUNDING
    assert config.optimizer.lr is not None
    return replace(
        config,
        run=place,
        model=ModelConfig(start=str(run)),
        methods=[variant.method],
        distillation=DistillationConfig(str(run)),
        optimizer=replace(config.optimizer, lr=rate * config.optimizer.lr),
        schedule=replace(config.schedule, warmup_epochs=epochs / 10),
        epochs=epochs,
        precision="32-true",
    )


def tuned_epochs(variant: Variant, epoch_seconds: float, seconds: float) -> int:
    """Return the epochs of fine-tuning in so many seconds, at least one."""
    assert variant.kind is not None
    return max(1, math.floor(seconds / (SLOWER[variant.kind] * epoch_seconds) + 0.5))
