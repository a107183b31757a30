"""The pictures of concepts/recursion.md: ``python docs/pictures/recursion.py``.

The first is drawn; the second is measured with ``smallfry.cost``, without any numbers computed.
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.patches import FancyBboxPatch

import smallfry
from smallfry.report.figure import COLOURS, GREY, new_figure, save, style

X, Z, Y = "#64748b", COLOURS[0], COLOURS[1]
MODELS = {  # name in timm: name in the picture, where the name stands
    "vitrm_small_patch4_32": ("ViTRM small", (8, 4)),
    "vitrm_thrifty_patch4_32": ("ViTRM thrifty", (8, -4)),
    "vitrm_tiny_patch4_32": ("ViTRM tiny", (8, 4)),
    "cct_7_3x1_32": ("CCT-7/3×1", (8, -10)),
    "paper_vit_small_patch4_32": ("ViT-S", (8, 4)),
    "paper_vit_base_patch4_32": ("ViT-B", (8, -4)),
    "paper_resnet18_32": ("ResNet-18, 7×7 stem", (8, -4)),
    "resnet18_cifar": ("ResNet-18, 3×3 stem", (8, -4)),
}


def unrolled(file: Path, latent_steps: int = 3, steps: int = 2) -> None:
    """Draw the recursion steps of one image, one after the other."""
    gap, step_gap = 1.15, 0.75
    with style():
        figure = new_figure(11, 3.9)
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_aspect("equal")
        line = dict(zip("xzy", (3.0, 1.8, 0.6), strict=True))
        _box(axes, -2.6, line["x"], "patches of\nthe image", "white", GREY, width=1.2)
        for name, colour in (("z", Z), ("y", Y)):
            _box(axes, -2.6, line[name], f"{name}, learned", "white", colour, width=1.2)
        at, ends = 0.0, dict.fromkeys("xzy", -2.0)
        for step in range(1, steps + 1):
            first = at
            for _ in range(latent_steps):
                _arrow(axes, (ends["z"], line["z"]), (at - 0.35, line["z"]), Z)
                _arrow(axes, (at, line["x"]), (at, line["z"] + 0.35), X)
                _arrow(axes, (at, line["y"]), (at, line["z"] - 0.35), Y)
                _box(axes, at, line["z"], "f", "#dbeafe", Z)
                ends["z"] = at + 0.35
                at += gap
            _arrow(axes, (ends["y"], line["y"]), (at - 0.35, line["y"]), Y)
            axes.plot([ends["z"], at], [line["z"]] * 2, color=Z, linewidth=1.6)
            _arrow(axes, (at, line["z"]), (at, line["y"] + 0.35), Z)
            _box(axes, at, line["y"], "f", "#ffedd5", Y)
            ends = {"x": 0.0, "z": at, "y": at + 0.35}
            _arrow(axes, (at + 0.35, line["y"]), (at + 0.62, line["y"] - 0.85), GREY)
            axes.text(
                at + 0.65, line["y"] - 0.95, "class logits,\nhalting logit", fontsize=9, va="top",
                ha="center", color="#374151",
            )  # fmt: skip
            axes.text(
                (first + at) / 2, line["x"] + 0.35, f"recursion step {step}", ha="center",
                fontsize=10, fontweight="bold",
            )  # fmt: skip
            if step < steps:
                cut = at + 0.35 + (gap + step_gap - 0.7) / 2 + 0.15
                axes.plot([cut, cut], [0.2, line["x"] + 0.5], color=GREY, linestyle=":")
                axes.text(
                    cut, line["y"] - 0.6, "in training,\nno gradient", fontsize=8, va="top",
                    ha="left", color=GREY,
                )  # fmt: skip
            at += gap + step_gap
        end = at - gap - step_gap
        axes.plot([-2.0, end - gap], [line["x"]] * 2, color=X, linewidth=1.6)
        axes.text(-1.9, line["x"] + 0.12, "x, the same in every step", color=X, fontsize=9)
        axes.text(-0.5, line["z"] + 0.12, "think", color=Z, fontsize=9, ha="right")
        axes.text(3 * gap + 0.1, line["y"] + 0.42, "answer", color=Y, fontsize=9)
        axes.set(xlim=(-3.3, end + 1.5), ylim=(-1.1, line["x"] + 0.7))
        save(figure, file)


def costs(file: Path) -> None:
    """Draw parameters against arithmetic of ViTRMs and their peers, for one image of 32 × 32."""
    with style():
        figure = new_figure(7.5, 4.3)
        axes = figure.subplots()
        for name, (label, offset) in MODELS.items():
            with torch.device("meta"):
                spent = smallfry.cost(timm.create_model(name), torch.zeros(1, 3, 32, 32))
            ours = name.startswith("vitrm")
            place = spent.parameters / 1e6, spent.macs / 1e6
            axes.plot(*place, "o", color=COLOURS[0] if ours else GREY, markersize=8)
            axes.annotate(label, place, xytext=offset, textcoords="offset points", fontsize=9)
        axes.set(xscale="log", yscale="log", xlabel="parameters, millions", xlim=(0.7, 200))
        axes.set_ylabel("MMAC an image")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
        axes.set_title("small in parameters is not small in arithmetic")
        save(figure, file)


def _box(
    axes: Any, x: float, y: float, text: str, fill: str, edge: str, width: float = 0.7
) -> None:
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.35), width, 0.7, boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=fill, edgecolor=edge, linewidth=1.6, zorder=3,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9 if len(text) > 1 else 12, zorder=4)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="Where they go.")
    out = parser.parse_args().out
    unrolled(out / "recursion_unrolled.png")
    costs(out / "recursion_cost.png")


if __name__ == "__main__":
    main()
