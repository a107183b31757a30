"""Settings of adversarial training."""

from dataclasses import dataclass

from smallfry.settings import check, check_switched_on, check_values


@dataclass(frozen=True)
class AdversarialConfig:
    """Adversarial training: images are changed to raise the loss, by projected gradient descent.

    Args:
        eps: Largest change of a pixel, of images in [0, 1], such as 0.0314 (8/255); 0 for none.
        step: Change in a step; default a quarter of ``eps``.
        steps: Steps on each batch, each a forward and a backward pass.
    """

    eps: float = 0.0
    step: float | None = None
    steps: int = 7

    def __post_init__(self) -> None:
        check_values(self, "adversarial.")
        check(0 <= self.eps <= 1, f"adversarial.eps is 0 to 1, not {self.eps}")
        check(self.step is None or self.step > 0, "adversarial.step must be positive")
        check(self.steps >= 1, "adversarial.steps must be at least 1")
        check_switched_on(self, "adversarial.", "eps", "0.0314")
