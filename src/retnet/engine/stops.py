"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from retnet.settings import UserError


class StopScanner:
    """Passes text on until a stop string is complete; what may still become one is held back.

    The outcome is that of reading character by character: the stop string that is complete first wins (of
    several complete at the same character, the longest), so it does not matter how the text is cut into
    pieces.

    Attributes:
        stopped: whether a stop string was found. It and what follows it are never passed on.
        held: what may still become a stop string.

    Raises:
        UserError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UserError("a stop string must have at least one character, got ''")
        self.stops = tuple(stops)
        self.stopped = False
        self.held = ""

    def push(self, text: str) -> str:
        """Takes the next piece; returns what is now certain to come before any stop string."""
        if self.stopped:
            return ""
        if not self.stops:
            return text
        text, self.held = self.held + text, ""
        found = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        certain = len(text) - self._possible_stop(text)
        self.held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Returns what was held back: the text has ended and it did not become a stop string."""
        text, self.held = self.held, ""
        return text

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)
