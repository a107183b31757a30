"""The pictures of concepts/natural_gradient.md: ``python docs/pictures/natural_gradient.py``.

Everything in them is computed: losses and divergences on a grid, paths by smallfry's optimizers,
Fisher blocks by autograd.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from smallfry.optim import KFAC, KPSVD, ExactNG, NaturalGradient
from smallfry.report.figure import COLOURS, GREY, new_figure, save, style

START = (-1.5, 1.5)
UNIT = 4.0  # the second input is also measured in a unit this many times smaller
DIVERGENCE = 0.01


class Data(NamedTuple):
    """A logistic regression with two weights and no bias."""

    inputs: Tensor  # (samples, 2)
    labels: Tensor  # (samples,)


def two_weights() -> Data:
    """200 samples whose second input is small and goes with the first."""
    generator = torch.Generator().manual_seed(0)
    a, b, chance = torch.rand(3, 200, generator=generator, dtype=torch.float64)
    first, other = torch.special.ndtri(a), torch.special.ndtri(b)
    inputs = torch.stack([1.5 * first, 0.35 * (first + other)], dim=1)
    truth = torch.tensor([1.0, -0.5], dtype=torch.float64)
    return Data(inputs, (chance < (inputs @ truth).sigmoid()).to(torch.float64))


def loss_at(weights: Tensor, data: Data) -> Tensor:
    """Mean negative log-likelihood of weights (..., 2)."""
    logits = weights @ data.inputs.T
    return F.binary_cross_entropy_with_logits(
        logits, data.labels.expand_as(logits), reduction="none"
    ).mean(-1)


def fisher_at(weights: Tensor, data: Data) -> Tensor:
    """F = mean p (1 − p) x xᵀ, (2, 2)."""
    p = (data.inputs @ weights).sigmoid()
    return (data.inputs * (p * (1 - p))[:, None]).T @ data.inputs / len(data.inputs)


def divergence(start: Tensor, weights: Tensor, data: Data) -> Tensor:
    """Mean KL divergence of the predictions at weights (..., 2) from those at ``start``."""
    p, logits = (data.inputs @ start).sigmoid(), weights @ data.inputs.T
    own = F.binary_cross_entropy(p, p, reduction="none")
    other = F.binary_cross_entropy_with_logits(logits, p.expand_as(logits), reduction="none")
    return (other - own).mean(-1)


def path(method: str, data: Data, unit: float, steps: int, lr: float) -> Tensor:
    """Weights after each step (steps + 1, 2), in the original unit of the inputs.

    Args:
        method: "gradient" or "natural".
        data: What is learned.
        unit: The second input is given as ``unit`` times itself.
        steps: Full-batch steps.
        lr: Learning rate.
    """
    scale = torch.tensor([1.0, unit], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([START], dtype=torch.float64) / scale)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if method == "natural":
        optimizer = ExactNG(
            model, lr, likelihood="bernoulli", fisher="exact", damping=1e-6, momentum=0.0,
            kl_clip=None,
        )  # fmt: skip
    places = [model.weight.detach().clone()[0] * scale]
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(model(data.inputs * scale)[:, 0], data.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        places.append(model.weight.detach().clone()[0] * scale)
    return torch.stack(places)


def steepest(file: Path) -> None:
    """Draw what is steepest by either measure of length, and where it leads."""
    data, start = two_weights(), torch.tensor(START, dtype=torch.float64)
    with torch.enable_grad():
        leaf = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(leaf, data), leaf)
    fisher = fisher_at(start, data)
    natural = torch.linalg.solve(fisher, gradient)
    angle = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    half = torch.linalg.cholesky(torch.linalg.inv(fisher))
    ellipse = (2 * DIVERGENCE) ** 0.5 * half @ circle  # ½ dᵀ F d = DIVERGENCE
    radius = float(ellipse.norm(dim=0).min()) * 1.6
    to_natural = -natural * (2 * DIVERGENCE / (gradient @ natural)) ** 0.5
    to_gradient = -gradient / gradient.norm() * radius

    with style():
        figure = new_figure(11, 4.2)
        left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
        x, y, losses = _grid((-2.8, -0.2), (0.2, 2.8), lambda w: loss_at(w, data))
        left.contour(x, y, losses, levels=14, colors="#d1d5db", linewidths=0.8)
        _, _, kl = _grid((-2.8, -0.2), (0.2, 2.8), lambda w: divergence(start, w, data))
        left.contour(x, y, kl, levels=[DIVERGENCE], colors=COLOURS[1], linewidths=1.6)
        left.plot(*(start[:, None] + ellipse), color=COLOURS[1], linestyle=":", linewidth=1.6)
        left.plot(*(start[:, None] + radius * circle), color=COLOURS[0], linewidth=1.4)
        for step, colour in ((to_gradient, COLOURS[0]), (to_natural, COLOURS[1])):
            left.annotate(
                "", xy=(start + step).tolist(), xytext=START,
                arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0,
                            "shrinkB": 0},
            )  # fmt: skip
        left.plot(*START, "o", color="black", markersize=5)
        left.set(aspect="equal", xlim=(-2.8, -0.2), ylim=(0.2, 2.8))
        left.set_title("the steepest step of a given length")
        for label, colour, line in (
            ("all steps of one length,\nthe steepest: −∇L", COLOURS[0], "-"),
            (f"all steps of divergence {DIVERGENCE},\nthe steepest: −F⁻¹∇L", COLOURS[1], "-"),
            ("the same by ½ dᵀFd", COLOURS[1], ":"),
        ):
            left.plot([], [], line, color=colour, label=label)
        left.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)

        x, y, losses = _grid((-2.2, 2.2), (-1.6, 3.2), lambda w: loss_at(w, data))
        right.contour(x, y, losses, levels=20, colors="#d1d5db", linewidths=0.8)
        for method, steps, lr, colour in (
            ("gradient", 600, 0.05, COLOURS[0]),
            ("natural", 60, 0.1, COLOURS[1]),
        ):
            for unit, line in ((1.0, "-"), (UNIT, "--")):
                places = path(method, data, unit, steps, lr)
                wide = 4.5 if method == "natural" and unit == 1 else 1.6
                label = f"{method}" + ("" if unit == 1 else f", x₂ given {unit:g} × as large")
                right.plot(
                    *places.T, line, label=label, linewidth=wide,
                    color="#fdba74" if wide > 2 else colour,
                )  # fmt: skip
        right.plot(*START, "o", color="black", markersize=5)
        right.set_title("descent in two units of the same input")
        right.legend(loc="upper right", fontsize=8)
        for axes in (left, right):
            axes.set_xlabel("w₁")
            axes.set_ylabel("w₂")
            axes.grid(False)
        save(figure, file)


def _grid(
    across: tuple[float, float], up: tuple[float, float], value: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = torch.linspace(*across, 160), torch.linspace(*up, 160)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(torch.float64)
    return x, y, value(points)


# A layer's Fisher block


class Block(NamedTuple):
    """The Fisher block of a small layer, and two Kronecker products in its place."""

    fisher: Tensor  # (inputs · outputs) squared, columns of the weight stacked
    kfac: Tensor
    nearest: Tensor


def hidden_layer() -> Block:
    """The first layer, 4 inputs to 3 units, of a classifier that has learned for a while."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(300) % 3
    centres = 1.5 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    inputs = centres[labels] + noise
    torch.manual_seed(0)
    layers = nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 3)
    model = nn.Sequential(*layers).to(torch.float64)
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        adam.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        adam.step()
    products = [
        _product(kind(model, 1e-12, fisher="exact", factor_rank=None), model, inputs, labels)
        for kind in (KFAC, KPSVD)
    ]
    return Block(dense_fisher(model, inputs), *products)


def dense_fisher(model: nn.Module, inputs: Tensor) -> Tensor:
    """Mean of Jᵀ (diag p − p pᵀ) J over the samples, with respect to the first layer's weight."""
    weight = model.get_parameter("0.weight").detach()
    total = torch.zeros(weight.numel(), weight.numel(), dtype=weight.dtype)
    for x in inputs:

        def logits(w: Tensor, x: Tensor = x) -> Tensor:
            output: Tensor = functional_call(model, {"0.weight": w}, (x[None],))
            return output[0]

        p = logits(weight).softmax(0).detach()
        jacobian = jacrev(logits)(weight).detach().transpose(1, 2).flatten(1)  # (classes, weights)
        total += jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    return total / len(inputs)


def _product(
    optimizer: NaturalGradient, model: nn.Module, inputs: Tensor, labels: Tensor
) -> Tensor:
    """A ⊗ G of the first layer, from one step that moves nothing worth the name."""
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    a, g = optimizer.approximation.factors(optimizer.curvature[optimizer.blocks[0].name])
    optimizer.close()
    return torch.kron(a[0], g[0])


def relative_error(block: Block, product: Tensor) -> float:
    """‖F − product‖ / ‖F‖."""
    return float((block.fisher - product).norm() / block.fisher.norm())


def kronecker(file: Path) -> None:
    """Draw the block, KFAC's product and the nearest one."""
    block = hidden_layer()
    shown = (
        ("the Fisher block F", block.fisher),
        (f"KFAC, A ⊗ G: error {relative_error(block, block.kfac):.2f}", block.kfac),
        (f"KPSVD, nearest: error {relative_error(block, block.nearest):.2f}", block.nearest),
    )
    most = float(block.fisher.abs().max())
    with style():
        figure = new_figure(10.5, 3.7)
        for axes, (title, matrix) in zip(figure.subplots(1, 3), shown, strict=True):
            image = axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
            axes.set_title(title)
            axes.grid(False)
            axes.set_xticks([])
            axes.set_yticks([])
            for place in (2.5, 5.5, 8.5):
                axes.axhline(place, color=GREY, linewidth=0.6)
                axes.axvline(place, color=GREY, linewidth=0.6)
        figure.colorbar(image, ax=figure.axes, shrink=0.8)
        save(figure, file)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="Where they go.")
    out = parser.parse_args().out
    steepest(out / "natural_gradient_steepest.png")
    kronecker(out / "natural_gradient_kronecker.png")


if __name__ == "__main__":
    main()
