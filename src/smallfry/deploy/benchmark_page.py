"""Report of a benchmark of deployed models: table, picture and HTML page.

report.html    the page, with neither scripts nor requests
summary.json   the figures, with command, commit, device and versions
latency.png    accuracy against latency
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from smallfry.deploy.benchmark import Benchmark, Figures
from smallfry.errors import RunError
from smallfry.io.console import CleanConsole
from smallfry.io.json import strict
from smallfry.io.replace import replacing
from smallfry.report.axes import log_axis
from smallfry.report.figure import COLOURS, GREY, new_figure, plain, save, style
from smallfry.report.labels import draw_labels
from smallfry.report.page import image, render, words
from smallfry.report.table import NONE, number, table
from smallfry_runtime.stages import obstacle

SUMMARY, PAGE, PICTURE = "summary.json", "report.html", "latency.png"
KIND = "benchmark of deployed models"
EAGER = "PyTorch eager"
AREA = 160.0  # square points of the largest file's marker
SMALLEST = 14.0
WHAT, TIMES = range(3, 9), 9  # columns of the table that describe a model, and the rest
WIDTH = 120  # characters that the printed tables take at least
PADDING = 0.5  # points of accuracy above and below, at least


def require_free(folder: Path) -> None:
    """Require that a report may be written here: nothing exists, or an older such report.

    Raises:
        RunError: There is something else.
    """
    reason = obstacle(folder, "benchmark", (SUMMARY, PAGE, PICTURE), _is_benchmark)
    if reason is not None:
        raise RunError(f"{folder}: {reason}; use another: --folder DIR")


@contextmanager
def new_report(folder: Path) -> Iterator[Path]:
    """Create a folder for a report that replaces an older one on completion.

    Raises:
        RunError: The folder holds something else, or can't be written.
    """
    try:
        with replacing(folder, lambda: require_free(folder)) as new:
            yield new
    except OSError as error:
        raise RunError(f"{folder}: the report could not be written ({error})") from error


def write_report(found: Benchmark, folder: Path) -> None:
    """Write the files of a report into a folder."""
    draw(found, folder / PICTURE)
    text = json.dumps(strict(summary_of(found)), indent=1, allow_nan=False)
    (folder / SUMMARY).write_text(text + "\n")
    (folder / PAGE).write_text(page(found, folder / PICTURE), errors="replace")


def summary_of(found: Benchmark) -> dict[str, Any]:
    """Convert all figures for JSON; times in milliseconds, sizes in bytes, shares from 0 to 1."""
    return {
        "kind": KIND,
        "name": found.name,
        "measured_on": found.measured_on,
        "settings": vars(found.config),
        "measured": [figures._asdict() for figures in found.figures],
        "left_out": [left._asdict() for left in found.left_out],
        "provenance": found.provenance,
    }


def print_tables(found: Benchmark, console: Console | None = None) -> None:
    """Print the figures: first the models, then their latencies."""
    console = console or CleanConsole(highlight=False)
    if console.width < WIDTH:
        console = CleanConsole(highlight=False, width=WIDTH, file=console.file)
    head, rows = cells(found)
    for columns in (WHAT, range(TIMES, len(head))):
        shown = Table(box=None, pad_edge=False)
        shown.add_column(head[1], no_wrap=True)
        for i in columns:
            shown.add_column(head[i], justify="right")
        before = None
        for row in rows:
            if row[0] != before:
                shown.add_row(Text(f"{row[0]} ({row[2]} parameters)", style="bold"))
            before = row[0]
            shown.add_row(Text(f"  {row[1]}"), *(Text(row[i]) for i in columns))
        console.print(shown, "")
    for line in notes(found):
        console.print(Text(line), soft_wrap=True)


def cells(found: Benchmark) -> tuple[list[str], list[list[str]]]:
    """Build the header and rows of the table."""
    sizes = found.config.batch_sizes
    first = sizes[0]
    head = ["model", "form", "parameters", "file, MB", "accuracy", "macro F1", "as float32"]
    head += ["steps", "memory, MB", f"p50, ms ({first})", f"p95, ms ({first})", "× eager"]
    head += [f"images/s ({size})" for size in sizes]
    rows = []
    for figures in found.figures:
        faster = speed_up(figures, found.figures, first)
        memory = figures.memory
        rows.append(
            [
                figures.model,
                figures.form,
                f"{figures.parameters:,}",
                number(figures.file_bytes / 1e6),
                *map(_percent, (figures.accuracy, figures.macro_f1, figures.agreement)),
                NONE if figures.steps is None else f"{figures.steps:.2f}",
                NONE if memory is None else f"{memory.peaks[first] / 1e6:,.0f}",
                number(figures.latency[first].p50),
                number(figures.latency[first].p95),
                NONE if faster is None else f"{faster:.2f}",
                *(number(throughput(figures, size)) for size in sizes),
            ]
        )
    return head, rows


def speed_up(figures: Figures, all_figures: Sequence[Figures], batch: int) -> float | None:
    """Compute the speed-up over the same model in eager PyTorch, by mean latency."""
    for other in all_figures:
        if other.form == EAGER and other.model == figures.model:
            return other.latency[batch].mean / figures.latency[batch].mean
    return None


def throughput(figures: Figures, batch: int) -> float:
    """Return images per second at a batch size."""
    return 1000 * batch / figures.latency[batch].mean


def notes(found: Benchmark) -> list[str]:
    """List notes needed to read the table."""
    config = found.config
    first = config.batch_sizes[0]
    s = "" if config.threads == 1 else "s"
    lines = [
        f"Latency: wall time from pixels to probabilities, on {config.threads} thread{s}, all in "
        f"turns; in brackets the batch size. Memory: peak of a process that does nothing else, "
        f"with its libraries, at batch {first}."
    ]
    if found.measured_on is not None:
        lines.append(f"Accuracy: {found.measured_on}.")
    else:
        lines.append("Accuracy: no test images were at hand; --data names some.")
    if any(not figures.is_trained for figures in found.figures):
        lines.append("Models without accuracy beside others are untrained: latency only.")
    lines += [f"Left out: {left.model}, {left.form}: {left.reason}" for left in found.left_out]
    return lines


def page(found: Benchmark, picture: Path) -> str:
    """Build the page, with all names escaped."""
    head, rows = cells(found)
    sizes = found.config.batch_sizes
    times = ["calls", "mean", "p50", "p95"]
    heads = ["model", "form", *times * len(sizes), "libraries", *map(str, sizes)]
    groups = [("", 2), *((f"batch {size}, ms", len(times)) for size in sizes)]
    groups.append(("memory, MB: libraries, and peak by batch size", 1 + len(sizes)))
    origin = [[name, words(value)] for name, value in found.provenance.items()]
    return render(
        "deploy/templates/benchmark.html",
        title=f"Deployed: {found.name}",
        notes=notes(found),
        picture=image(picture, "accuracy against latency"),
        figures=table(head, rows, text=(0, 1)),
        batches=table(heads, [_times(f, sizes) for f in found.figures], (0, 1), groups),
        provenance=table(["what", "value"], origin, text=(0, 1)),
    )


def draw(found: Benchmark, file: Path) -> None:
    """Draw accuracy against latency; below, the latency of models without accuracy.

    Args:
        found: Measured figures.
        file: The PNG to write.
    """
    first = found.config.batch_sizes[0]
    scored = [figures for figures in found.figures if figures.accuracy is not None]
    others = [figures for figures in found.figures if figures.accuracy is None]
    times = [figures.latency[first].p50 for figures in found.figures]
    models = list(dict.fromkeys(figures.model for figures in found.figures))
    colours = {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}
    largest = max((figures.file_bytes for figures in found.figures), default=1)
    rows = [part for part in (scored, others) if part]
    with style():
        figure = new_figure(11, 5.2 if len(rows) == 1 else 7.0)
        if not rows:
            figure.text(0.5, 0.5, "nothing could be measured", ha="center", color=GREY)
            save(figure, file)
            return
        heights = [3.0 if part is scored else 1.4 for part in rows]
        grid = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, part in zip(grid, rows, strict=True):
            _scatter(axes, part, first, colours, largest, part is scored)
            log_axis(axes, "x", min(times) / 1.6, max(times) * 2.2)
        grid[-1].set_xlabel(
            f"latency of {'an image' if first == 1 else f'{first} images'}, ms, p50"
        )
        grid[0].set_title(_caption(found))
        for axes, part in zip(grid, rows, strict=True):
            _label(axes, part, first, largest)
        save(figure, file)


def _is_benchmark(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / SUMMARY).read_text())["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _scatter(
    axes: Any,
    part: Sequence[Figures],
    batch: int,
    colours: Mapping[str, str],
    largest: int,
    is_scored: bool,
) -> None:
    for figures in part:
        x, y = _at(figures, batch)
        colour = colours[figures.model]
        look = {"color": colour} if is_scored else {"facecolor": "white", "edgecolor": colour}
        axes.scatter(x, y, s=_area(figures, largest), zorder=3, alpha=0.85, clip_on=False, **look)
    if not is_scored:
        axes.set_yticks([])
        axes.set_ylim(-1, 1)
        axes.set_ylabel("latency only")
        return
    values = [y for _, y in (_at(figures, batch) for figures in part)]
    room = max(PADDING, 0.35 * (max(values) - min(values)))
    axes.set_ylim(min(values) - room, min(max(values) + room, 100))
    axes.set_ylabel("test accuracy, %")


def _label(axes: Any, part: Sequence[Figures], batch: int, largest: int) -> None:
    several = len({figures.model for figures in part}) > 1
    labels = plain([f"{f.model}, {f.form}" if several else f.form for f in part])
    radii = [(_area(figures, largest) / 3.1416) ** 0.5 for figures in part]
    draw_labels(axes, labels, [_at(figures, batch) for figures in part], radii)


def _at(figures: Figures, batch: int) -> tuple[float, float]:
    y = 0.0 if figures.accuracy is None else 100 * figures.accuracy
    return figures.latency[batch].p50, y


def _area(figures: Figures, largest: int) -> float:
    return max(SMALLEST, AREA * figures.file_bytes / max(1, largest))


def _caption(found: Benchmark) -> str:
    threads = found.config.threads
    name = plain([found.name])[0]
    return f"{name}: {threads} CPU thread{'' if threads == 1 else 's'}; area of a point: file size"


def _times(figures: Figures, sizes: Sequence[int]) -> list[Any]:
    taken = [figures.latency[size] for size in sizes]
    memory = figures.memory
    kept: list[str] = [NONE] * (1 + len(sizes))
    if memory is not None:
        kept = [f"{memory.libraries / 1e6:,.0f}"]
        kept += [f"{memory.peaks[size] / 1e6:,.0f}" for size in sizes]
    numbers = [[f"{t.calls:,}", *map(number, (t.mean, t.p50, t.p95))] for t in taken]
    return [figures.model, figures.form, *(cell for row in numbers for cell in row), *kept]


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.2%}"
