"""Windows of several subjects: readers of files and of MNE's epochs, and the split by subject.

    eeg-mat      the published layout: EEGsample (windows, electrodes, samples), substate (0 alert,
                 1 drowsy) and subindex (subjects from 1) in a .mat or .npz file
    eeg-epochs   a folder of MNE's epochs, NAME-epo.fif, one file a subject

MNE is imported for files of its own alone; its objects are taken as they come.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.data import ImageData, Split
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.data.splits import hold_out, take_some
from smallfry.errors import DataError, UsageError, nearest
from smallfry.io.natural import natural
from smallfry.kits.eeg.electrodes import ELECTRODES, doubled, numbers_of

__all__ = ["STATES", "MatSettings", "Windows", "join", "of_epochs", "read_mat", "to_data"]

STATES = ("alert", "drowsy")
RATE = 128  # samples a second of the paper's windows
ENTRIES = ("EEGsample", "substate", "subindex")


class Windows(NamedTuple):
    """Windows of several subjects."""

    values: Tensor  # (windows, electrodes, samples), float32
    states: NDArray[np.int64]  # (windows,)
    subjects: NDArray[np.int64]  # (windows,), from 1
    electrodes: tuple[str, ...]
    rate: float  # samples a second


@dataclass(frozen=True, kw_only=True)
class MatSettings:
    """Settings of files of windows, in ``data.options``.

    Args:
        file: Name of the file in ``data.root``.
        held_out: Number of the subject that is tested; 0 is the last.
        rate: Samples a second that the model is to have; a file of another rate is refused.
    """

    file: str = "dataset.mat"
    held_out: int = 0
    rate: float = float(RATE)

    def __post_init__(self) -> None:
        _require_rate(self.rate)


@dataclass(frozen=True, kw_only=True)
class EpochSettings:
    """Settings of folders of epochs, in ``data.options``.

    Args:
        held_out: Number of the subject that is tested, in the order of the files' names, from 1; 0
            is the last.
        rate: Samples a second that the model is to have; epochs of another rate are refused.
        drowsy: Name of the event of drowsy epochs.
        alert: Name of the event of alert ones.
    """

    held_out: int = 0
    rate: float = float(RATE)
    drowsy: str = "drowsy"
    alert: str = "alert"

    def __post_init__(self) -> None:
        _require_rate(self.rate)


def _require_rate(rate: float) -> None:
    if not 0 < rate < math.inf:
        raise UsageError(f"data.options.rate is above 0, in samples a second, got {rate!r}")


def to_data(
    name: str,
    origin: str,
    windows: Windows,
    held_out: int,
    wanted: Wanted,
    generated: Mapping[str, Any] | None = None,
) -> ImageData:
    """Build a data set whose test split is one subject, of which training has nothing.

    Args:
        name: The name of the data set.
        origin: Its source.
        windows: The windows.
        held_out: The subject to test.
        wanted: The share of the other subjects' windows held out for validation, and a limit.
        generated: Settings of generated windows.

    Raises:
        UsageError: No such subject, no other, or a setting that windows do not have.
    """
    size = (int(windows.values.shape[1]), int(windows.values.shape[2]))
    if wanted.images.get("image_size") not in (None, size, list(size)):
        raise UsageError(
            f"{origin}: windows have {size[0]} electrodes and {size[1]} samples, and are not "
            f"resized: leave out data.image_size, or resample the recording"
        )
    wanted.require_fixed(name, channels=1, image_size=wanted.images.get("image_size"))
    known = np.unique(windows.subjects).tolist()
    if held_out not in known or len(known) < 2:
        raise UsageError(
            f"{origin}: data.options.held_out {held_out} is none of its {len(known)} subjects, or "
            f"the only one: it has {', '.join(map(str, known[:20])) or 'none'}, and two are needed"
        )
    rows = torch.arange(len(windows.states))
    states = torch.from_numpy(windows.states)
    everything = Split(windows.values[:, None], rows, states, windows.rate)
    tested = torch.from_numpy(windows.subjects == held_out)
    train, validation = hold_out(
        everything.take(rows[~tested]), wanted.validation, wanted.split_seed
    )
    if wanted.limit is not None:
        train = take_some(train, wanted.limit, wanted.split_seed)

    def locate(row: int) -> str:
        return f"{origin}: subject {windows.subjects[row]}, window {row}"

    return ImageData(
        name,
        origin,
        STATES,
        size,
        1,
        train,
        validation,
        everything.take(rows[tested]),
        _locate=dict.fromkeys(("train", "validation", "test"), locate),
        generated=generated,
    )


def read_mat(file: Path, rate: float = RATE) -> Windows:
    """Read windows in the published layout.

    Args:
        file: A .mat or .npz file. Optional entries are ``rate``, samples a second, and
            ``electrodes``, names, of which the paper's 30 are chosen, in its order.
        rate: The rate that is expected.

    Raises:
        DataError: No such file, a damaged one, entries of another shape, electrodes that are
            missing, or another rate.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
        else:
            from scipy.io import loadmat

            found = {k: v for k, v in loadmat(file).items() if not k.startswith("__")}
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise DataError(f"{file}: not a readable file of windows ({error})") from error
    for entry in ENTRIES:
        if entry not in found:
            raise DataError(f"{file}: has no entry '{entry}'{nearest(entry, list(found))}")
    values = np.asarray(found["EEGsample"])
    if values.ndim != 3 or values.dtype.kind not in "fiu":
        raise DataError(
            f"{file}: EEGsample has the shape {values.shape} and type {values.dtype}, expected "
            "numbers (windows, electrodes, samples)"
        )
    states, subjects = (_column(file, name, found[name], len(values)) for name in ENTRIES[1:])
    if subjects.min(initial=1) < 1:
        least = int(subjects.min())
        raise DataError(f"{file}: subindex counts subjects from 1, got {least}: add {1 - least}")
    if not {*np.unique(states).tolist()} <= {0, 1}:
        raise DataError(f"{file}: substate is 0 or 1, got {np.unique(states).tolist()[:5]}")
    its_rate = _rate(file, found["rate"]) if "rate" in found else rate
    names = _names(found.get("electrodes"))
    return _checked(str(file), values, states, subjects, names, (its_rate, rate))


def of_epochs(
    epochs: Any, subject: int = 1, rate: float = RATE, events: Sequence[str] = STATES
) -> Windows:
    """Take the windows of MNE's ``Epochs``.

    Args:
        epochs: The epochs of a subject, all of the length of a window.
        subject: The subject's number.
        rate: The rate that is expected.
        events: Names of the alert and the drowsy event in ``event_id``.

    Raises:
        DataError: Events or electrodes that are missing, or another rate.
    """
    codes = dict(epochs.event_id)
    missing = [name for name in events if name not in codes]
    if missing:
        raise DataError(
            f"the epochs of subject {subject} have no event '{missing[0]}'; they have "
            f"{', '.join(sorted(map(str, codes)))}"
        )
    marks = np.asarray(epochs.events)[:, 2]
    kept = np.isin(marks, [codes[name] for name in events])
    values = np.asarray(epochs.get_data())[kept]
    states = (marks[kept] == codes[events[1]]).astype(np.int64)
    where, rates = f"the epochs of subject {subject}", (float(epochs.info["sfreq"]), rate)
    subjects = np.full(len(states), subject, np.int64)
    return _checked(where, values, states, subjects, tuple(epochs.ch_names), rates)


def join(parts: Sequence[Windows]) -> Windows:
    """Join the windows of several recordings.

    Raises:
        DataError: They have different shapes.
    """
    shapes = {tuple(part.values.shape[1:]) for part in parts}
    if len(shapes) != 1:
        raise DataError(f"the recordings have windows of different shapes: {sorted(shapes)}")
    return Windows(
        torch.cat([part.values for part in parts]),
        np.concatenate([part.states for part in parts]),
        np.concatenate([part.subjects for part in parts]),
        parts[0].electrodes,
        parts[0].rate,
    )


def _checked(
    where: str,
    values: NDArray[Any],
    states: NDArray[np.int64],
    subjects: NDArray[np.int64],
    names: tuple[str, ...],
    rates: tuple[float, float],
) -> Windows:
    """Check the electrodes, the rate and the values of windows, and choose the electrodes."""
    found, wanted = rates
    if not abs(found - wanted) <= 1e-3 * wanted:  # nan is another rate, too
        raise DataError(
            f"{where}: sampled at {found:g} Hz, expected {wanted:g} Hz: resample the recording "
            "(epochs.resample in MNE), or give data.options.rate for a model of that rate"
        )
    if names:
        if len(names) != values.shape[1]:
            raise DataError(
                f"{where}: {len(names)} names for {values.shape[1]} electrodes: name each, in the "
                "order of the values"
            )
        if twice := doubled(names):
            raise DataError(f"{where}: two electrodes are {twice}: name each once")
        rows, missing = numbers_of(ELECTRODES, names)
        if missing:
            raise DataError(
                f"{where}: the electrodes {', '.join(missing[:6])} are missing of the "
                f"{len(ELECTRODES)} that are expected: interpolate them, or record them"
            )
        values = values[:, rows]
    elif values.shape[1] != len(ELECTRODES):
        raise DataError(
            f"{where}: has {values.shape[1]} electrodes, expected {len(ELECTRODES)} in the order "
            f"{' '.join(ELECTRODES)}; with an entry 'electrodes', the names of others, these are "
            "chosen"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{where}: a value is not a number: cut the window out, or repair it")
    return Windows(tensor, states, subjects, ELECTRODES, found)


def _column(file: Path, name: str, values: Any, count: int) -> NDArray[np.int64]:
    flat = np.asarray(values).ravel()
    is_whole = flat.dtype.kind in "fiu" and np.isfinite(flat).all() and (flat == flat.round()).all()
    if len(flat) != count or not is_whole:
        raise DataError(
            f"{file}: {name} has {len(flat)} entries of type {flat.dtype}, expected {count} whole "
            "numbers, one for each window"
        )
    return flat.astype(np.int64)


def _rate(file: Path, values: Any) -> float:
    flat = np.asarray(values).ravel()
    if len(flat) != 1 or flat.dtype.kind not in "fiu":
        raise DataError(
            f"{file}: rate is one number, the samples a second, got {flat[:3].tolist()}"
        )
    return float(flat[0])


def _names(found: Any) -> tuple[str, ...]:
    """Return names from an array of texts, or of MATLAB's cells, "" of empty ones."""
    if found is None:
        return ()
    cells = (np.asarray(each).ravel() for each in np.asarray(found).ravel())
    return tuple(str(cell[0]).strip() if len(cell) else "" for cell in cells)


def _read_mat(name: str, wanted: Wanted) -> ImageData:
    """Read a file as data; raises as ``read_mat`` and ``to_data``."""
    settings: MatSettings = settings_from(MatSettings, wanted.options)
    if wanted.root is None:
        raise UsageError(f"{name} needs the folder of the file: give data.root")
    root = wanted.root.expanduser()
    windows = read_mat(root if root.is_file() else root / settings.file, settings.rate)
    held_out = settings.held_out or int(windows.subjects.max(initial=0))
    return to_data(name, root.name, windows, held_out, wanted)


def _read_epochs(name: str, wanted: Wanted) -> ImageData:
    """Read a folder of epochs as data; raises as ``of_epochs`` and ``to_data``."""
    settings: EpochSettings = settings_from(EpochSettings, wanted.options)
    if wanted.root is None:
        raise UsageError(f"{name} needs the folder of the epochs: give data.root")
    files = sorted(wanted.root.expanduser().glob("*-epo.fif"), key=lambda file: natural(file.name))
    if not files:
        raise DataError(f"{wanted.root}: has no files of epochs, NAME-epo.fif")
    try:
        import mne
    except ModuleNotFoundError:
        raise UsageError(f"{name} reads files of MNE: pip install mne") from None
    events = (settings.alert, settings.drowsy)
    windows = join(
        [
            of_epochs(mne.read_epochs(file, verbose="error"), number, settings.rate, events)
            for number, file in enumerate(files, 1)
        ]
    )
    return to_data(name, str(wanted.root), windows, settings.held_out or len(files), wanted)


register_data(("eeg-mat",), _read_mat)
register_data(("eeg-epochs",), _read_epochs)
