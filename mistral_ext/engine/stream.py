"""Gives the text of one completion, piece by piece as it is generated."""

from __future__ import annotations

from collections.abc import Iterator

from mistral_ext.engine.engine import Outputs
from mistral_ext.engine.request import Completion, Output
from mistral_ext.text.tool_parser import ToolParser


class Stream:
    """An iterator over pieces of the text of one completion. It raises the error of a request that
    fails.

    Args:
        outputs: the outputs of the engine for this completion alone.
        parser: takes tool calls out of the text. None: the completion has no tool calls.

    Attributes:
        token_ids: the tokens generated so far.
        completion: the whole completion. None: it has not ended.
    """

    def __init__(self, outputs: Outputs, parser: ToolParser | None = None) -> None:
        self.token_ids: list[int] = []
        self.completion: Completion | None = None
        self._outputs = outputs
        self._parser = parser

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for output in self._outputs:
            if output.error:
                raise output.error
            self.token_ids += output.token_ids
            self.completion = output.completion
            if text := self._text(output):
                return text
        raise StopIteration

    def _text(self, output: Output) -> str:
        """Returns the text that an output adds, without tool calls."""
        if self._parser is None:
            return output.text
        pieces = list(self._parser.push(output.token_ids, output.text, output.is_last))
        if output.completion:
            self.completion = output.completion.divided(self._parser)
        return "".join(piece for piece in pieces if isinstance(piece, str))

    def read(self) -> Completion:
        """Reads all of the text, and returns the completion."""
        for _ in self:
            pass
        assert self.completion is not None  # the iteration has ended
        return self.completion

    def close(self) -> None:
        """Aborts the completion, if it has not ended, and frees its memory."""
        self._outputs.close()
