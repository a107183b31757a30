"""Initial guesses of density functional theory from electron densities that a network predicts.

After Liu et al., ICLR 2026, arXiv 2509.25724: the density depends on neither the orbitals' basis
nor the functional, so one network serves them all.
"""

from smallfry.kits.dft.density import coefficients, fock
from smallfry.kits.dft.guess import DensityGuess

__all__ = ["DensityGuess", "coefficients", "fock"]
