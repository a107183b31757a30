"""AdamATan2: Adam's step as an angle, without an epsilon and the same at any scale of the loss.

With Adam's averages m and v of gradients and their squares, and their bias corrections,

    "outside"  p <- p - lr / (1 - beta1^t) * atan2(m, sqrt(v / (1 - beta2^t)))
    "inside"   p <- p - lr * atan2(m / (1 - beta1^t), sqrt(v / (1 - beta2^t)))

after a decoupled weight decay; ``scale`` multiplies the angle.

Source: Everett et al., "Scaling Exponents Across Parameterizations and Optimizers", arXiv
2407.05872. TRM (arXiv 2510.04871) is trained with the first form.
"""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch.optim.optimizer import ParamsT

__all__ = ["AdamATan2"]


class AdamATan2(torch.optim.Optimizer):
    """Adam with atan2 in place of the quotient.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Averaging factors of gradients and of their squares.
        weight_decay: Decoupled weight decay.
        bias_correction: Place of the first bias correction: "outside" of atan2 or "inside".
        scale: Factor of the angle; 1.27, nearly 4/pi, makes a first step "inside" as long as lr.

    Raises:
        ValueError: A setting out of range.

    Example:
        >>> import torch
        >>> from smallfry.optim import AdamATan2
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = AdamATan2([weight], lr=0.1)
        >>> (3 - weight).square().sum().backward()
        >>> optimizer.step()
        >>> round(weight.item(), 3)
        0.1
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        bias_correction: Literal["outside", "inside"] = "outside",
        scale: float = 1.0,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr and weight_decay can't be negative: {lr}, {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are 0 to below 1, not {betas}")
        if bias_correction not in ("outside", "inside"):
            raise ValueError(f"bias_correction is outside or inside, not {bias_correction!r}")
        settings: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, settings | {"bias_correction": bias_correction, "scale": scale})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step; ``closure`` computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        steps, lr, (beta1, beta2) = state["step"].item(), group["lr"], group["betas"]
        decay, lr = lr * group["weight_decay"], lr * group["scale"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.div(1 - beta2**steps).sqrt_()
        first = 1 - beta1**steps
        parameter.mul_(1 - decay)
        if group["bias_correction"] == "inside":
            parameter.add_(torch.atan2(mean / first, root), alpha=-lr)
        else:
            parameter.add_(torch.atan2(mean, root), alpha=-lr / first)
