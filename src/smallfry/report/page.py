"""Self-contained HTML pages."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from smallfry.io.replace import write_whole

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 76rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 3rem; border-bottom: 2px solid #e5e7eb; }
h3 { margin-top: 2.2rem; } p { max-width: 52rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e5e7eb; vertical-align: top; }
th { color: #4b5563; font-weight: 600; vertical-align: bottom; }
th.group { text-align: center; }
td.text, th.text { text-align: left; } td.text { white-space: normal; min-width: 8rem;
  overflow-wrap: anywhere; }
tbody tr:hover { background: #f9fafb; } tr.chosen { background: #fef9c3; }
.range { color: #6b7280; font-size: 0.92em; }
.line { display: inline-block; width: 1.4rem; margin-right: 0.5rem; vertical-align: middle;
  border-top: 3px solid; }
details { margin: 1rem 0; } summary { cursor: pointer; }
nav a { margin-right: 1.2rem; }
@media (max-width: 48rem) { body { margin: 0.8rem auto; padding: 0 0.8rem; }
  .picture { overflow-x: auto; } .picture img { max-width: none; width: 48rem; }
  td.text { min-width: 12rem; } }
"""


def page_of(title: str, body: Sequence[str]) -> str:
    """Build a complete page, without scripts or network requests."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(body) + "\n</body>\n</html>\n"


def image(file: Path, says: str) -> str:
    """Embed a PNG with a description; narrow screens scroll it instead of shrinking it."""
    data = base64.b64encode(file.read_bytes()).decode()
    picture = f'<img alt="{escape(says)}" src="data:image/png;base64,{data}">'
    return f'<div class="picture">{picture}</div>'


def words(value: Any) -> str:
    """Format a value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def write(file: Path, text: str) -> None:
    """Write a text file atomically; raises as ``write_whole``."""
    write_whole(file, text.encode(errors="replace"))
