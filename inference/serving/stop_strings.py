"""Texts that end an answer and do not belong to it."""

from collections.abc import Sequence


class StopStrings:
    """Lets text pass up to the first stop string. What may be the beginning of one is held back until that is clear."""

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.was_found = False
        self._held = ""

    def let_pass(self, piece: str, is_last: bool = False) -> str:
        """What of the text so far can be shown now and was not before."""
        if self.was_found:
            return ""
        text = self._held + piece
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.was_found = True
            text = text[: min(places)]
        keep = 0 if is_last or self.was_found else self._beginning_of_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _beginning_of_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0
