"""Gradio page of the demo: an image in, one panel per model.

Gradio draws the page and nothing else: no event has a function on the server, so that none can be
called. What happens is in ``page.js``, which sends images to the routes of ``routes.py``.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from smallfry.demo.examples import Example
from smallfry.demo.puzzles import solves_puzzles
from smallfry.demo.routes import MOST_BYTES, Shown
from smallfry.demo.trace import moments_of
from smallfry.models import LatentRecursive, Recursive
from smallfry.report.page import png_url, render
from smallfry_runtime.images import MOST_PIXELS

FRONT = Path(gr.__file__).parent / "templates" / "frontend"
SERVED = ("assets", "static")  # folders there, of files that the page loads

HERE = Path(__file__).parent
STYLES = (HERE / "page.css").read_text("utf-8")
SCRIPT = f"<script>{(HERE / 'page.js').read_text('utf-8')}</script>"

DROP = """<label class="sf-drop"><span><strong>Image: drop, pick or paste one</strong></span>
<input type="file" accept="image/*"></label>"""
DROP_PUZZLE = """<label class="sf-drop"><span><strong>Puzzle: drop or pick a file</strong></span>
<input type="file" accept=".txt,.json,text/plain,application/json"></label>"""
LISTEN = f"smallfry.listen(element, {MOST_BYTES}, () => trigger('submit'));"


def build_page(models: Sequence[Shown], examples: Sequence[Example] = ()) -> gr.Blocks:
    """Build the page for one or several models.

    Args:
        models: Models of the page.
        examples: Images to try.
    """
    headings = name_models(models)
    recursive = any(isinstance(shown.trained.model, Recursive) for shown in models)
    with gr.Blocks(
        title=f"smallfry demo: {' and '.join(headings)}", analytics_enabled=False
    ) as page:
        gr.HTML('<div class="sf"><h1>smallfry: watch a small network think</h1></div>')
        with gr.Row(equal_height=False):
            puzzles = any(solves_puzzles(shown.trained) for shown in models)
            drop = DROP_PUZZLE if puzzles else DROP
            image = gr.HTML(drop, js_on_load=LISTEN, elem_id="sf-image")
            with gr.Column(visible=bool(examples), elem_id="sf-examples"):
                pictures = [(e.name, png_url(e.png)) for e in examples]
                gr.HTML(render("demo/templates/examples.html", examples=pictures))
        status = gr.HTML(elem_id="sf-status")
        play = gr.Button("▶ Watch it think", elem_id="sf-play", visible=recursive)
        with gr.Row(equal_height=False):
            panels = [
                _panel(*panel) for panel in zip(range(len(models)), models, headings, strict=True)
            ]
        with gr.Accordion("What is shown here", open=False):
            limits = {"most_bytes": MOST_BYTES, "most_pixels": MOST_PIXELS, "puzzles": puzzles}
            gr.HTML(render("demo/templates/about.html", **limits))

        sliders, views = (list(parts) for parts in zip(*panels, strict=True))
        outputs = [status, *sliders, *views]
        in_browser: dict[str, Any] = {"fn": None, "api_visibility": "private"}
        image.submit(
            inputs=sliders,
            outputs=outputs,
            js="smallfry.look",
            trigger_mode="multiple",
            **in_browser,
        )
        for number, (slider, view) in enumerate(panels):
            slider.change(
                inputs=slider,
                outputs=view,
                js=f"(moment) => smallfry.view({number}, moment)",
                trigger_mode="multiple",
                **in_browser,
            )
        play.click(js="smallfry.play", **in_browser)
    return page


def page_files() -> Collection[str]:
    """List all of Gradio's own files that the page may load."""
    files = (file for folder in SERVED for file in (FRONT / folder).rglob("*") if file.is_file())
    return {f"/{file.relative_to(FRONT).as_posix()}" for file in files}


def name_models(models: Sequence[Shown]) -> list[str]:
    """Name each model, with its source where several have the same name."""
    names = [str(shown.trained.manifest["model"]["name"]) for shown in models]
    if len(set(names)) == len(names):
        return names
    names = [f"{name} of {shown.origin}" for name, shown in zip(names, models, strict=True)]
    if len(set(names)) == len(names):
        return names
    return [f"{number}. {name}" for number, name in enumerate(names, 1)]


def _panel(number: int, shown: Shown, heading: str) -> tuple[gr.Slider, gr.HTML]:
    model = shown.trained.model
    last, kind = moments_of(model) - 1, "Recursion"
    if isinstance(model, Recursive) and solves_puzzles(shown.trained):
        last, kind = model.recursion_steps, "Improvement"
    elif isinstance(model, LatentRecursive):
        kind = "Latent"
    with gr.Column(elem_classes="sf-panel", elem_id=f"sf-panel-{number}"):
        gr.HTML(_heading(shown, heading))
        slider = gr.Slider(
            0,
            max(last, 1),
            value=max(last, 1),
            step=1,
            label=f"{kind} steps of {heading}",
            visible=last > 0,
            elem_id=f"sf-slider-{number}",
        )
        view = gr.HTML(elem_id=f"sf-view-{number}")
    return slider, view


def _heading(shown: Shown, heading: str) -> str:
    trained, model = shown.trained, shown.trained.model
    return render(
        "demo/templates/heading.html",
        heading=heading,
        origin=shown.origin,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=len(trained.classes),
        size=trained.frame,
        steps=model.recursion_steps if isinstance(model, Recursive) else None,
        latent_steps=model.latent_steps if isinstance(model, LatentRecursive) else None,
    )
