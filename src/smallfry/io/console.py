"""Rich console without control characters of foreign text."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from smallfry.io.terminal import printable


class CleanConsole(Console):
    """Rich console with all text as ``printable``, in tables and bars too.

    A name such as ``:cat:`` stays as it is, too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"emoji": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render the segments of the output; colours and cursor movements are rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        """Leave a closed output to the caller; rich would end the process with exit code 1."""
        raise BrokenPipeError
