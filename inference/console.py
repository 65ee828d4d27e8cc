"""rich's console, for text of models, files and users."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from inference.streams import printable


class PrintableConsole(Console):
    """Steers the terminal itself, and lets no text do so."""

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
