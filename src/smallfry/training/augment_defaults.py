"""Default crop of a new run by the size of its images."""

from dataclasses import replace

from smallfry.training.config import TrainConfig
from smallfry_runtime.frames import ImageSize, frame_of

PHOTOGRAPH = 64  # pixels of a side, from which images are cropped and resized
SMALLEST_AREA = 0.25  # of such a crop, as a share of the image


def with_fitting_crop(config: TrainConfig, image_size: ImageSize) -> TrainConfig:
    """Choose resized crops for images of 64 pixels and more, and padded ones for smaller images.

    The choice becomes part of the configuration, so that a run resumes with it.
    """
    augment = config.augment
    if augment.resized_crop is not None:
        return config
    padded = augment.crop_padding is not None or min(frame_of(image_size)[:2]) < PHOTOGRAPH
    area = 0.0 if padded or config.task == "puzzle" else SMALLEST_AREA
    return replace(config, augment=replace(augment, resized_crop=area))
