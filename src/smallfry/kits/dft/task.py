"""Densities of molecules: the Coulomb energy of their error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.kits.dft.layout import WIDTH, active, symbol_of, to_coefficients, whitened_metric
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults
from smallfry_runtime.decoders import require_no_settings

__all__ = ["DensityCoefficients"]

GOOD = 2e-3  # hartree per electron: below it a start saves cycles
KEPT = 2048  # molecules whose metric is kept
DIGITS = 7  # significant ones of an answer


@lru_cache(maxsize=KEPT)
def _geometry(rows: bytes) -> tuple[Tensor, Tensor, int]:
    """Return the places in use of a molecule, their Coulomb energies, and its electrons."""
    found = np.frombuffer(rows, np.float32).reshape(-1, 4)
    (there,) = np.nonzero(found[:, 0] > 0)
    found = found[there]
    numbers, positions = found[:, 0].astype(np.int64), found[:, 1:].astype(np.float64)
    energies = torch.from_numpy(whitened_metric(numbers, positions))
    atoms, places = np.divmod(active(numbers), WIDTH)
    return torch.from_numpy(WIDTH * there[atoms] + places), energies, int(numbers.sum())


@register
@dataclass(frozen=True)
class DensityCoefficients:
    """Coefficients of the density: outputs (molecules, atoms, 50), labels (molecules, atoms, 53).

    The loss is (ρ − ρ̃|ρ − ρ̃) per electron, in hartree, of the predicted density ρ̃: twice the
    Coulomb energy of the error. Natural gradient takes the Gaussian of the whitened coefficients,
    whose metric is that of the loss but for the energies between atoms.
    """

    name: ClassVar[str] = "dft"
    likelihood: ClassVar[str] = "gaussian_mean"
    adds_terms: ClassVar[bool] = True  # those between atoms
    choices: ClassVar[tuple[str, ...]] = ("density_error", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "density_net_tiny", "cross_entropy")
    augmentations: ClassVar[frozenset[str]] = frozenset({"repeats"})
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def outputs(self, classes: int) -> int:
        """Return the numbers of an atom."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the labels.

        Raises:
            UsageError: The data has no densities.
        """
        if labels.ndim != 3 or labels.shape[2] != 4 + WIDTH:
            raise UsageError(
                "the task dft needs molecules to learn: --data dft-g2, or dft-xyz with a folder"
            )
        return labels

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute (ρ − ρ̃|ρ − ρ̃) per electron of each molecule, (molecules,)."""
        errors = outputs[:, :, 1:].to(targets) - targets[:, :, 4:]
        rows = targets[:, :, :4].detach().float().cpu().contiguous().numpy()
        found = []
        for error, atoms in zip(errors, rows, strict=True):
            places, energies, electrons = _geometry(atoms.tobytes())
            part = error.flatten()[places.to(error.device)]
            found.append(part @ energies.to(part) @ part / electrons)
        return torch.stack(found)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean over molecules."""
        return self.losses(outputs, targets).mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mark the molecules with an error below 0.002 hartree per electron, (molecules,)."""
        return self.losses(outputs, targets) < GOOD

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute the mean error, the largest, and the share of molecules below 0.002."""
        errors = self.losses(outputs.double(), labels.double())
        return {
            "loss": errors.mean().item(),
            "accuracy": (errors < GOOD).double().mean().item(),
            "density_error": errors.mean().item(),
            "worst_density_error": errors.max().item(),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by the mean error."""
        return (-scores["density_error"],)

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode to the coefficients of each atom in PySCF's order; there are no settings."""
        require_no_settings(settings)
        return [_decoded(sample) for sample in outputs.detach().double().cpu().numpy()]

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the errors of molecules, and of the densities of the best, middle and worst."""
        from smallfry.kits.dft.pictures import draw_densities

        labels = split.labels.double()
        errors = self.losses(outputs.double(), labels)
        draw_densities(labels.numpy(), outputs.double().numpy(), errors, folder / "densities.png")


def _decoded(rows: Any) -> dict[str, Any]:
    rows = rows[rows[:, 0] > 0]
    numbers, atoms = rows[:, 0].astype(np.int64), []
    for number, row in zip(numbers, rows, strict=True):
        found = to_coefficients(np.array([number]), row[None, 1:])
        values = [float(f"{value:.{DIGITS}g}") for value in found.tolist()]
        atoms.append({"element": symbol_of(int(number)), "coefficients": values})
    return {"molecule": " ".join(map(symbol_of, numbers.tolist())), "atoms": atoms}
