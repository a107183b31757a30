"""The page of the demo, in Gradio: an image in, one panel for each model."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from smallfry.demo.thinking import Thought, moments_of, think
from smallfry.demo.view import STYLE, show_error, show_moment
from smallfry.errors import SmallfryError
from smallfry.images import MOST_PIXELS, decode
from smallfry.models import ViTRM
from smallfry.training.run import TrainedModel

MOST_BYTES = 20 * 2**20  # of an uploaded file
KEPT_SECONDS = 3600  # thoughts and uploads of a page that nobody uses
FRAME_SECONDS = 0.5  # of "Watch it think"
MOST_FRAMES = 40  # longer thoughts are shown in leaps

STYLES = f"""{STYLE}
.gradio-container {{ max-width: 1240px !important; margin: 0 auto !important; }}
.gradio-container:not(:has(#sf-panel-1)) {{ max-width: 860px !important; }}
.gradio-container .column, .gradio-container .gap {{ gap: .7rem; }}
.gradio-container h1 {{ margin: .3rem 0; font-size: 1.5rem; }}
#sf-examples .row {{ display: grid; gap: .4rem;
  grid-template-columns: repeat(4, minmax(0, 1fr)); }}
#sf-examples button {{ flex-direction: column; gap: .3rem; padding: .4rem .1rem;
  min-width: 0; font-size: .72rem; white-space: normal; }}
#sf-examples button img {{ width: 48px; height: 48px; margin: 0; image-rendering: pixelated; }}
.sf-panel {{ min-width: min(100%, 320px) !important; }}
"""

# Gradio's file input takes dropped and picked files; this lets it take pasted ones.
PASTE = """<script>
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
  const input = document.querySelector("#sf-image input[type=file]");
  if (!file || !input) return;
  const held = new DataTransfer();
  held.items.add(file);
  input.files = held.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
</script>"""

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


class Shown(NamedTuple):
    """A model of the page."""

    origin: str  # where it came from, such as its run folder
    trained: TrainedModel


class _Panel(NamedTuple):
    thought: gr.State
    slider: gr.Slider
    view: gr.HTML


def build_page(models: Sequence[Shown], examples: Sequence[Path] = ()) -> gr.Blocks:
    """The page for one model, or for several side by side.

    Args:
        models: What thinks about each image.
        examples: Image files to try; they must lie where Gradio may read.
    """
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    names = " and ".join(_name(shown) for shown in models)
    with gr.Blocks(
        title=f"smallfry demo: {names}",
        analytics_enabled=False,
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
    ) as page:
        gr.HTML('<div class="sf"><h1>smallfry: watch a small network think</h1></div>')
        with gr.Row(equal_height=False):
            image = gr.File(label="Image: drop, pick or paste one", height=170, elem_id="sf-image")
            with gr.Column(visible=bool(examples), elem_id="sf-examples"):
                gr.HTML('<div class="sf"><p>Or one of these:</p></div>')
                with gr.Row():
                    buttons = [
                        gr.Button(file.stem, icon=file, size="sm", min_width=0) for file in examples
                    ]
        status = gr.HTML(elem_id="sf-status")
        recursive = any(isinstance(shown.trained.model, ViTRM) for shown in models)
        play = gr.Button("▶ Watch it think", elem_id="sf-play", visible=recursive)
        with gr.Row(equal_height=False):
            panels = [_panel(number, models) for number in range(len(models))]
        with gr.Accordion("What is shown here", open=False):
            gr.HTML(ABOUT)

        thoughts, sliders, views = (list(parts) for parts in zip(*panels, strict=True))
        outputs = [image, status, *thoughts, *sliders, *views]
        image.upload(partial(_look_at_upload, models), [image], outputs, **hidden)
        for button, file in zip(buttons, examples, strict=True):
            button.click(partial(_look, models, file), None, outputs, **hidden)
        for panel, shown in zip(panels, models, strict=True):
            panel.slider.change(
                partial(_show, shown.trained.classes),
                [panel.thought, panel.slider],
                [panel.view],
                trigger_mode="always_last",
                concurrency_limit=None,
                **hidden,
            )
        play.click(_walk, thoughts, sliders, concurrency_limit=4, **hidden)
    return page


def _panel(number: int, models: Sequence[Shown]) -> _Panel:
    shown = models[number]
    which = f"model {number + 1}, " if len(models) > 1 else ""
    last = moments_of(shown.trained.model) - 1
    with gr.Column(elem_classes="sf-panel", elem_id=f"sf-panel-{number}"):
        gr.HTML(_heading(shown))
        slider = gr.Slider(
            0,
            max(last, 1),
            value=max(last, 1),
            step=1,
            label=f"Latent steps of {which}{_name(shown)}",
            visible=last > 0,
            elem_id=f"sf-slider-{number}",
        )
        view = gr.HTML(elem_id=f"sf-view-{number}")
    return _Panel(gr.State(time_to_live=KEPT_SECONDS), slider, view)


def _heading(shown: Shown) -> str:
    model, size = shown.trained.model, shown.trained.image_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = (
        f"{parameters:,} parameters, {len(shown.trained.classes)} classes, {size} × {size} pixels"
    )
    if isinstance(model, ViTRM):
        steps = model.recursion_steps
        facts += f", {steps} recursion {'step' if steps == 1 else 'steps'}"
        facts += f" of {model.latent_steps} latent steps"
    return (
        f'<div class="sf"><h2>{escape(_name(shown))}</h2>'
        f'<p class="sf-quiet">{facts}; from {escape(shown.origin)}</p></div>'
    )


def _name(shown: Shown) -> str:
    return str(shown.trained.manifest["model"]["name"])


# What happens


def _look_at_upload(models: Sequence[Shown], path: str) -> list[Any]:
    file = Path(path)
    try:
        return _look(models, file)
    finally:
        file.unlink(missing_ok=True)  # nobody's photos are kept


def _look(models: Sequence[Shown], file: Path) -> list[Any]:
    """What all models think about an image file, or why that can't be.

    Returns:
        New values of the file input, which is emptied for the next image, of the status, and of
        every model's thought, slider and view.
    """
    thoughts: list[Thought] = []
    try:
        for _, trained in models:
            pixels = decode(file, file.name, trained.image_size, trained.channels)
            thoughts.append(think(trained, pixels))
    except SmallfryError as error:
        nothing = [None] * len(models)
        return [None, show_error(str(error)), *nothing, *([gr.skip()] * len(models)), *nothing]
    ends = [thought.answer for thought in thoughts]
    views = [
        show_moment(thought, end, shown.trained.classes)
        for thought, end, shown in zip(thoughts, ends, models, strict=True)
    ]
    status = f'<div class="sf"><p role="status">{escape(file.name)}</p></div>'
    return [None, status, *thoughts, *ends, *views]


def _show(classes: Sequence[str], thought: Thought | None, moment: float) -> str:
    if thought is None:
        return ""
    return show_moment(thought, min(max(int(moment), 0), len(thought.moments) - 1), classes)


def _walk(*thoughts: Thought | None) -> Iterator[Any]:
    """Slider values, from the first moment to the model's answer."""
    ends = [0 if thought is None else thought.answer for thought in thoughts]
    stride = 1 + max(ends) // MOST_FRAMES
    for moment in range(0, max(ends) + stride, stride):
        values = [gr.skip() if end == 0 else min(moment, end) for end in ends]
        yield values if len(values) > 1 else values[0]
        time.sleep(FRAME_SECONDS)
