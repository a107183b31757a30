"""ASGI application of the demo: Gradio's page and the routes, behind the middleware."""

import traceback
from collections.abc import Collection, Sequence

import gradio as gr
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from smallfry.demo.examples import Example
from smallfry.demo.page import SCRIPT, STYLES, build_page, page_files
from smallfry.demo.routes import MOST_BYTES, Answering, Shown
from smallfry.training.run import TrainedModel
from smallfry_runtime.serving.guard import Guard

OWN_PAGES = ("/", "/theme.css", "/manifest.json", "/favicon.ico")
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def build_application(
    models: Sequence[tuple[str, TrainedModel]],
    examples: Sequence[Example],
    hosts: Collection[str] | None,
) -> Guard:
    """Build the application.

    Args:
        models: Source and model of each panel.
        examples: Images to try.
        hosts: Names that it is asked for by; None for any.
    """
    shown = [Shown(*model) for model in models]
    routes = Answering(shown, examples).routes()
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None, routes=routes, exception_handlers={Exception: _report}),
        build_page(shown, examples),
        path="/",
        app_kwargs={"openapi_url": None},
        theme=gr.themes.Default(**FONTS),
        css=STYLES,
        head=SCRIPT,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )
    uploads = {f"/examples/{number}": 0 for number in range(len(examples))}
    return Guard(app, {*OWN_PAGES, *page_files()}, {"/look": MOST_BYTES} | uploads, hosts)


async def _report(request: Request, error: Exception) -> PlainTextResponse:
    traceback.print_exception(error)
    return PlainTextResponse("an error inside smallfry; please report it", 500)
