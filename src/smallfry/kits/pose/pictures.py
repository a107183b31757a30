"""Pictures of poses: keypoints of the true and the estimated pose, and errors along the object."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from numpy.typing import NDArray
from torch import Tensor

from smallfry.data import Split
from smallfry.kits.pose.estimates import as_arrays, estimates, pose_errors
from smallfry.kits.pose.mesh import nearest_neighbours
from smallfry.kits.pose.truth import Truth, codes
from smallfry.report.figure import COLOURS, new_figure, save, show_image, style
from smallfry_runtime.pnp import Camera, Pose, project

__all__ = ["draw_keypoints", "draw_poses"]

SHOWN, ROW = 12, 4
EDGES = 3  # nearest keypoints that each is joined with


def draw_poses(outputs: Any, split: Split, truth: Truth, file: Path) -> None:
    """Draw the pictures with the largest and some other errors, half each.

    The keypoints are joined to a net: green in the true pose, blue in the estimated one.

    Args:
        outputs: For the split.
        split: The pictures and labels.
        truth: Of the labels.
        file: The PNG to write.
    """
    arrays = as_arrays(outputs)
    found = estimates(arrays, truth)
    points = np.asarray(arrays["points"][0], np.float64)
    errors = pose_errors(points, truth, found)
    order = np.argsort(-errors, kind="stable")
    worst = order[: SHOWN // 2]
    others = order[SHOWN // 2 :][:: max(1, (len(order) - SHOWN // 2) // (SHOWN // 2))]
    chosen = np.concatenate([worst, others])[:SHOWN]
    net = nearest_neighbours(points, EDGES + 1)[:, 1:]
    rows = -(-max(1, len(chosen)) // ROW)
    with style():
        figure = new_figure(2.3 * ROW, 2.5 * rows)
        axes = figure.subplots(rows, ROW, squeeze=False).ravel()
        images = split.take(torch.from_numpy(chosen)).images
        for place, number, image in zip(axes, chosen.tolist(), images, strict=False):
            show_image(place, image)
            camera = Camera(*truth.camera[number].tolist())
            for pose, colour in (
                (truth.pose(number), COLOURS[2]),
                (found[number].pose, COLOURS[0]),
            ):
                if pose is not None:
                    seen = _in_crop(points, pose, camera, truth.crop[number], image.shape[-1])
                    _draw_net(place, seen, net, colour)
            title = "no pose" if found[number].pose is None else f"{errors[number]:.3f} diameters"
            place.set_title(title, fontsize=8)
            place.set_xlim(-0.5, image.shape[-1] - 0.5)
            place.set_ylim(image.shape[-2] - 0.5, -0.5)
        for place in axes[len(chosen) :]:
            place.set_axis_off()
        save(figure, file)


def draw_keypoints(outputs: Any, truth: Truth, file: Path) -> None:
    """Draw the object's keypoints by their share of wrong bits, from two sides.

    Args:
        outputs: For the split.
        truth: Of the split.
        file: The PNG to write.
    """
    wanted = codes(truth, outputs.x.shape[1])
    inside = wanted.inside[:, None]
    wrong = torch.zeros(outputs.points.shape[1])
    for found, true in ((outputs.x, wanted.x), (outputs.y, wanted.y)):
        wrong += ((((found > 0) != (true > 0)) * inside).sum(dim=(0, 1))).float()
    asked = 2 * outputs.x.shape[1] * inside[:, 0].sum(dim=0)
    share = (wrong / asked.clamp(min=1)).numpy()
    points = outputs.points[0].numpy() * 100
    with style():
        figure = new_figure(8, 3.4)
        for number, (one, other) in enumerate(((0, 1), (0, 2))):
            axes = figure.add_subplot(1, 2, number + 1)
            drawn = axes.scatter(
                points[:, one], points[:, other], c=share, cmap="inferno_r", s=40, vmin=0
            )
            axes.set_aspect("equal")
            axes.set_xlabel(f"{'xyz'[one]}, cm")
            axes.set_ylabel(f"{'xyz'[other]}, cm")
            figure.colorbar(drawn, ax=axes, label="share of wrong bits")
        save(figure, file)


def _in_crop(
    points: NDArray[np.float64], pose: Pose, camera: Camera, crop: Tensor, size: int
) -> NDArray[np.float64]:
    """Project points to pixels of the crop as the network has it."""
    x, y, side = crop.tolist()
    result: NDArray[np.float64] = (project(points, pose, camera) - np.array([x, y]) + 0.5) * (
        size / side
    ) - 0.5
    return result


def _draw_net(axes: Any, places: NDArray[np.float64], net: NDArray[np.int64], colour: str) -> None:
    ends = np.stack([np.repeat(places, net.shape[1], axis=0), places[net.ravel()]])
    lines = LineCollection([*ends.swapaxes(0, 1)], colors=colour, linewidths=0.6, alpha=0.6)
    axes.add_collection(lines, autolim=False)
