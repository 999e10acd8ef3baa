"""Turns pieces of an answer into text, never splitting a character or showing part of a stop string."""

import codecs
import re
from collections.abc import Sequence

_HALF = re.compile("[\ud800-\udfff]")


class SurrogateJoiner:
    """Joins the pieces of JSON strings, where a character's two surrogates may be in different pieces."""

    def __init__(self) -> None:
        self._half = ""  # a high surrogate, whose low one may follow

    def push(self, text: str) -> str:
        text, self._half = self._half + text, ""
        if not _HALF.search(text):
            return text
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def finish(self) -> str:
        """U+FFFD for a surrogate that stayed alone."""
        half, self._half = self._half, ""
        return "\N{REPLACEMENT CHARACTER}" if half else ""


class TextStream:
    """Decodes one answer's bytes as they come. Once a stop string is complete, `stopped` is set for good."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: bytes) -> str:
        """Add one token's bytes. Returns the text that can be shown now, possibly none."""
        return self._take(self._decoder.decode(token))

    def finish(self) -> str:
        """The rest, once no token will follow: an unfinished character becomes U+FFFD."""
        shown = self._take(self._decoder.decode(b"", final=True))
        rest, self._held = ("" if self.stopped else self._held), ""
        return shown + rest

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = min((at for stop in self.stop if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            shown, self._held, self.stopped = self._held[:found], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self.stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
