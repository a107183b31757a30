"""Recursion trace of one image: predictions after each latent step."""

from collections.abc import Iterator
from math import isqrt
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smallfry.models import LatentRecursive, RecursionStep, Recursive
from smallfry.models.attention import (
    Attended,
    attention_layers,
    attention_on_image,
    watch_attention,
    why_no_rollout,
)
from smallfry.models.trace import answers, steps_to_follow
from smallfry.training.evaluation import forward
from smallfry.training.run import TrainedModel, thresholds_of

TIMED_SECONDS = 1.0  # a large model is not run more often than this allows


class AttentionMap(NamedTuple):
    """Attention rollout from the prediction token to the image, since the recursion step began."""

    patches: NDArray[np.float64]  # (rows, columns); sums to 1
    share: float  # of the whole rollout; the rest falls on what y and z held before


class TraceStep(NamedTuple):
    """Prediction of a model after one latent step."""

    recursion: int  # recursion steps begun; 0 before the first latent step
    latent_step: int  # latent steps taken in this recursion step
    probabilities: tuple[float, ...]  # of each class
    halting: float | None  # the model's own probability that this is right; None without that head
    attention: AttentionMap | None  # None without attention, or where rollout is undefined
    milliseconds: float | None  # to the end of this recursion step, see ``Timing``


class Timing(NamedTuple):
    """Latency per recursion step, of the model alone on a batch of one image."""

    runs: int  # whose median they are
    device: str
    threads: int


class RecursionTrace(NamedTuple):
    """Recursion trace of a model on one image."""

    pixels: NDArray[np.uint8]  # as the model sees them, (channels, height, width)
    moments: tuple[TraceStep, ...]  # of a model that does not recur, one
    answer: int  # which moment is the model's answer; what follows it never saw training
    latent_steps: int  # in a recursion step; 0 if there are none, as where it does not recur
    no_attention: str  # why there is no attention to show; "" if there is
    timing: Timing
    thresholds: tuple[float, ...] | None = None  # of classes, where an image may have several


@torch.inference_mode()
def think(trained: TrainedModel, pixels: NDArray[np.uint8], runs: int = 5) -> RecursionTrace:
    """Trace a model's prediction on one image.

    A recursive model is followed through ``steps_to_follow`` recursion steps, asked for its answer
    after every latent step, or after every recursion step if it has no latent steps.

    Args:
        trained: The model.
        pixels: (channels, height, width), as ``smallfry_runtime.images.decode`` gives them.
        runs: Maximum number of timed runs, within about a second.
    """
    model = trained.model
    images = trained.normalize(torch.from_numpy(pixels[None].copy()))
    no_attention, cuts = why_no_rollout(model), thresholds_of(trained)
    if not isinstance(model, Recursive):
        logits = forward(model, images)[0]
        times = _timed(_clock_whole(model, images) for _ in range(runs))
        moment = TraceStep(0, 0, _shares(logits, trained), None, None, median(times[0]))
        return RecursionTrace(pixels, (moment,), 0, 0, no_attention, _timing(times), cuts)
    steps = steps_to_follow(model)
    followed = list(_follow(model, images, steps, look=not no_attention))
    times = _timed(_clock_steps(model, images, steps) for _ in range(runs))
    latent_steps, moments = _latent_steps(model), []
    for i, (step, attention) in enumerate(followed):
        recursion, latent_step = _place(i, latent_steps)
        moments.append(
            TraceStep(
                recursion,
                latent_step,
                _shares(step.logits, trained),
                step.halt_logits.sigmoid().item(),
                attention,
                median(times[recursion - 1]) if recursion else None,
            )
        )
    answer = model.recursion_steps * latent_steps if latent_steps else model.recursion_steps - 1
    return RecursionTrace(
        pixels, tuple(moments), answer, latent_steps, no_attention, _timing(times), cuts
    )


def moments_of(model: torch.nn.Module) -> int:
    """Count the steps that ``think`` returns for a model."""
    if not isinstance(model, Recursive):
        return 1
    latent_steps = _latent_steps(model)
    return 1 + steps_to_follow(model) * latent_steps if latent_steps else steps_to_follow(model)


def _latent_steps(model: Recursive) -> int:
    """Return the latent steps in a recursion step; 0 for a model without them."""
    return model.latent_steps if isinstance(model, LatentRecursive) else 0


def _follow(
    model: Recursive, images: Tensor, steps: int, look: bool
) -> Iterator[tuple[RecursionStep, AttentionMap | None]]:
    """Yield every prediction with its attention."""
    if not look:
        yield from ((step, None) for step in answers(model, images, steps))
        return
    assert isinstance(model, nn.Module)
    latent_steps, layers = _latent_steps(model), attention_layers(model)
    latents: list[list[Attended]] = []
    with watch_attention(model) as seen:
        for i, step in enumerate(answers(model, images, steps)):
            latent, answer = seen[:-layers], seen[-layers:]
            seen.clear()
            if _place(i, latent_steps)[1] == 1:
                latents.clear()
            latents += [latent] if latent else []
            attention = None
            if latents:
                patches = model.embed(images).shape[1]
                parts = attention_on_image(latents, answer, patches)[0]
                attention = _attention_map(parts, _grid(model, patches))
            yield step, attention


def _place(moment: int, latent_steps: int) -> tuple[int, int]:
    """Return the recursion step of a moment and its latent steps; (0, 0) before the first."""
    if not latent_steps:
        return moment + 1, 0
    done, latent_step = divmod(moment - 1, latent_steps)
    return (done + 1, latent_step + 1) if moment else (0, 0)


def _grid(model: nn.Module, patches: int) -> tuple[int, int]:
    """Return rows and columns of a model's patches; those of a square where it states none."""
    side = isqrt(patches)
    grid: tuple[int, int] = getattr(model, "grid_size", (side, side))
    return grid


def _attention_map(parts: Tensor, grid: tuple[int, int]) -> AttentionMap:
    share = parts.sum().item()
    return AttentionMap((parts.double() / parts.double().sum()).view(grid).numpy(), share)


def _shares(logits: Tensor, trained: TrainedModel) -> tuple[float, ...]:
    is_single = thresholds_of(trained) is None
    shares = logits[0].softmax(dim=0) if is_single else logits[0].sigmoid()
    return tuple(shares.tolist())


# Time


def _clock_steps(model: Recursive, images: Tensor, steps: int) -> list[float]:
    """Measure milliseconds from pixels to prediction per recursion step, as in early exit."""
    begin, times = perf_counter(), []
    x, state = model.embed(images), model.initial_state(len(images))
    for _ in range(steps):
        state = model.step(x, state).state
        times.append(1000 * (perf_counter() - begin))
    return times


def _clock_whole(model: torch.nn.Module, images: Tensor) -> list[float]:
    begin = perf_counter()
    forward(model, images)
    return [1000 * (perf_counter() - begin)]


def _timed(runs: Iterator[list[float]]) -> list[tuple[float, ...]]:
    """Time all runs, for each recursion step, within a time limit."""
    done, spent = [], 0.0
    for times in runs:
        done.append(times)
        spent += times[-1] / 1000
        if spent > TIMED_SECONDS:
            break
    return list(zip(*done, strict=True))


def _timing(times: list[tuple[float, ...]]) -> Timing:
    return Timing(len(times[0]), "CPU", torch.get_num_threads())
