"""Random regions of the images of a batch: resized crops and erased rectangles."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from smallfry.training.augment_place import Place, beside, whole

TRIES = 10  # drawings of a rectangle, of which the first that fits is taken
CROP_RATIO = (3 / 4, 4 / 3)  # width by height
ERASED_RATIO = (0.3, 10 / 3)
ERASED_AREA = (0.02, 1 / 3)


def draw_rectangles(
    count: int,
    height: int,
    width: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Draw rectangles that lie inside an image, with uniform area and log-uniform ratio.

    Returns:
        Top, left, height and width in pixels, (4, rectangles), int64; and (rectangles,), bool:
        those that fit in one of 10 tries.
    """
    wanted = height * width * torch.empty(count, TRIES).uniform_(*area)
    shape = torch.empty(count, TRIES).uniform_(*map(math.log, ratio)).exp()
    wide = (wanted * shape).sqrt().round().long().clamp(min=1)
    high = (wanted / shape).sqrt().round().long().clamp(min=1)
    fits = (wide <= width) & (high <= height)
    first = fits.long().argmax(dim=1, keepdim=True)
    wide, high = (each.gather(1, first)[:, 0] for each in (wide, high))
    places = torch.rand(2, count)
    top = (places[0] * (height - high + 1).clamp(min=1)).long()
    left = (places[1] * (width - wide + 1).clamp(min=1)).long()
    return torch.stack([top, left, high, wide]), fits.any(dim=1)


def random_resized_crop(images: Tensor, smallest: float, place: Place | None = None) -> Tensor:
    """Crop a random rectangle of each image, and resize it to the full size bilinearly.

    Equal to torchvision's ``resized_crop`` of each image, up to the rounding of pixels.

    Args:
        images: (images, channels, height, width), uint8.
        smallest: Smallest area of the rectangle, as a share of the image.
        place: Part of the batch.
    """
    place = place or whole(images)
    height, width = images.shape[-2:]
    boxes, fits = draw_rectangles(place.total, height, width, (smallest, 1.0), CROP_RATIO)
    boxes = torch.where(fits, boxes, torch.tensor([[0], [0], [height], [width]]))
    top, left, high, wide = beside(images, place.own(boxes)).float()
    rows = _sampled(top, high, height)
    columns = _sampled(left, wide, width)
    grid = torch.stack(
        [
            columns[:, None, :].expand(-1, height, -1),
            rows[:, :, None].expand(-1, -1, width),
        ],
        dim=-1,
    )
    drawn = F.grid_sample(images.float(), grid, align_corners=False)
    return drawn.round_().clamp_(0, 255).to(images.dtype)


def _sampled(start: Tensor, length: Tensor, pixels: int) -> Tensor:
    """Return where to sample along one side, from -1 to 1, (images, pixels)."""
    middle = (torch.arange(pixels, device=start.device) + 0.5) / pixels
    inside = (middle * length[:, None]).clamp(min=0.5)  # no pixel beyond the rectangle's edge
    inside = torch.minimum(inside, length[:, None] - 0.5)
    return 2 * (start[:, None] + inside) / pixels - 1


def random_erasing(images: Tensor, probability: float, place: Place | None = None) -> Tensor:
    """Set a random rectangle of some images to 0, which is the mean of normalised images.

    Source: Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896.

    Args:
        images: (images, channels, height, width), normalised.
        probability: Of an image to be changed.
        place: Part of the batch.
    """
    place = place or whole(images)
    height, width = images.shape[-2:]
    boxes, fits = draw_rectangles(place.total, height, width, ERASED_AREA, ERASED_RATIO)
    chosen = fits & (torch.rand(place.total) < probability)
    top, left, high, wide = beside(images, place.own(boxes))
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside = (rows >= top[:, None]) & (rows < (top + high)[:, None])
    across = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    blank = inside[:, None, :, None] & across[:, None, None, :]
    blank &= beside(images, place.own(chosen))[:, None, None, None]
    return images.masked_fill(blank, 0.0)
