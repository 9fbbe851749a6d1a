"""Measures how well a model moderates: compares its judgements (`Mistral.moderate`) of contents
with the known categories of these contents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mistral_ext.engine.outputs import outputs_of
from mistral_ext.engine.request import Request
from mistral_ext.files import read_text_file
from mistral_ext.llm import Mistral
from mistral_ext.text.guardrails import ACCEPTABLE, LABELS, Moderation

FLAGGED = "flagged"  # any category but `ACCEPTABLE`


@dataclass(frozen=True)
class Case:
    """A content whose category is known.

    Attributes:
        content: a text, or messages, of which the last one is judged.
        expected: one of `LABELS`, or `FLAGGED` if only this is known.
        place: the file and line of the content, for error messages.
    """

    content: str | Sequence[Mapping[str, Any]]
    expected: str
    place: str = "a content"


@dataclass(frozen=True)
class Confusion:
    """Counts how often the model gave each category to contents of each known category.

    Attributes:
        counts: the number of contents for each pair of a known category (`Case.expected`) and the
            category that the model found, one of `LABELS`.
    """

    counts: Mapping[tuple[str, str], int]

    def precision(self, label: str) -> float | None:
        """Of the contents that the model found to be `label`, the share that really are `label`.
        Returns None if there are no such contents.

        If `label` is a single category, contents that are known only as `FLAGGED` are left out,
        because they may or may not belong to it.
        """
        unknown = 0 if label in (ACCEPTABLE, FLAGGED) else self.counts.get((FLAGGED, label), 0)
        return _share(self._both(label), self._count(found=label) - unknown)

    def recall(self, label: str) -> float | None:
        """Of the contents that really are `label`, the share that the model found to be `label`.
        Returns None if there are no such contents."""
        return _share(self._both(label), self._count(expected=label))

    @property
    def labels(self) -> list[str]:
        """`ACCEPTABLE`, `FLAGGED`, and those of the other `LABELS` that are expected for at least
        one content."""
        expected = {pair[0] for pair in self.counts}
        return [ACCEPTABLE, FLAGGED, *(x for x in LABELS if x in expected - {ACCEPTABLE})]

    def _both(self, label: str) -> int:
        return self._count(label, label)

    def _count(self, expected: str | None = None, found: str | None = None) -> int:
        return sum(
            count for (of, by), count in self.counts.items() if _is(of, expected) and _is(by, found)
        )


def _is(label: str, wanted: str | None) -> bool:
    return wanted is None or label == wanted or (wanted == FLAGGED and label != ACCEPTABLE)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def read_cases(path: str | Path) -> list[Case]:
    """Reads contents from a file. Each line is a JSON object with "text" or "messages". It also has
    "category" (one of `LABELS`) or "flagged" (true or false). Messages have role and content. The
    content is text. It may be null, but not that of the last message, which is judged.

    Raises:
        OSError, ValueError: the file cannot be read, has no contents, or has a wrong line, which
            the message names.
    """
    cases = []
    for number, line in enumerate(read_text_file(path).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                cases.append(_case(json.loads(line), place))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
    if not cases:
        raise ValueError(f"{path} is empty, expected contents")
    return cases


def _case(fields: Any, place: str) -> Case:
    if not isinstance(fields, dict):
        raise ValueError(f"it is {fields!r:.60}, expected a JSON object")
    given = [name for name in ("text", "messages") if name in fields]
    if len(given) != 1:
        raise ValueError("expected either text or messages")
    content = fields[given[0]]
    kind = str if given == ["text"] else list
    if not isinstance(content, kind) or not content:
        raise ValueError(f"{given[0]} is {content!r:.60}, expected a non-empty {kind.__name__}")
    for message in content if kind is list else ():
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"a message is {message!r:.60}, expected an object with role and content"
            )
        if not isinstance(message["role"], str):
            raise ValueError(f"the role of a message is {message['role']!r:.60}, expected text")
        if not isinstance(message["content"], str | None):
            raise ValueError(
                f"the content of a message is {message['content']!r:.60}, expected text"
            )
    if isinstance(content, list) and not (judged := content[-1]["content"]):
        raise ValueError(f"the content of the last message is {judged!r}, expected a text to judge")
    if isinstance(fields.get("flagged"), bool) and "category" not in fields:
        return Case(content, FLAGGED if fields["flagged"] else ACCEPTABLE, place)
    if fields.get("category") not in LABELS:
        raise ValueError(
            f"category is {fields.get('category')!r}, expected one of {', '.join(LABELS)}, or "
            "flagged, true or false"
        )
    return Case(content, fields["category"], place)


def moderate(
    llm: Mistral, cases: Sequence[Case], progress: bool = True, adapter: str | None = None
) -> Iterator[tuple[int, Moderation]]:
    """Moderates contents.

    Args:
        llm: an Instruct model.
        cases: the contents.
        progress: show a progress bar if stderr is a terminal.
        adapter: the name of a loaded adapter. None: the model is used without an adapter.

    Yields:
        The index of a case and the model's judgement, in the order in which cases are finished.

    Raises:
        ValueError: the model cannot read a content, for instance because the content is too long.
            All contents are checked before the first is read. The message names the content's
            place.
    """
    requests = [_request(llm, case, adapter) for case in cases]
    with tqdm(total=len(cases), unit="contents", disable=None if progress else True) as bar:
        for number, output in outputs_of(llm.engine, requests):
            if output.prompt_logits is not None and len(output.prompt_logits):
                yield number, llm.moderation_of(output.prompt_logits[-1])
                bar.update()


def _request(llm: Mistral, case: Case, adapter: str | None) -> Request:
    try:
        return llm.moderation_request(case.content, adapter=adapter)
    except ValueError as error:
        raise ValueError(f"{case.place}: {error}") from error


def confusion(cases: Sequence[Case], found: Sequence[Moderation]) -> Confusion:
    """Counts judgements. `found` has one for each case, in the same order."""
    counts: dict[tuple[str, str], int] = {}
    for case, moderation in zip(cases, found, strict=True):
        pair = case.expected, moderation.category
        counts[pair] = counts.get(pair, 0) + 1
    return Confusion(counts)
