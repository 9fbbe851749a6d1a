"""Logs a line for each request and, if requested, its prompts and completions."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from mistral_ext.files import json_text

_log = logging.getLogger("mistral_ext.serve")

_FILE_BYTES = 64 * 2**20
_FILES = 8  # the number of files that are kept; older files are deleted


@dataclass
class Record:
    """Facts about a request. Times are of `time.perf_counter`."""

    request_id: str
    path: str
    began: float = field(default_factory=time.perf_counter)
    status: int = 200
    # Why it ended, such as the finish reasons of its completions, the categories of contents that
    # were judged, an error's code, or "disconnected".
    reason: str = "-"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None
    body: dict[str, Any] | None = None
    texts: list[str | None] = field(default_factory=list)


class _PrivateFile(RotatingFileHandler):
    """A log file, and the files that replace it when it is large. Only the owner may read files
    that this class makes, because they have the prompts of users. A file that exists already keeps
    its permissions."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=_FILE_BYTES, backupCount=_FILES - 1)

    def _open(self) -> Any:
        # Without a buffer, so that no part of a line that failed is written later.
        return open(self.baseFilename, "ab", buffering=0, opener=_private)

    def write(self, line: str) -> None:
        """Writes a whole line, or nothing.

        Raises:
            OSError: the line could not be written.
        """
        if self.shouldRollover(logging.makeLogRecord({"msg": line})):
            self.doRollover()
        assert self.stream
        file, data = self.stream.fileno(), f"{line}\n".encode()
        size = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            with suppress(OSError):  # what is no file, such as a pipe, has no length
                os.ftruncate(file, size)
            raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class RequestLog:
    """Writes records of requests.

    Args:
        file: a file to which a JSON object is written for each request with a body. The object has
            the prompts and completions. When the file is large, it is renamed and a new file
            begins. None: prompts and completions are not written anywhere.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = None if file is None else _PrivateFile(file)

    def write(self, record: Record) -> None:
        """Logs a line for a request that has ended, and writes its JSON object to the file."""
        seconds = time.perf_counter() - record.began
        first = record.first_token_seconds
        _log.info(
            "%s %s %d %s prompt=%d cached=%d completion=%d first=%s total=%.3fs",
            record.request_id,
            record.path,
            record.status,
            record.reason,
            record.prompt_tokens,
            record.cached_tokens,
            record.completion_tokens,
            "-" if first is None else f"{first:.3f}s",
            seconds,
        )
        if self._file and record.body is not None:
            line = {
                "id": record.request_id,
                "time": time.time(),
                "path": record.path,
                "status": record.status,
                "reason": record.reason,
                "request": record.body,
                "texts": record.texts,
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "completion_tokens": record.completion_tokens,
                "first_token_seconds": first,
                "seconds": seconds,
            }
            try:
                self._file.write(json_text(line))
            except OSError as error:
                _log.error("%s is not in the file of requests: %s", record.request_id, error)

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
