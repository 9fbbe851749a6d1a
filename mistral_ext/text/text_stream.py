"""Turns token ids into text, one id at a time.

A token's text may not be final when the token arrives, for three reasons. The token may end inside
a UTF-8 character. Its first space may be the space that encoding puts before a text. Its end may
turn out to be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mistral_ext.text.tokenizer import UTF8_ERRORS, Tokenizer


class TextStream:
    """Turns token ids into text piece by piece, up to the first stop string.

    The pieces that push() and finish() return, joined, are `text`: the decoded text of all ids, cut
    before the stop string that begins first. A piece is returned as soon as no later token can
    change it.

    Args:
        tokenizer: gives the bytes of each token.
        stop: strings that end the text. They are not part of it.
        strip_first_space: whether the ids begin a text (such as a chat reply), so that the space
            that encoding puts there is dropped. If False, the ids continue a text.
        divider: the id of a control token that divides the text, such as [TOOL_CALLS]. Neither stop
            strings nor characters reach across it, so text that was held back is final when this
            token comes. None: no token divides the text.

    Attributes:
        stopped: whether a stop string was found. Later ids then add no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        strip_first_space: bool = False,
        divider: int | None = None,
    ) -> None:
        if isinstance(stop, str):
            raise TypeError(f"stop is the string {stop!r}, expected a sequence of strings")
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {list(stop)!r}, expected non-empty strings")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._divider = divider
        self._at_stripped_start = strip_first_space and tokenizer.adds_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(UTF8_ERRORS)
        self._held = ""  # text that may be a stop string, or a part of one
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Takes a token. Returns the text that became final, which may be "".

        Raises ValueError for an id outside the vocabulary.
        """
        data = self._tokenizer.token_bytes(token_id)
        if self._at_stripped_start and data:
            data = data.removeprefix(b" ")
            self._at_stripped_start = False
        final = token_id == self._divider
        return self._release(self._decoder.decode(data, final), final)

    def finish(self) -> str:
        """Returns the text that was held back. An incomplete character becomes U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        begins = [i for s in self._stop if (i := held.find(s)) >= 0]
        cut = min(begins, default=len(held))
        # If an incomplete stop string begins before a complete one, its end has to be awaited.
        partial = len(held) if final else self._partial_stop(held)
        if cut <= partial and begins:
            self.stopped = True
            self._held = ""
        else:
            cut = partial
            self._held = held[cut:]
        if cut:
            self._pieces.append(held[:cut])
        return held[:cut]

    def _partial_stop(self, held: str) -> int:
        """The index in `held` from which on the rest may be the beginning of a stop string. It is
        the lowest such index, or len(held) if there is none."""
        for start in range(max(0, len(held) - self._longest_stop + 1), len(held)):
            tail = held[start:]
            if any(s.startswith(tail) for s in self._stop):
                return start
        return len(held)
