"""Count the cycles of calculations from several starts: PySCF's, a fitted density, a network's.

The oracle is a fit of the converged density, the ceiling of any network with these functions; means
are a network's element means alone. Written after each calculation; the same command goes on.

    python benchmarks/kits_dft.py oracle --out results/kits/dft/oracle.json
    smallfry train --task dft --run runs/density
    python benchmarks/kits_dft.py held-out --run runs/density --out results/kits/dft/held_out.json
    python benchmarks/kits_dft.py transfer --run runs/density --out results/kits/dft/transfer.json
    python benchmarks/kits_dft.py labels --out results/kits/dft/densities.npz
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyscf import dft, gto

from smallfry.data.cache import cache_folder
from smallfry.kits.dft import DensityGuess, coefficients
from smallfry.kits.dft.data import BASIS, FUNCTIONAL, calculation, density_of, molecules_of
from smallfry.kits.dft.density import auxiliary, metric, start
from smallfry.kits.dft.molecules import g2_molecules

TABLE = ("H2O", "NH3", "CH4", "C2H4", "H2CO", "HCN", "CO2", "SO2", "LiF", "SiH4")
OTHERS = ((BASIS, "b3lyp"), ("def2-tzvp", FUNCTIONAL), ("6-31g", FUNCTIONAL))
TRANSFERRED = 6  # held-out molecules in other bases and functionals, the smallest
GRID, TOLERANCE = 2, 1e-9
Starts = dict[str, Callable[[Any], Any]]


def atoms_of(name: str) -> list[tuple[str, Any]]:
    """Return a molecule of the G2 set as PySCF takes it, in ångström."""
    from ase.collections import g2

    atoms = g2[name]
    return list(zip(atoms.get_chemical_symbols(), atoms.positions.tolist(), strict=True))


def held_out() -> list[str]:
    """List the test molecules of the kit's recipe."""
    found = g2_molecules()
    return [found[place].name for place in molecules_of(found, 0.25, 0.0, 0)["test"]]


def set_up(name: str, basis: str = BASIS, functional: str = FUNCTIONAL) -> Any:
    """Set up a calculation that has not run."""
    molecule = gto.M(atom=atoms_of(name), basis=basis, verbose=0)
    found = dft.RKS(molecule, xc=functional)
    found.grids.level, found.conv_tol, found.max_cycle = GRID, TOLERANCE, 100
    return found


def run(started: Any, matrix: Any) -> dict[str, Any]:
    """Converge from a density matrix, or from minao if it is None."""
    started.kernel(dm0=matrix)
    return {
        "cycles": int(started.cycles),
        "energy": float(started.e_tot),
        "converged": bool(started.converged),
    }


def compare(name: str, starts: Starts, known: dict[str, Any], *settings: str) -> dict[str, Any]:
    """Run what is not known of a molecule; a start is of minao's converged calculation and anew."""
    began = time.process_time()
    reference = None
    if "minao" not in known or {"oracle"} & set(starts) - set(known):
        reference = set_up(name, *settings)
        known["minao"] = run(reference, None)
    for kind, make in starts.items():
        if kind in known:
            continue
        fresh = set_up(name, *settings)
        oracle = kind == "oracle"
        matrix = start(fresh, coefficients(reference)) if oracle else make(fresh)
        known[kind] = run(fresh, matrix)
    known["cpu_seconds"] = round(known.get("cpu_seconds", 0) + time.process_time() - began, 1)
    return known


def means_alone(guess: DensityGuess) -> DensityGuess:
    """Return the element means of a network as a guess, without its neighbours."""
    import copy

    model = copy.deepcopy(guess.model)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.zero_()
    return DensityGuess(model)


def summary(molecules: dict[str, Any]) -> dict[str, Any]:
    """Average cycles and effective cycles; compare each start with minao."""
    kinds = [
        kind
        for kind in ("minao", "oracle", "means", "network")
        if all(kind in each for each in molecules.values())
    ]
    base = np.array([each["minao"]["cycles"] for each in molecules.values()])
    energies = np.array([each["minao"]["energy"] for each in molecules.values()])
    found = {}
    for kind in kinds:
        cycles = np.array([each[kind]["cycles"] for each in molecules.values()])
        extra = int(kind != "minao")
        gap = np.array([each[kind]["energy"] for each in molecules.values()]) - energies
        found[kind] = {
            "cycles": round(float(cycles.mean()), 2),
            "effective_cycles": round(float(cycles.mean()) + extra, 2),
            "fewer": round(1 - float(cycles.mean() / base.mean()), 4),
            "fewer_effective": round(1 - float((cycles.mean() + extra) / base.mean()), 4),
            "most_more_than_minao": int((cycles - base).max()),
            "molecules_with_fewer": int((cycles < base).sum()),
            "molecules_with_more": int((cycles > base).sum()),
            "largest_energy_difference": float(np.abs(gap).max()),
            "all_converged": all(each[kind]["converged"] for each in molecules.values()),
        }
    return found


def errors_of(name: str, guesses: dict[str, DensityGuess]) -> dict[str, float]:
    """Return (ρ − ρ̃|ρ − ρ̃) per electron of guesses, against the fit of the converged density."""
    (known,) = (each for each in g2_molecules() if each.name == name)
    molecule, truth = calculation(known).mol, density_of(known)
    energies, found = metric(auxiliary(molecule)), {}
    for kind, guess in guesses.items():
        wrong = guess.coefficients(molecule) - truth
        found[kind] = float(wrong @ energies @ wrong) / molecule.nelectron
    return found


def pack(file: Path) -> None:
    """Store all kept densities in one file, by the names of their files; or take them from it."""
    folder = cache_folder()
    if file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with np.load(file, allow_pickle=False) as known:
            for name in known.files:
                if not (folder / f"{name}.npy").is_file():
                    np.save(folder / f"{name}.npy", known[name].astype(np.float64))
    kept = {each.stem: np.load(each, allow_pickle=False) for each in folder.glob("dft-*.npy")}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **{name: kept[name] for name in sorted(kept)})
    print(f"{len(kept)} densities in {file}")


def main() -> None:
    """Run what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("oracle", "held-out", "transfer", "labels"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="of the network")
    parser.add_argument("--only", nargs="+", help="molecules")
    parser.add_argument("--starts", nargs="+", help="of network, means and oracle, beside minao")
    given = parser.parse_args()
    if given.part == "labels":
        return pack(given.out)
    record: dict[str, Any] = {"command": f"python benchmarks/kits_dft.py {given.part}"}
    if given.out.is_file():
        record = json.loads(given.out.read_text())
    guesses = {}
    if given.run is not None:
        network = DensityGuess.load(given.run)
        guesses = {"network": network, "means": means_alone(network)}
    starts: Starts = {kind: guess.density_matrix for kind, guess in guesses.items()}
    names: tuple[str, ...] | list[str] = TABLE if given.part == "oracle" else held_out()
    settings: tuple[tuple[str, str], ...] = ((BASIS, FUNCTIONAL),)
    if given.part == "transfer":
        names = sorted(names, key=lambda name: len(atoms_of(name)))[:TRANSFERRED]
        settings, starts = OTHERS, {"network": starts["network"]}
    else:
        starts["oracle"] = lambda fresh: None
    starts = {kind: make for kind, make in starts.items() if kind in (given.starts or starts)}
    for basis, functional in settings:
        part = record.setdefault(f"{functional} {basis}", {"molecules": {}})
        for name in given.only or names:
            known = part["molecules"].setdefault(name, {})
            compare(name, starts, known, basis, functional)
            if guesses and given.part == "held-out" and "errors" not in known:
                known["errors"] = errors_of(name, guesses)
            part["summary"] = summary(part["molecules"])
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
            print(basis, functional, name, known, flush=True)
        print(json.dumps(part["summary"], indent=1))
    return None


if __name__ == "__main__":
    main()
