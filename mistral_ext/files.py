"""Reads text and JSON from files that people and other programs wrote, and writes files."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LFS_POINTER = b"version https://git-lfs"


def read_text_file(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, in the form that models were trained on (see
    `decode_text`).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8.
    """
    return decode_text(Path(path).read_bytes(), str(path))


def write_text_file(path: Path, text: str) -> None:
    """Writes a UTF-8 file, as `_write` does."""
    _write(path, text.encode())


def write_png(path: Path, figure: Figure) -> None:
    """Writes a figure of matplotlib as a PNG file, as `_write` does."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    _write(path, data.getvalue())


def _write(path: Path, data: bytes) -> None:
    """Writes a file. After an error, an older file at the path is unchanged. If the path is a link,
    its target is written. A device such as /dev/null, or a pipe, is written and stays. So is what a
    descriptor of this process leads to, as in /dev/stdout: after `> FILE` the data goes to the end
    of what was printed so far."""
    if path.exists() and not path.is_file():
        _flush_stdout()
        path.write_bytes(data)
        return
    descriptor = _descriptor(path)
    if descriptor is not None:
        _flush_stdout()
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        return
    path = path.resolve()
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _flush_stdout() -> None:
    """Writes what was printed before, so that it comes before the data if a path is stdout."""
    if sys.stdout is not None:  # None: it is closed
        sys.stdout.flush()


def _descriptor(path: Path) -> int | None:
    """Returns the descriptor of this process that a path is or links to, or None. /dev/stdout and
    /dev/fd/1 are links to /proc/self/fd/1, which Linux shows as a link to the open file."""
    folder = path.parent.resolve()
    while path.exists() and path.is_symlink():
        if folder == Path("/proc/self/fd").resolve():
            return int(path.name)
        path = folder / path.readlink()
        folder = path.parent.resolve()
    return None


def decode_text(data: bytes, name: str) -> str:
    """Decodes the bytes of a file called `name` to text.

    Windows programs begin a text with a byte order mark and end lines with CR LF. Both would change
    the text's tokens. So the mark is dropped, and CR LF becomes LF.

    Raises:
        ValueError: the bytes are not UTF-8. The message has the name.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{name} is not UTF-8 text: it begins as UTF-16 does") from None
        raise ValueError(f"{name} is not UTF-8 text: {error}") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds something else. The message names the file.
    """
    refuse_lfs_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, expected a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def json_text(value: Any, **options: Any) -> str:
    """Returns a value as JSON that every program can read. JSON has no NaN and no infinity, so such
    numbers become null.

    Args:
        value: the value.
        options: further arguments of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a git-lfs pointer: a small text in place of a file whose content was not
    downloaded."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def refuse_lfs_pointer(path: Path) -> None:
    """Raises ValueError if the file is a git-lfs pointer."""
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself: run 'git lfs pull'")
