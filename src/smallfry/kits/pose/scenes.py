"""Generated pictures of one object in random poses, with exact truth.

Picture *i* of a split is a function of the settings, the split and *i* alone. Rotations are divided
into small cells of quaternions, of which one in five is for test pictures alone.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from smallfry.data.philox import generator
from smallfry.errors import UsageError
from smallfry.kits.pose.mesh import Mesh
from smallfry.kits.pose.render import crop_camera, rasterise, shade
from smallfry_runtime.pnp import Camera, Pose

__all__ = ["VERSION", "Scene", "SceneSettings", "draw_scene", "rotation_of"]

VERSION = 1  # changes whenever the pictures of a seed do
HEIGHT, WIDTH = 480, 640  # of the pictures that crops are of
CAMERA = Camera(572.0, 572.0, 319.5, 239.5)
DEPTHS = (0.5, 1.0)  # metres
LARGER = 1.5  # side of a crop over that of the object's box
CELLS = 16  # of quaternions' components, from 0 to 1
HELD_OUT = 5  # parts of all rotations, of which one is tested
HIDDEN = 0.4  # most of the object that is covered

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """Settings of generated pictures, in ``data.options``.

    Args:
        pictures: Of all splits together.
        shape: Number of the generated object.
        mesh: File of a closed mesh (PLY, OBJ, STL) in place of the generated object.
        millimetres: The file's unit is a millimetre, not a metre.
        symmetric: The object has symmetries: it is scored by the nearest points (ADI).
        jitter: Most that training crops are shifted and scaled by, as a share of the box.
        test_jitter: The same of test crops, in place of a detector's errors.
        hidden: Share of pictures with something before the object.
        seed: Seed of everything but the object.

    Raises:
        UsageError: A value out of range.
    """

    pictures: int = 10_000
    shape: int = 0
    mesh: str = ""
    millimetres: bool = False
    symmetric: bool = False
    jitter: float = 0.25
    test_jitter: float = 0.1
    hidden: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 10 <= self.pictures <= 1_000_000:
            raise UsageError(f"data.options.pictures is 10 to 1,000,000, got {self.pictures}")
        for name in ("jitter", "test_jitter", "hidden"):
            value = getattr(self, name)
            if not 0 <= value <= (1 if name == "hidden" else 0.5):
                raise UsageError(f"data.options.{name} is out of range, got {value}")
        if self.shape < 0 or self.seed < 0:
            raise UsageError("data.options.shape and seed are whole numbers from 0")


class Scene(NamedTuple):
    """Crop around an object, with its truth."""

    image: NDArray[np.uint8]  # (3, size, size)
    pose: Pose
    camera: Camera  # of the whole picture
    crop: tuple[int, int, int]  # first column, first row and side, in the whole picture
    seen: NDArray[np.bool_]  # (size, size): the object's pixels
    whole: NDArray[np.bool_]  # the same with nothing before it


def draw_scene(
    settings: SceneSettings, mesh: Mesh, split: str, number: int, size: int = 128
) -> Scene:
    """Draw a picture.

    Args:
        settings: Of all pictures.
        mesh: The object.
        split: ``train`` or ``test``.
        number: Of the picture in its split.
        size: Pixels of the crop.
    """
    random = _random(settings, split, number)
    pose, crop = _placed(settings, mesh, split, random)
    camera = crop_camera(CAMERA, crop, size)
    render = rasterise(mesh, pose, camera, size, size)
    whole = render.triangle >= 0
    light = random.normal(size=3)
    light[2] = -abs(light[2])  # from before the object
    light /= np.linalg.norm(light)
    pixels = _background(random, size)
    colours = shade(mesh, pose, camera, render, light, random.uniform(0.3, 0.6))
    pixels[whole] = np.clip(colours * random.uniform(0.8, 1.2, 3) * 255, 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    cover = _cover(random, whole) if random.random() < settings.hidden else np.zeros_like(whole)
    if cover.any():
        picture.paste(Image.fromarray(_background(random, size)), mask=Image.fromarray(cover))
    if random.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(float(random.uniform(0, 0.8))))
    noise = random.normal(0, random.uniform(0, 8), (size, size, 3))
    image = np.rint(np.clip(np.asarray(picture) + noise, 0, 255)).astype(np.uint8)
    return Scene(image.transpose(2, 0, 1), pose, CAMERA, crop, whole & ~cover, whole)


def rotation_of(quaternion: Floats) -> Floats:
    """Return the rotation of a unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def is_test_rotation(quaternion: Floats) -> bool:
    """Return whether a rotation is in a cell for test pictures."""
    positive = quaternion * (1 if quaternion[np.abs(quaternion).argmax()] > 0 else -1)
    cell = np.floor(positive * CELLS).astype(np.int8)
    return zlib.crc32(cell.tobytes()) % HELD_OUT == 0


def _random(settings: SceneSettings, split: str, number: int) -> np.random.Generator:
    return generator(f"pose-objects {VERSION} {split}", settings.seed, number)


def _placed(
    settings: SceneSettings, mesh: Mesh, split: str, random: np.random.Generator
) -> tuple[Pose, tuple[int, int, int]]:
    """Draw a pose of the split, and the crop around the object's box."""
    while True:
        quaternion = random.normal(size=4)
        quaternion /= np.linalg.norm(quaternion)
        if is_test_rotation(quaternion) == (split == "test"):
            break
    depth = random.uniform(*DEPTHS)
    centre = np.array([random.uniform(0.15, 0.85) * WIDTH, random.uniform(0.15, 0.85) * HEIGHT])
    translation = np.append((centre - CAMERA[2:]) / CAMERA[:2] * depth, depth)
    pose = Pose(rotation_of(quaternion), translation)
    seen = mesh.vertices @ pose.rotation.T + translation
    places = seen[:, :2] / seen[:, 2:] * np.array(CAMERA[:2]) + np.array(CAMERA[2:])
    low, high = places.min(axis=0), places.max(axis=0)
    most = settings.test_jitter if split == "test" else settings.jitter
    middle = (low + high) / 2 + random.uniform(-most, most, 2) * (high - low)
    side = round(LARGER * float((high - low).max()) * random.uniform(1 - most, 1 + most))
    first = np.rint(middle - side / 2).astype(int)
    return pose, (int(first[0]), int(first[1]), max(8, side))


def _background(random: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Draw noise of several scales and random shapes, (size, size, 3)."""
    values = np.broadcast_to(random.uniform(0, 255, 3), (size, size, 3))
    for side in (4, 16, 64):
        noise = random.normal(128, random.uniform(0, 40), (side, side, 3)).clip(0, 255)
        grown = Image.fromarray(noise.astype(np.uint8)).resize((size, size), Image.Resampling.BOX)
        values = values + np.asarray(grown) - 128.0
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(random.integers(0, 9))):
        colour = tuple(int(c) for c in random.integers(0, 256, 3))
        pen.polygon(_corners(random, size, random.uniform(0, size, 2)), fill=colour)
    return np.array(image)


def _cover(random: np.random.Generator, whole: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Draw a shape that covers a part of the object, but not more than 40 % of it."""
    size = len(whole)
    rows, columns = np.nonzero(whole)
    for _ in range(4):
        if len(rows) == 0:
            break
        chosen = int(random.integers(len(rows)))
        image = Image.new("1", (size, size))
        middle = np.array([columns[chosen], rows[chosen]], float)
        ImageDraw.Draw(image).polygon(_corners(random, size, middle), fill=1)
        found = np.asarray(image)
        if (found & whole).sum() <= HIDDEN * whole.sum():
            return found
    return np.zeros_like(whole)


def _corners(random: np.random.Generator, size: int, middle: Floats) -> list[tuple[float, float]]:
    count = int(random.integers(3, 8))
    angles = np.sort(random.uniform(0, 2 * np.pi, count))
    reach = random.uniform(0.08, 0.3) * size
    return [
        (float(middle[0] + reach * np.cos(a)), float(middle[1] + reach * np.sin(a))) for a in angles
    ]
