"""Self-contained HTML pages of Jinja2 templates, with all text escaped."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from smallfry.io.replace import write_whole

TEMPLATES = Environment(
    loader=PackageLoader("smallfry", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **data: Any) -> Markup:
    """Render a template of the package, by its path; text that is not ``Markup`` is escaped.

    Raises:
        jinja2.UndefinedError: The template uses a variable that ``data`` lacks.
    """
    return Markup(TEMPLATES.get_template(template).render(data))


def image(file: Path, alt: str) -> Markup:
    """Embed a PNG with a description; narrow screens scroll it instead of shrinking it."""
    return render("report/templates/image.html", url=png_url(file.read_bytes()), alt=alt)


def png_url(png: bytes) -> str:
    """Encode a PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def words(value: Any) -> str:
    """Format a value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def write(file: Path, text: str) -> None:
    """Write a text file atomically; raises as ``write_whole``."""
    write_whole(file, text.encode(errors="replace"))
