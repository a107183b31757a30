"""Plot of mixed precision: predicted loss against the cost of the bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallfry.report.figure import COLOURS, GREY, new_figure, save, style


def draw_trade_off(mixed: Mapping[str, Any], file: Path) -> None:
    """Draw the Pareto front of a choice of bits, with uniform bits and the choice.

    Args:
        mixed: ``report`` of ``smallfry.compress.quantize.mixed.MixedBits``.
        file: The PNG to write.
    """
    front = mixed["front"]
    with style():
        figure = new_figure(7, 4.2)
        axes = figure.subplots()
        axes.plot(
            *zip(*front, strict=True), color=COLOURS[0], label="mixed", drawstyle="steps-post"
        )
        uniform = mixed["uniform"]
        axes.plot(
            [each["cost"] for each in uniform.values()],
            [each["loss"] for each in uniform.values()],
            *("o",),
            color=GREY,
            label="uniform",
        )
        for bits, each in uniform.items():
            axes.annotate(f"{bits} bits", (each["cost"], each["loss"]), xytext=(5, 5),
                          textcoords="offset points", fontsize=9)  # fmt: skip
        axes.plot([mixed["cost"]], [mixed["loss"]], "D", color=COLOURS[1], label="chosen")
        positive = [loss for _, loss in front if loss > 0]
        if positive:
            axes.set_yscale("log")
        axes.margins(x=0.1)  # for the words at the last point
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(f"cost, {mixed['unit']}")
        axes.set_ylabel(f"summed sensitivity ({mixed['measure']})")
        axes.legend()
        save(figure, file)
