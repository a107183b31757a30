"""Presentation of images to trained modules: spikes of the inputs in, counts of spikes out."""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smallfry.data.philox import generator
from smallfry.kits.places.images import firing_rates
from smallfry.kits.places.neurons import Layer

__all__ = ["AFTER", "BEFORE", "SHOWN", "image_spikes", "present"]

BEFORE, SHOWN, AFTER = 500.0, 350.0, 150.0  # ms of rest, of an image, and of silence behind it


def image_spikes(images: NDArray[Any], seed: int, dt: float) -> NDArray[np.bool_]:
    """Draw the spikes of inputs, (images, steps, inputs), a function of seed and image alone.

    Args:
        images: Grey, (images, height, width).
        seed: The seed.
        dt: Step in ms.
    """
    rates, steps = firing_rates(images), round(SHOWN / dt)
    found = np.empty((len(images), steps, rates.shape[1]), np.bool_)
    for i, (image, rate) in enumerate(zip(images, rates, strict=True)):
        mark = zlib.crc32(np.ascontiguousarray(image, np.float64).tobytes())
        random = generator(mark, seed)
        found[i] = random.random((steps, len(rate))) < rate * (dt / 1000)
    return found


def present(
    spikes: NDArray[np.bool_],
    weights: NDArray[np.float64],
    theta: NDArray[np.float64],
    dt: float,
    delays: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Count the spikes of neurons at rest that are shown images, without learning.

    Args:
        spikes: Of the inputs, (images, steps, inputs).
        weights: (modules, inputs, neurons).
        theta: (modules, neurons).
        dt: Step in ms.
        delays: Of the synapses in steps, as the weights; of size 0 for none.

    Returns:
        (images, modules, neurons).
    """
    images, steps, inputs = spikes.shape
    modules, _, neurons = weights.shape
    layer = Layer((modules, neurons), dt, theta, 0.0)
    for _ in range(round(BEFORE / dt)):
        layer.reset(*layer.advance())
    layer = layer.repeated(images)
    flat = weights.transpose(1, 0, 2).reshape(inputs, -1)
    late = delays.transpose(1, 0, 2).reshape(inputs, -1) if delays.size else None
    coming = np.zeros((1 if late is None else int(late.max()) + 1, images, flat.shape[1]))
    counts = np.zeros(layer.shape, np.int64)
    first = layer.step
    for step in range(steps + round(AFTER / dt)):
        fired, inhibitory = layer.advance()
        counts += fired
        here = coming[(layer.step - first) % len(coming)]
        if step < steps:
            _deliver(spikes[:, step], flat, late, coming, step)
        layer.ge_e += here.reshape(layer.shape)
        here[...] = 0.0
        layer.reset(fired, inhibitory)
    return counts


def _deliver(
    spikes: NDArray[np.bool_],
    flat: NDArray[np.float64],
    late: NDArray[np.int64] | None,
    coming: NDArray[np.float64],
    step: int,
) -> None:
    """Add the weights of spikes (images, inputs) to the steps at which they arrive."""
    if late is None:
        coming[0] += spikes.astype(np.float64) @ flat
        return
    columns = np.arange(flat.shape[1])
    for image, number in zip(*spikes.nonzero(), strict=True):
        coming[(step + late[number]) % len(coming), image, columns] += flat[number]
