"""Gradio page of the demo: an image in, one panel per model.

Gradio draws the page and nothing else: no event has a function on the server, so that none can be
called. What happens is in ``page.js``, which sends images to the routes of ``answers.py``.
"""

import base64
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from smallfry.demo.examples import Example
from smallfry.demo.routes import MOST_BYTES, Shown
from smallfry.demo.trace import moments_of
from smallfry.demo.view import STYLE
from smallfry.models import LatentRecursive, Recursive
from smallfry_runtime.images import MOST_PIXELS

FRONT = Path(gr.__file__).parent / "templates" / "frontend"
SERVED = ("assets", "static")  # folders there, of files that the page loads

STYLES = f"""{STYLE}
.gradio-container {{ max-width: 1240px !important; margin: 0 auto !important; }}
.gradio-container:not(:has(#sf-panel-1)) {{ max-width: 860px !important; }}
.gradio-container .column, .gradio-container .gap {{ gap: .7rem; }}
.gradio-container h1 {{ margin: .3rem 0; font-size: 1.5rem; }}
.gradio-container :focus-visible, .sf-drop:has(:focus-visible) {{
  outline: 3px solid var(--sf-focus) !important; outline-offset: 2px; }}
:root {{ --sf-focus: #1d4ed8; }}
.dark {{ --sf-focus: #93c5fd; }}
.sf-drop {{ display: grid; place-items: center; min-height: 170px; padding: 1rem;
  border: 2px dashed var(--border-color-primary); border-radius: 8px; text-align: center;
  cursor: pointer; background: var(--background-fill-secondary); }}
.sf-drop:hover {{ border-color: var(--sf-focus); }}
.sf-drop input {{ position: absolute; width: 1px; height: 1px; opacity: 0; }}
.sf-examples {{ display: grid; gap: .4rem; grid-template-columns: repeat(4, minmax(0, 1fr)); }}
.sf-examples button {{ display: grid; place-content: start center; place-items: center;
  gap: .3rem; margin: 0 !important; padding: .4rem .1rem; font-size: .72rem; font-weight: 400;
  border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-secondary); }}
.sf-examples button:hover {{ border-color: var(--sf-focus); }}
.sf-examples img {{ width: 48px; height: 48px; margin: 0; image-rendering: pixelated; }}
.sf-panel {{ min-width: min(100%, 320px) !important; }}
"""
SCRIPT = f"<script>{(Path(__file__).parent / 'page.js').read_text('utf-8')}</script>"

DROP = """<label class="sf-drop"><span><strong>Image: drop, pick or paste one</strong></span>
<input type="file" accept="image/*"></label>"""
LISTEN = f"smallfry.listen(element, {MOST_BYTES}, () => trigger('submit'));"

ABOUT = f"""
<div class="sf">
<p><strong>Where it looks</strong> is attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928).
The prediction token reads the memory, and the memory reads the image, so the attention weights of
all layers are multiplied through, averaged over heads, half of each layer being the path around it.
It counts from the start of the recursion step, and is stretched so that the strongest patch is
orange. It says where information can have come from. It is no proof of what caused the answer.</p>
<p><strong>Halting</strong> is the model’s own estimate that its answer is right, which it was
trained to give.</p>
<p>Images are brought to the model’s size as in training. Files of at most {MOST_BYTES // 2**20} MiB
and {MOST_PIXELS // 10**6} megapixels are taken. Nothing leaves the machine that serves this
page.</p>
</div>
"""


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
            image = gr.HTML(DROP, js_on_load=LISTEN, elem_id="sf-image")
            with gr.Column(visible=bool(examples), elem_id="sf-examples"):
                gr.HTML(_examples(examples))
        status = gr.HTML(elem_id="sf-status")
        play = gr.Button("▶ Watch it think", elem_id="sf-play", visible=recursive)
        with gr.Row(equal_height=False):
            panels = [
                _panel(*panel) for panel in zip(range(len(models)), models, headings, strict=True)
            ]
        with gr.Accordion("What is shown here", open=False):
            gr.HTML(ABOUT)

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
    last = moments_of(model) - 1
    kind = "Latent" if isinstance(model, LatentRecursive) else "Recursion"
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
    model, size = shown.trained.model, shown.trained.image_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = (
        f"{parameters:,} parameters, {len(shown.trained.classes)} classes, {size} × {size} pixels"
    )
    if isinstance(model, Recursive):
        steps = model.recursion_steps
        facts += f", {steps} recursion {'step' if steps == 1 else 'steps'}"
    if isinstance(model, LatentRecursive):
        facts += f" of {model.latent_steps} latent steps"
    return (
        f'<div class="sf"><h2>{escape(heading)}</h2>'
        f'<p class="sf-quiet">{facts}; from {escape(shown.origin)}</p></div>'
    )


def _examples(examples: Sequence[Example]) -> str:
    buttons = "".join(
        f'<button type="button" data-example="{number}">'
        f'<img src="data:image/png;base64,{base64.b64encode(example.png).decode()}" alt="">'
        f"{escape(example.name)}</button>"
        for number, example in enumerate(examples)
    )
    return f'<div class="sf"><p>Or one of these:</p><div class="sf-examples">{buttons}</div></div>'
