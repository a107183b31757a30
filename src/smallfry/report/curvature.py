"""Plot of a natural-gradient optimizer's diagnostics, layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from smallfry.report.figure import COLOURS, GREY, new_figure, save, style

Range = tuple[float, float] | None


class LayerFigures(Protocol):
    """Plotted figures of a layer."""

    @property
    def layer(self) -> str:
        """Name of the layer."""

    @property
    def inputs(self) -> Range:
        """Smallest and largest eigenvalue of A."""

    @property
    def outputs(self) -> Range:
        """Smallest and largest eigenvalue of G."""

    @property
    def samples(self) -> Range:
        """Smallest and largest eigenvalue of the Gram matrix, for exact natural gradient."""

    @property
    def damping_ratio(self) -> float:
        """λ over the largest eigenvalue of the approximated Fisher."""

    @property
    def fisher_error(self) -> float | None:
        """‖F − F̂‖ / ‖F‖ on the last refresh's batch."""

    @property
    def cosine(self) -> float | None:
        """Cosine between the gradient and its preconditioned version."""

    @property
    def milliseconds(self) -> float:
        """Duration of the last refresh."""


class OptimizerFigures(Protocol):
    """Plotted figures of an optimizer; ``smallfry.optim.Diagnosis`` satisfies it."""

    @property
    def blocks(self) -> Sequence[LayerFigures]:
        """One entry per layer."""

    @property
    def clip(self) -> float:
        """Clipping factor of the last step."""

    @property
    def divergence_ratio(self) -> float:
        """Ratio of a step's measured to its modelled divergence."""


def curvature_overview(diagnosis: OptimizerFigures, file: Path) -> None:
    """Draw eigenvalue ranges, damping, Fisher error, cosine and refresh time of every layer.

    The title states a step's measured divergence over the modelled one.

    Args:
        diagnosis: The result of ``optimizer.diagnostics()``.
        file: The PNG to write.
    """
    blocks = diagnosis.blocks
    names = [block.layer for block in blocks]
    places = range(len(blocks))
    with style():
        figure = new_figure(15.0, 1.4 + 0.28 * max(4, len(blocks)))
        spectra, ratio, error, cosine, spent = figure.subplots(1, 5, sharey=True)
        _ranges(spectra, [b.inputs or b.samples for b in blocks], COLOURS[0], -0.15)
        _ranges(spectra, [b.outputs for b in blocks], COLOURS[1], 0.15)
        spectra.set_xscale("log")
        spectra.set_title("eigenvalues of A (blue), G (orange)")
        ratio.barh(places, [b.damping_ratio for b in blocks], color=COLOURS[2])
        ratio.set_xscale("log")
        ratio.axvline(1.0, color=GREY)
        ratio.set_title("λ / largest eigenvalue")
        _bars(error, [b.fisher_error for b in blocks], "Fisher error", COLOURS[3])
        _bars(cosine, [b.cosine for b in blocks], "cosine(update, gradient)", COLOURS[4])
        _bars(spent, [b.milliseconds for b in blocks], "refresh, ms", GREY)
        spectra.set_yticks(list(places), names)
        spectra.invert_yaxis()
        figure.suptitle(
            f"a step's divergence is {diagnosis.divergence_ratio:.3g} × the modelled; "
            f"the last step was clipped to {diagnosis.clip:.3g} of its length"
        )
        save(figure, file)


def _ranges(axes: Any, ranges: list[Any], colour: str, offset: float) -> None:
    for place, pair in enumerate(ranges):
        if pair is None or pair[1] <= 0:
            continue
        low = max(pair[0], pair[1] * 1e-12)  # a zero has no place on a logarithmic axis
        axes.plot([low, pair[1]], [place + offset] * 2, color=colour, linewidth=3)


def _bars(axes: Any, values: list[float | None], title: str, colour: str) -> None:
    axes.barh(range(len(values)), [0.0 if v is None else v for v in values], color=colour)
    axes.set_title(title)
