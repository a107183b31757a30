"""Pictures of densities: errors of molecules, and where around three of them the density errs."""

from pathlib import Path

import numpy as np
from pyscf import dft
from torch import Tensor

from smallfry.kits.dft.density import Floats
from smallfry.kits.dft.layout import functions_of, symbol_of, to_coefficients
from smallfry.report.figure import new_figure, save, style

__all__ = ["density_on_plane", "draw_densities"]

POINTS = 81  # of a plane, along each side
MARGIN = 3.0  # bohr around the atoms
MOST = 0.02  # electrons a cubic bohr, of the colours of a difference


def plane_of(positions: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the centre of atoms, and the two directions (2, 3) in which they are widest.

    Also returns the atoms' places in that plane, (atoms, 2).
    """
    centre = positions.mean(0)
    across = np.linalg.svd(positions - centre, full_matrices=True)[2][:2]
    return centre, across, (positions - centre) @ across.T


def density_on_plane(numbers: np.ndarray, positions: Floats, places: Floats, side: float) -> Floats:
    """Evaluate a density on the plane of a molecule, (81, 81), in electrons a cubic bohr.

    Args:
        numbers: Atomic numbers (atoms,).
        positions: In bohr (atoms, 3).
        places: Whitened coefficients (atoms, 49).
        side: Half of the plane's side, in bohr.
    """
    centre, across, _ = plane_of(positions)
    line = np.linspace(-side, side, POINTS)
    u, v = np.meshgrid(line, line)
    points = centre + u.reshape(-1, 1) * across[0] + v.reshape(-1, 1) * across[1]
    functions = functions_of(numbers, positions)
    values = dft.numint.eval_ao(functions, points) @ to_coefficients(numbers, places)
    found: Floats = values.reshape(POINTS, POINTS)
    return found


def draw_densities(labels: Floats, outputs: Floats, errors: Tensor, file: Path) -> None:
    """Draw the best, the middle and the worst molecule, one row each.

    Args:
        labels: (molecules, atoms, 53).
        outputs: (molecules, atoms, 50).
        errors: Of the molecules, in hartree per electron.
        file: The PNG to write.
    """
    order = errors.argsort().tolist()
    chosen = sorted({0, len(order) // 2, len(order) - 1})
    with style():
        figure = new_figure(10, 3.1 * len(chosen))
        axes = figure.subplots(len(chosen), 3, squeeze=False)
        for row, place in zip(axes, chosen, strict=True):
            number = order[place]
            there = labels[number, :, 0] > 0
            atoms, answer = labels[number, there], outputs[number, there, 1:]
            numbers, positions = atoms[:, 0].astype(np.int64), atoms[:, 1:4]
            spots = plane_of(positions)[2]
            side = float(np.abs(spots).max()) + MARGIN
            truth = density_on_plane(numbers, positions, atoms[:, 4:], side)
            found = density_on_plane(numbers, positions, answer, side)
            extent = (-side, side, -side, side)
            logs = [np.log10(np.maximum(each, 1e-4)) for each in (truth, found)]
            shown = [(each, -4.0, 0.0, "viridis") for each in logs]
            shown.append((found - truth, -MOST, MOST, "RdBu_r"))
            for ax, (values, low, high, colours) in zip(row, shown, strict=True):
                image = ax.imshow(
                    values, origin="lower", extent=extent, vmin=low, vmax=high, cmap=colours
                )
                figure.colorbar(image, ax=ax, shrink=0.8)
                for spot, element in zip(spots, numbers.tolist(), strict=True):
                    ax.text(*spot, symbol_of(element), ha="center", va="center", fontsize=7)
                ax.set_xticks([])
                ax.set_yticks([])
                ax.grid(False)
            row[2].set_xlabel(f"error {errors[number]:.1e} hartree per electron")
        for ax, title in zip(
            axes[0], ("log₁₀ density", "of the network", "difference"), strict=True
        ):
            ax.set_title(title)
        save(figure, file)
