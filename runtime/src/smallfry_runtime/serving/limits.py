"""Limits on the requests of a server."""

from dataclasses import dataclass
from math import inf

from smallfry_runtime.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on requests.

    Args:
        images: Most images of a request, or other inputs, and puzzles of a text.
        megabytes: Most megabytes (10⁶ bytes) of a request.
        seconds: Most seconds for a request to arrive in, and then to decode and answer it.
        waiting: Most images that wait for the model; further requests get status 503.
        batch: Most images that the model computes together.
    """

    images: int = 32
    megabytes: float = 20.0
    seconds: float = 10.0
    waiting: int = 256
    batch: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < inf:
                wanted = "finite" if value > 0 else "above 0"
                raise UsageError(f"{name} must be {wanted}, got {value:g}")
