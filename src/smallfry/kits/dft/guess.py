"""Starts of PySCF's calculations from a trained network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyscf import gto
from torch import nn

from smallfry.errors import UsageError
from smallfry.kits.dft.density import (
    Floats,
    auxiliary,
    constrained,
    require_closed_shell,
    start,
)
from smallfry.kits.dft.layout import to_coefficients
from smallfry.kits.dft.models import DensityNet

__all__ = ["DensityGuess"]


@dataclass(frozen=True)
class DensityGuess:
    """Initial guess from predicted densities, for closed shells.

    Args:
        model: A ``DensityNet``, ready to compute.

    Example:
        >>> from pyscf import dft
        >>> hydrogen = gto.M(atom="H 0 0 0; H 0 0 0.74", basis="def2-svp", verbose=0)
        >>> guess = DensityGuess(DensityNet().eval())
        >>> guess.density_matrix(dft.RKS(hydrogen, xc="pbe")).shape
        (10, 10)
    """

    model: nn.Module

    @classmethod
    def load(cls, run: str | Path) -> "DensityGuess":
        """Load the network of a run folder.

        Raises:
            UsageError: Its model is another.
            RunError: There is no trained model.
        """
        import smallfry

        model = smallfry.load(run).model
        if not isinstance(model, DensityNet):
            raise UsageError(
                f"{run}: holds {type(model).__name__}, not a density network: train one with "
                "smallfry train --task dft"
            )
        return cls(model.eval())

    @torch.inference_mode()
    def coefficients(self, molecule: gto.Mole) -> Floats:
        """Predict the density of a molecule with its number of electrons, (functions,).

        Args:
            molecule: PySCF's, built; its orbitals do not matter.

        Raises:
            UsageError: An ion, a molecule with core potentials or ghosts, or an element that the
                network has not learnt.
        """
        numbers = np.array([gto.charge(molecule.atom_pure_symbol(i)) for i in range(molecule.natm)])
        if molecule.charge != 0 or (numbers != molecule.atom_charges()).any() or not numbers.all():
            raise UsageError(
                "the network has learnt neutral molecules with all their electrons, and this one "
                f"has charge {molecule.charge} and nuclei {molecule.atom_charges().tolist()}: "
                "start it from PySCF's own guess"
            )
        rows = np.concatenate([numbers[:, None], molecule.atom_coords()], axis=1)
        given = torch.from_numpy(rows).to(next(self.model.parameters()))[None, None]
        places = self.model(given)[0, :, 1:].double().cpu().numpy()
        found = to_coefficients(numbers, places)
        return constrained(found, auxiliary(molecule), molecule.nelectron)

    def density_matrix(self, calculation: Any) -> Floats:
        """Predict a density and diagonalise its Fock matrix, for ``kernel(dm0=…)``.

        This costs about as much as one cycle.

        Args:
            calculation: A restricted one of PySCF, in any basis and functional; not changed.

        Returns:
            Density matrix (orbitals, orbitals).

        Raises:
            UsageError: Open shells, and as ``coefficients``.
        """
        require_closed_shell(calculation)
        return start(calculation, self.coefficients(calculation.mol))
