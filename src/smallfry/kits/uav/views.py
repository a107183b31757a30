"""Views of generated rooms as a data set, with a class for each pixel.

Rooms of training and test have streams of random numbers of their own, so no room is in both. With
``labels: teacher``, training and validation have the masks of a colour teacher, as where nobody has
labelled anything; test labels are always true.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from smallfry.data import ImageData, Split
from smallfry.data.registered import Wanted, register_data, settings_from
from smallfry.errors import UsageError
from smallfry.kits.uav.rooms import (
    CLASSES,
    SIZE,
    VERSION,
    Pose,
    Room,
    View,
    is_free,
    look,
    make_room,
    random_of,
)
from smallfry_runtime.decoders.uav_segmentation import Camera
from smallfry_runtime.frames import Frame, frame_of

__all__ = ["ANGLE", "PITCH", "SHAPE", "ViewSettings", "draw_view", "view_frame"]

SHAPE = (48, 64)
ANGLE, PITCH = 75.0, 15.0  # degrees
A_ROOM = 4  # views
LOW = 0.2  # share of views from less than 0.8 m, as in landings
LABELS = ("truth", "teacher")


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """Settings of generated views, in ``data.options``.

    Args:
        views: Views of all splits together.
        labels: Labels of training and validation: ``truth``, or those of the colour ``teacher``.
        pitch: Degrees that the camera looks down, give or take 5.
        seed: Seed of everything.

    Raises:
        UsageError: A value out of range.
    """

    views: int = 1500
    labels: str = "truth"
    pitch: float = PITCH
    seed: int = 0

    def __post_init__(self) -> None:
        if not 10 <= self.views <= 1_000_000:
            raise UsageError(f"data.options.views is 10 to 1,000,000, got {self.views}")
        if self.labels not in LABELS:
            raise UsageError(f"data.options.labels is truth or teacher, got '{self.labels}'")
        if not 0 <= self.pitch <= 60:
            raise UsageError(f"data.options.pitch is 0 to 60 degrees, got {self.pitch:g}")


def view_frame(name: str, wanted: Wanted, channels: int = 3) -> Frame:
    """Return the size of generated pictures, by default 48×64.

    Raises:
        UsageError: A folder, or a setting of pictures that are read.
    """
    if wanted.root is not None:
        raise UsageError(f"{name} is generated and does not use data.root")
    frame = frame_of(wanted.images["image_size"] or SHAPE)
    known = {"channels": channels, "image_size": frame.size, "resize": frame.resize}
    wanted.require_fixed(name, **known)
    return frame


def read_views(name: str, wanted: Wanted) -> ImageData:
    """Generate views.

    Args:
        name: The name of the data set.
        wanted: Its options, and shares held out for validation and, in rooms of their own, testing.

    Raises:
        UsageError: A setting that does not apply.
        ModuleNotFoundError: A teacher is wanted, and scikit-learn is not installed.
    """
    frame = view_frame(name, wanted)
    settings: ViewSettings = settings_from(ViewSettings, wanted.options)
    settings = replace(settings, pitch=float(settings.pitch))
    shape = (frame.height, frame.width)
    tested = round(wanted.test * settings.views)
    everything = _split(settings, "train", settings.views - tested, shape)
    held = round(wanted.validation * len(everything) / A_ROOM) * A_ROOM  # whole rooms
    if settings.labels == "teacher":
        everything = _taught(settings, everything, shape)
    rows = torch.arange(len(everything))
    return ImageData(
        name,
        "generated",
        CLASSES,
        frame.size,
        3,
        everything.take(rows[held:][: wanted.limit]),
        everything.take(rows[:held]),
        _split(settings, "test", tested, shape),
        generated={"family": name, "version": VERSION, **asdict(settings)},
        resize=frame.resize,
    )


def _taught(settings: ViewSettings, split: Split, shape: tuple[int, int]) -> Split:
    """Replace the labels by those of a colour teacher, which has learned from ten other views."""
    from smallfry.kits.uav.teacher import EXAMPLES, ColourTeacher, pseudo_label

    shown = _split(settings, "teacher", EXAMPLES, shape)
    examples = shown.images.numpy(), shown.labels.numpy()
    teacher = ColourTeacher.fit(*examples, settings.seed, fast=True)  # a radial one takes minutes
    return replace(split, labels=torch.from_numpy(pseudo_label(teacher, split.images.numpy())))


def _split(settings: ViewSettings, split: str, count: int, shape: tuple[int, int]) -> Split:
    pixels = np.zeros((count, 3, *shape), np.uint8)
    labels = np.zeros((count, *shape), np.int64)
    for number in range(count):
        view = draw_view(settings, split, number, shape)[0]
        pixels[number], labels[number] = view.pixels, view.labels
    return Split(torch.from_numpy(pixels), torch.arange(count), torch.from_numpy(labels))


def draw_view(
    settings: ViewSettings, split: str, number: int, shape: tuple[int, int] = SHAPE
) -> tuple[View, Camera, Room]:
    """Draw a view from anywhere in a room, 0.15 to 1.4 m above the floor.

    Args:
        settings: The settings.
        split: ``train``, of which validation is a part, ``test``, or ``teacher``.
        number: The number of the view in its split; four are of one room.
        shape: Height and width of the picture.

    Returns:
        The view, its camera and its room.
    """
    random = random_of("uav-views", split, settings.seed, number)
    room = make_room(number // A_ROOM, split, settings.seed)
    bounds = (0.15, 0.8) if random.random() < LOW else (0.8, 1.4)
    camera = Camera.of_view(
        shape, ANGLE, float(random.uniform(*bounds)), settings.pitch + float(random.uniform(-5, 5))
    )
    camera = replace(camera, roll=float(random.uniform(-3, 3)))
    while True:
        x, y = (float(value) for value in random.uniform(0, SIZE[:2]))
        if is_free(room, x, y, 0.25):
            break
    pose = Pose(x, y, float(random.uniform(0, 360)))
    return look(room, pose, camera, shape, random), camera, room


register_data(("uav-rooms",), read_views)
