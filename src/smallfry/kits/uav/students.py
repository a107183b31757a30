"""Trained students at work: masks for the state machine, and a policy end to end."""

import numpy as np
import torch
from numpy.typing import NDArray

from smallfry.errors import UsageError
from smallfry.kits.uav.flight import ACTIONS, LAND, MISSION, Glance, Policy, Segment
from smallfry.training.run import TrainedModel

__all__ = ["masks_of", "policy_input", "policy_of"]


def masks_of(trained: TrainedModel) -> Segment:
    """Return what a student of ``uav-segmentation`` makes of a picture.

    Raises:
        UsageError: A model of another task.
    """
    _require(trained, "uav-segmentation")

    @torch.inference_mode()
    def segment(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        images = trained.normalize(torch.from_numpy(pixels)[None])
        found: NDArray[np.int64] = trained.model(images).argmax(dim=1)[0].numpy()
        return found

    return segment


def policy_of(trained: TrainedModel) -> Policy:
    """Return the policy of a student of ``uav-policy``.

    When to land no picture shows: until the mission is over, landing is left out; then the last
    action is said to be ``land``, as in the demonstrations, and the student lands or flies on.

    Raises:
        UsageError: A model of another task.
    """
    _require(trained, "uav-policy")

    @torch.inference_mode()
    def choose(glance: Glance) -> int:
        over = glance.seconds >= MISSION
        last = LAND if over else glance.last
        inputs = torch.from_numpy(policy_input(glance.view.pixels, last))[None]
        logits = trained.model(trained.normalize(inputs))[0]
        return int((logits if over else logits[:LAND]).argmax())

    return choose


def policy_input(pixels: NDArray[np.uint8], last: int) -> NDArray[np.uint8]:
    """Stack a picture and the last action, (3 + 4, height, width): 255 in the action's channel."""
    taken = np.zeros((len(ACTIONS), *pixels.shape[1:]), np.uint8)
    taken[last] = 255
    return np.concatenate([pixels, taken])


def _require(trained: TrainedModel, task: str) -> None:
    found = trained.manifest.get("task", "classification")
    if found != task:
        raise UsageError(f"a student of {task} is needed, and this model was trained for {found}")
