"""Enumerated search spaces: every candidate trained, as the truth that searches are compared with.

A table is a NumPy archive of plain arrays, and of a JSON record with the command, versions and
seeds that made it and the SHA-256 of the arrays.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from smallfry.errors import DataError, UsageError
from smallfry.io.replace import write_whole
from smallfry.search.n2n.reward import reward
from smallfry.search.space import Candidate, Choice, Trial, key_of
from smallfry.search.tables import micro_n2n, micro_nars
from smallfry.search.tables.digits import IMAGES

__all__ = ["TABLES", "Table", "TableEvaluator", "candidates_of", "load_table", "write_table"]

TABLES: Mapping[str, tuple[Choice, ...]] = {
    "micro_nars": micro_nars.CHOICES,
    "micro_n2n": micro_n2n.CHOICES,
}
ARRAYS = ("correct", "nll", "test_correct", "parameters", "macs")


def candidates_of(name: str) -> list[dict[str, Any]]:
    """List the candidates of a table in its order.

    Raises:
        UsageError: There is no such table.

    Example:
        >>> len(candidates_of("micro_nars")), len(candidates_of("micro_n2n"))
        (1728, 1023)
    """
    if name not in TABLES:
        raise UsageError(f"there is no table '{name}'; use {' or '.join(TABLES)}")
    names = [choice.name for choice in TABLES[name]]
    listed = product(*(choice.values for choice in TABLES[name]))
    found = [dict(zip(names, values, strict=True)) for values in listed]
    return [each for each in found if name != "micro_n2n" or any(each.values())]


class Table:
    """Results of all candidates of a space.

    Attributes:
        choices: The choices.
        candidates: All candidates.
        correct: Validation images of 600 that are classified correctly, (seeds, moments,
            candidates); the moments are after 2, 4 and 8 epochs.
        nll: Mean negative log-likelihood of these images, of the same shape.
        test_correct: Test images of 600, (seeds, candidates); no search may use them.
        parameters: (candidates,).
        macs: Of one image, (candidates,).
        record: Command, versions, seeds and digest.

    Args:
        name: Of the table.
        arrays: Those above, by name.
        record: Plain data.
    """

    def __init__(
        self, name: str, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]
    ) -> None:
        self.name, self.record = name, record
        self.choices, self.candidates = TABLES[name], candidates_of(name)
        self.correct, self.nll, self.test_correct, self.parameters, self.macs = (
            arrays[each] for each in ARRAYS
        )
        self._positions = {key_of(each): number for number, each in enumerate(self.candidates)}

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Validation accuracy in percent after all epochs, mean of the seeds, (candidates,)."""
        found: NDArray[np.float64] = self.correct[:, -1].mean(0) / IMAGES * 100
        return found

    def rewards(self, accuracy: Any, parameters: Any) -> Any:
        """Return N2N's reward of students of the table's teacher.

        Args:
            accuracy: Validation accuracy, 0 to 1; a number or an array.
            parameters: Of the students, likewise.

        Raises:
            UsageError: The table's networks have no teacher.
        """
        if "teacher" not in self.record:
            raise UsageError(
                f"the networks of the table {self.name} have no teacher; use micro_n2n"
            )
        teacher = self.record["teacher"]
        compression = 1 - np.asarray(parameters) / teacher["parameters"]
        ratio = np.asarray(accuracy) * IMAGES / teacher["correct"]
        return np.vectorize(reward, otypes=[float])(compression, ratio)

    def position(self, candidate: Candidate) -> int:
        """Return the number of a candidate.

        Raises:
            UsageError: It is not in the table.
        """
        known = {name: candidate.get(name) for name in (choice.name for choice in self.choices)}
        if key_of(known) not in self._positions:
            raise UsageError(f"{dict(candidate)} is not a candidate of the table {self.name}")
        return self._positions[key_of(known)]

    def best(self, share: float) -> NDArray[np.int64]:
        """Return the numbers of the best share of candidates, best first, at least one."""
        count = max(1, int(share * len(self.candidates)))
        return np.argsort(-self.accuracy, kind="stable")[:count]


class TableEvaluator:
    """Evaluation by a table: the validation accuracy in percent, in microseconds.

    Args:
        table: A table, or its name.
        noise: One training, drawn once for each candidate, or the mean of all seeds.
        seed: Seed of these draws.

    Example:
        >>> evaluate = TableEvaluator("micro_nars", noise="mean")
        >>> evaluate(evaluate.table.candidates[0]).cost["parameters"]
        246.0
    """

    def __init__(
        self, table: Table | str, noise: Literal["seed", "mean"] = "seed", seed: int = 0
    ) -> None:
        self.table = load_table(table) if isinstance(table, str) else table
        self._mean = self.table.accuracy if noise == "mean" else None
        self._seed = seed

    def __call__(self, candidate: Candidate) -> Trial:
        """Return the trial of a candidate.

        Raises:
            UsageError: It is not in the table.
        """
        table, position = self.table, self.table.position(candidate)
        generator = np.random.default_rng([self._seed, position])
        seed = int(generator.integers(len(table.correct)))
        moments = 100 * table.correct[:, :, position] / IMAGES
        scores = moments.mean(0) if self._mean is not None else moments[seed]
        return Trial(
            dict(candidate),
            float(scores[-1]),
            seed,
            {"macs": float(table.macs[position]), "parameters": float(table.parameters[position])},
            measured={"accuracy_by_moment": scores.tolist()},
        )


def load_table(name: str, file: Path | None = None) -> Table:
    """Read a table that comes with smallfry, or one from a file.

    Raises:
        UsageError: There is no such table.
        DataError: The file is damaged.

    Example:
        >>> load_table("micro_n2n").correct.shape
        (3, 3, 1023)
    """
    candidates = candidates_of(name)
    file = Path(__file__).parent / f"{name}.npz" if file is None else file
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {each: archive[each] for each in ARRAYS}
            record = json.loads(str(archive["record"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(f"{file} is no table of a search space: {error}") from error
    if record.get("sha256") != digest(arrays) or arrays["macs"].shape != (len(candidates),):
        raise DataError(f"{file} is damaged: its arrays are not those that it was written with")
    return Table(name, arrays, record)


def write_table(file: Path, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> None:
    """Write a table and its digest."""
    text = json.dumps({**record, "sha256": digest(arrays)}, ensure_ascii=False)
    stream = io.BytesIO()
    content: dict[str, Any] = {name: arrays[name] for name in ARRAYS}
    np.savez_compressed(stream, record=np.array(text), **content)
    write_whole(file, stream.getvalue())


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Compute the SHA-256 of a table's arrays."""
    found = hashlib.sha256()
    for name in ARRAYS:
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()
