"""Pictures of masks, metric depth and flights, and films of flights."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from smallfry.io.replace import write_whole
from smallfry.kits.uav.flight import HEIGHT, RADIUS, STEP, Flight, Glance
from smallfry.kits.uav.rooms import SIZE, Room
from smallfry.report.figure import COLOURS, GREY, new_figure, plain, save, show_image, style

__all__ = ["draw_depth", "draw_flights", "draw_masks", "film"]

MASK = np.array([[75, 85, 99], [110, 168, 110], [234, 88, 12]], np.uint8)  # of the classes
CONTOUR = 0.5  # metres between lines of equal depth
FARTHEST = 6.0  # metres of the colour scale
SCALE = 72  # pixels a metre in films
EVERY = 4  # steps between two pictures of a film


def draw_masks(images: Tensor, masks: Mapping[str, Any], file: Path) -> None:
    """Draw images in the first row, and their masks below.

    Args:
        images: (images, 3, height, width), uint8.
        masks: Masks (images, height, width) by their title.
        file: The PNG to write.
    """
    count = max(1, len(images))
    with style():
        figure = new_figure(1.6 * count + 0.8, 1.3 * (1 + len(masks)))
        axes = figure.subplots(1 + len(masks), count, squeeze=False)
        for column, image in enumerate(images):
            show_image(axes[0][column], image)
            for row, mask in enumerate(masks.values(), 1):
                _show(axes[row][column], MASK[np.asarray(mask[column]) % len(MASK)])
        for row, title in enumerate(plain(["image", *masks])):
            axes[row][0].set_ylabel(title)
        save(figure, file)


def draw_depth(
    glance: Glance, masks: Mapping[str, Any], depth: NDArray[np.float64], file: Path
) -> None:
    """Draw one picture, its masks, and its metric depth with a line every half metre.

    Args:
        glance: What the camera saw.
        masks: Masks (height, width) by their title.
        depth: Estimated depth in metres, (height, width).
        file: The PNG to write.
    """
    with style():
        figure = new_figure(2.8 * (2 + len(masks)), 2.6)
        axes = figure.subplots(1, 2 + len(masks))
        _show(axes[0], glance.view.pixels.transpose(1, 2, 0))
        axes[0].set_title("picture")
        for each, (title, mask) in zip(axes[1:], masks.items(), strict=False):
            _show(each, MASK[np.asarray(mask) % len(MASK)])
            each.set_title(*plain([title]))
        shown = axes[-1].imshow(depth, cmap="viridis_r", vmin=0, vmax=FARTHEST)
        axes[-1].contour(
            depth, np.arange(CONTOUR, FARTHEST, CONTOUR), colors="white", linewidths=0.6
        )
        error = np.abs(depth - glance.view.depth)[glance.view.depth < FARTHEST]
        axes[-1].set_title(f"metres, mean error {100 * error.mean():.0f} cm")
        _bare(axes[-1])
        figure.colorbar(shown, ax=axes[-1], fraction=0.05)
        save(figure, file)


def draw_flights(rooms: Sequence[Room], flights: Sequence[Flight], file: Path) -> None:
    """Draw flights from above, four a row; places of contact are marked.

    Args:
        rooms: The room of each flight.
        flights: The flights.
        file: The PNG to write.
    """
    columns = min(4, max(1, len(flights)))
    rows = math.ceil(max(1, len(flights)) / columns)
    with style():
        figure = new_figure(3.1 * columns, 2.8 * rows)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for each in axes[len(flights) :]:
            each.set_visible(False)
        for each, room, flight in zip(axes, rooms, flights, strict=False):
            _draw_room(each, room)
            x, y = flight.path[:, 0], flight.path[:, 1]
            each.plot(x, y, color=COLOURS[0], linewidth=1.2)
            each.plot(x[0], y[0], "o", color=COLOURS[2], markersize=5)
            end = "s" if flight.is_safe else "X"
            each.plot(x[-1], y[-1], end, color=COLOURS[0 if flight.is_safe else 4], markersize=8)
            each.set_title(f"{flight.outcome}, {flight.seconds:.0f} s, {flight.distance:.1f} m")
        save(figure, file)


def film(
    room: Room,
    glances: Sequence[Glance],
    masks: Sequence[NDArray[np.int64]],
    flight: Flight,
    file: Path,
) -> None:
    """Write a flight as an animated GIF: picture, mask, and the room from above.

    Args:
        room: The room.
        glances: What the camera saw at each step.
        masks: The mask at each step, (height, width).
        flight: The flight.
        file: The GIF to write.
    """
    frames = []
    for number in [*range(0, len(glances), EVERY), len(glances) - 1]:
        rows = [glances[number].view.pixels.transpose(1, 2, 0), MASK[masks[number] % len(MASK)]]
        height = round(SIZE[1] * SCALE)
        size = (round(height / 2 * rows[0].shape[1] / rows[0].shape[0]), height // 2)
        above = _from_above(room, flight, number + 1)
        frame = Image.new("RGB", (size[0] + above.width, height), "white")
        for row, picture in enumerate(rows):
            place = (0, row * size[1])
            frame.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), place)
        frame.paste(above, (size[0], 0))
        frames.append(frame.quantize(32, dither=Image.Dither.NONE))
    stream = io.BytesIO()
    duration = [round(1000 * STEP * EVERY / 4)] * (len(frames) - 1) + [2000]  # four times as fast
    frames[0].save(
        stream, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0
    )
    write_whole(file, stream.getvalue())


def _from_above(room: Room, flight: Flight, steps: int) -> Image.Image:
    """Draw a room from above with the flight so far; y is upwards."""
    width, height = (round(metres * SCALE) for metres in SIZE[:2])
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        return x * SCALE, height - y * SCALE

    for low, high in zip(room.low, room.high, strict=True):
        left, bottom = place(low[0], low[1])
        right, top = place(high[0], high[1])
        tall = high[2] > HEIGHT - 0.1
        draw.rectangle((left, top, right, bottom), "#c98a4b" if tall else "#ecd2b4", "#7c5a33")
    path = flight.path[: steps + 1]
    draw.line([place(x, y) for x, y in path[:, :2].tolist()], "#2563eb", 2)
    x, y, yaw, _ = path[-1].tolist()
    at, body = place(x, y), RADIUS * SCALE
    draw.ellipse((at[0] - body, at[1] - body, at[0] + body, at[1] + body), "#2563eb")
    turn = math.radians(yaw)
    draw.line([at, place(x + 0.3 * math.cos(turn), y + 0.3 * math.sin(turn))], "#111827", 3)
    draw.rectangle((0, 0, width - 1, height - 1), None, "#111827")
    return picture


def _draw_room(axes: Any, room: Room) -> None:
    for low, high in zip(room.low, room.high, strict=True):
        tall = high[2] > HEIGHT - 0.1
        axes.add_patch(
            Rectangle(low[:2], *(high - low)[:2], color=COLOURS[1], alpha=0.75 if tall else 0.3)
        )
    axes.add_patch(Rectangle((0, 0), SIZE[0], SIZE[1], fill=False, color=GREY))
    axes.set(xlim=(-0.1, SIZE[0] + 0.1), ylim=(-0.1, SIZE[1] + 0.1), aspect="equal")
    _bare(axes)


def _show(axes: Any, pixels: NDArray[np.uint8]) -> None:
    axes.imshow(pixels, interpolation="nearest")
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
