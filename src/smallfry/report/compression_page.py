"""Page of a compression: figures before and after, its pictures, and every layer."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from smallfry.report.bits import draw_trade_off
from smallfry.report.compression import FIGURES, draw_layers, draw_profile
from smallfry.report.page import image, render, words, write
from smallfry.report.table import NONE, table

PAGE = "compression.html"


def write_compression(
    folder: Path,
    title: str,
    rows: Sequence[Sequence[str]],
    summary: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Path:
    """Write the page and its pictures into a run folder, and return the page.

    Args:
        folder: The compressed run.
        title: Title of the page.
        rows: Figures of the whole model: name, before, after, change.
        summary: Content of ``compression.json``. Pictures are those of its ``layers`` and of what
            its ``reports`` have: ``profile`` and ``mixed``; ``lists`` are tables.
        facts: What was compressed, for the table of provenance.
    """
    pictures, layers = folder / "pictures", summary["layers"]
    pictures.mkdir(exist_ok=True)
    draw_layers(layers, pictures / "layers.png")
    methods = [(name, words(given)) for each in summary["methods"] for name, given in each.items()]
    heads = ["layer", *["before", "after"] * len(FIGURES)]
    groups = [("", 1), *((_with_unit(*each), 2) for each in FIGURES.values())]
    html = render(
        "report/templates/compression.html",
        title=title,
        figures=table(["", "before", "after", "change"], rows),
        images=summary["validation_images"],
        methods=table(["method", "settings"], methods, text=(0, 1)),
        layers=image(pictures / "layers.png", "sizes of each layer before and after"),
        sections=list(_sections(summary["reports"], pictures)),
        all_layers=table(heads, [_cells(each) for each in layers], groups=groups),
        provenance=table(["what", "value"], [[k, words(v)] for k, v in facts.items()], text=(0, 1)),
    )
    write(folder / PAGE, html)
    return folder / PAGE


def _sections(
    reports: Sequence[Mapping[str, Any]], pictures: Path
) -> Iterator[tuple[str, str, Markup]]:
    """Yield a title, a sentence and the picture or table of everything that the reports hold."""
    names: list[str] = []
    for report in reports:
        lists = [(what, ", ".join(each)) for what, each in report.get("lists", {}).items() if each]
        if lists:
            heading = f"Layers by name: {report['method']}"
            yield heading, "", table(["what", "layers"], lists, text=(0, 1))
        if profile := report.get("profile"):
            file = _file(pictures, "profile", names)
            draw_profile(profile, file)
            caption = f"{profile['costs']}, by layer and {profile['choices']}"
            yield (
                f"Sensitivity of each layer: {report['method']}",
                f"Each layer alone at each choice; the others are as before. Cells: "
                f"{profile['costs']}. Columns: {profile['choices']}.",
                image(file, caption),
            )
        if mixed := report.get("mixed"):
            file = _file(pictures, "bits", names)
            draw_trade_off(mixed, file)
            yield (
                f"Bits of all layers together: {report['method']}",
                f"{mixed['average_bits']:.3g} bits on average.",
                image(file, f"summed sensitivity against {mixed['unit']}"),
            )


def _file(pictures: Path, name: str, taken: list[str]) -> Path:
    """Return a file for a picture, with a number if its name is taken."""
    taken.append(name)
    count = taken.count(name)
    return pictures / (f"{name}.png" if count == 1 else f"{name}_{count}.png")


def _with_unit(title: str, unit: str) -> str:
    return f"{title}, {unit}" if unit else title


def _cells(layer: Mapping[str, Any]) -> list[str]:
    counts = [layer[name][end] for name in FIGURES for end in ("before", "after")]
    return [layer["name"], *(f"{count:,}" if count else NONE for count in counts)]
