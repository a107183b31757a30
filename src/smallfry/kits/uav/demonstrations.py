"""Flights of the state machine as demonstrations: pictures and last actions with an action each.

Whole flights are held out, and those of testing are in rooms of their own. Plain imitation drifts
into states that no demonstration has. With ``students``, runs of earlier students, half as many
flights again are flown by each of them, and labelled with what the state machine does there
(DAgger: Ross, Gordon, Bagnell 2011, arXiv 1011.0686).
"""

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.data import ImageData, Split
from smallfry.data.cache import decoded
from smallfry.data.fingerprint import digest
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.data.sources import EncodedSplit
from smallfry.errors import UsageError
from smallfry.kits.uav.flight import ACTIONS, LAND, Glance, Pilot, Policy, fly
from smallfry.kits.uav.rooms import VERSION, make_room
from smallfry.kits.uav.students import policy_input, policy_of
from smallfry.kits.uav.views import view_frame
from smallfry.training.run import load_run

__all__ = ["FlightSettings", "demonstrate"]

CHANNELS = 3 + len(ACTIONS)
APART = 1_000_000  # numbers of rooms between those of the state machine and of each student


@dataclass(frozen=True, kw_only=True)
class FlightSettings:
    """Settings of demonstrated flights, in ``data.options``.

    Args:
        flights: Flights of all splits together.
        frames: Frames of each, evenly spaced.
        students: Run folders of students that fly too, separated by commas; "" for none.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    flights: int = 100
    frames: int = 48
    students: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 4 <= self.flights <= 100_000:
            raise UsageError(f"data.options.flights is 4 to 100,000, got {self.flights}")
        if not 1 <= self.frames <= 150:
            raise UsageError(f"data.options.frames is 1 to 150, got {self.frames}")

    @property
    def runs(self) -> tuple[str, ...]:
        """Run folders of the students."""
        return tuple(each.strip() for each in self.students.split(",") if each.strip())


def read_flights(name: str, wanted: Wanted) -> ImageData:
    """Fly, or take flights from the cache.

    Args:
        name: The name of the data set.
        wanted: Its options, and shares of flights held out for validation and testing.

    Raises:
        UsageError: A setting that does not apply, or a student of another task.
        RunError: A run of a student that can't be read.
    """
    shape = view_frame(name, wanted, CHANNELS).shape(CHANNELS)[1:]
    settings: FlightSettings = settings_from(FlightSettings, wanted.options)
    tested = _share(wanted.test, settings.flights)
    flown = settings.flights - tested
    own = _flights(settings, "train", 0, flown, shape, None)
    held = _share(wanted.validation, flown) * settings.frames
    parts = [own.take(torch.arange(held, len(own)))]
    for number, run in enumerate(settings.runs, 1):
        parts.append(_flights(settings, "train", number * APART, flown // 2, shape, run))
    return ImageData(
        name,
        "generated",
        ACTIONS,
        shape,
        CHANNELS,
        _joined(parts, wanted.limit),
        own.take(torch.arange(held)),
        _flights(settings, "test", 0, tested, shape, None),
        generated={
            "family": name,
            "version": VERSION,
            **{**asdict(settings), "students": len(settings.runs)},
        },
    )


def _share(share: float, flights: int) -> int:
    """Return a number of whole flights, one at least where any are wanted, but not the last."""
    return min(flights - 1, max(1, round(share * flights))) if share else 0


def _joined(parts: list[Split], limit: int | None) -> Split:
    pixels = torch.cat([part.images for part in parts])[:limit]
    labels = torch.cat([part.labels for part in parts])[:limit]
    return Split(pixels, torch.arange(len(pixels)), labels)


def demonstrate(
    number: int,
    split: str,
    settings: FlightSettings,
    shape: tuple[int, int],
    student: Policy | None = None,
) -> list[tuple[NDArray[np.uint8], int]]:
    """Fly once, and return inputs (7, height, width) with what the state machine does there.

    As landing begins by the clock, its last action is ``land`` from the beginning.

    Args:
        number: Of the room.
        split: Of the room.
        settings: Number of frames, and seed.
        shape: Height and width of pictures.
        student: Policy that flies in place of the state machine.
    """
    pilot = Pilot()
    frames: list[tuple[NDArray[np.uint8], int]] = []

    def keep(glance: Glance, action: int) -> None:
        wanted = action if student is None else pilot(glance)
        last = LAND if wanted == LAND else glance.last
        frames.append((policy_input(glance.view.pixels, last), wanted))

    fly(student or pilot, make_room(number, split, settings.seed), settings.seed, shape, keep)
    chosen = np.linspace(0, len(frames) - 1, settings.frames).round().astype(int)
    return [frames[i] for i in chosen]


def _flights(
    settings: FlightSettings,
    split: str,
    first: int,
    count: int,
    shape: tuple[int, int],
    run: str | None,
) -> Split:
    """Return the frames of flights, from the cache: pictures with a row of actions below."""
    if count == 0:
        pixels = torch.zeros(0, CHANNELS, *shape, dtype=torch.uint8)
        return Split(pixels, torch.arange(0), torch.zeros(0, dtype=torch.int64))
    student, mark = None, ""
    if run is not None:
        trained = load_run(Path(run).expanduser())
        student, mark = policy_of(trained), _mark_of(trained.model)
    key = digest(
        *("uav-flights", split, mark, *map(str, (VERSION, first, count, shape))),
        *map(str, (settings.frames, settings.seed)),
    )
    read = _reader(settings, split, first, shape, student)
    frames = count * settings.frames
    encoded = EncodedSplit(
        np.zeros(frames, np.int64), read, lambda i: f"frame {i} of {split} flights", key
    )
    found = np.asarray(decoded(encoded, (shape[0] + 1, shape[1]), 3).images)
    rows, lasts = found[:, :, :-1], found[:, 0, -1, 0].astype(np.int64)
    taken = np.zeros((frames, len(ACTIONS), 1, 1), np.uint8)
    taken[np.arange(frames), lasts] = 255
    taken = np.broadcast_to(taken, (frames, len(ACTIONS), *shape))
    pixels = torch.from_numpy(np.concatenate([rows, taken], axis=1))
    labels = torch.from_numpy(found[:, 1, -1, 0].astype(np.int64))
    return Split(pixels, torch.arange(frames), labels)


def _reader(
    settings: FlightSettings,
    split: str,
    first: int,
    shape: tuple[int, int],
    student: Policy | None,
) -> Callable[[int], NDArray[np.uint8]]:
    lock = threading.Lock()

    @lru_cache(maxsize=2)
    def flight(number: int) -> list[tuple[NDArray[np.uint8], int]]:
        return demonstrate(first + number, split, settings, shape, student)

    def read(i: int) -> NDArray[np.uint8]:
        with lock:  # frames are read in threads, and a flight is flown once
            inputs, action = flight(i // settings.frames)[i % settings.frames]
        frame = np.zeros((3, shape[0] + 1, shape[1]), np.uint8)
        frame[:, :-1] = inputs[:3]
        frame[0, -1], frame[1, -1] = inputs[3:, 0, 0].argmax(), action
        return frame

    return read


def _mark_of(model: Any) -> str:
    """Hash the weights of a student."""
    values = [value.detach().cpu().numpy().tobytes().hex() for value in model.state_dict().values()]
    return digest(*values)


register_data(("uav-flights",), read_flights)
