"""Makes new folders that are either complete or absent, however the writing process ends."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger("mistral_ext")

# Signals that ask a process to end. By default they end it at once, without any clean-up.
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def expect_free(target: Path) -> None:
    """Raises FileExistsError unless `target` is absent or an empty folder."""
    if not is_free(target):
        raise FileExistsError(f"{str(target)!r} exists, expected a new or an empty folder")


def expect_replaceable(target: Path) -> None:
    """Raises FileExistsError unless `target` is absent, or an empty folder that `new_folder` can
    replace."""
    expect_free(target)
    # `ismount` is False for a link to a mount point, so links are resolved first.
    if target.exists() and (os.path.ismount(target.resolve()) or target.samefile(os.curdir)):
        raise FileExistsError(
            f"{str(target)!r} is the current folder or a mount point, which cannot be replaced: "
            "expected a new folder, which may lie in it"
        )


def is_free(target: Path) -> bool:
    """Says whether `target` is absent or an empty folder."""
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Makes a folder to write files into, and renames it to `target` when the block ends.

    Until then the folder lies in a temporary folder beside `target`. An error, Ctrl-C, or (in the
    main thread) SIGTERM or SIGHUP removes the temporary folder. The folder is renamed only when all
    its files are on the disk. So `target` is never half-written, not even after a power cut. What a
    killed run has left is removed by the next run with this target.

    Args:
        target: the path of the new folder. If it exists, it must be an empty folder. If it is a
            symbolic link, the folder is made where the link points.

    Raises:
        FileExistsError: `target` is a file, or a folder with something in it, or an empty folder
            that cannot be replaced.
        OSError: no space is left, or another failure of the system.
    """
    expect_replaceable(target)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{target.name}.part-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        _remove_if_dead(left, target.name)
    with (
        _cleaning_up_first(),
        # Only its owner may read a temporary folder. So the new folder lies inside it, and has the
        # usual permissions.
        tempfile.TemporaryDirectory(
            prefix=prefix, dir=target.parent, ignore_cleanup_errors=True
        ) as temporary,
        _locked(Path(temporary)),
    ):
        folder = Path(temporary, target.name)
        folder.mkdir()
        yield folder
        sync_files(folder)
        if target.exists():
            target.rmdir()  # raises an error unless the folder is empty
        folder.rename(target)
        sync_names(target.parent)


def _remove_if_dead(part: Path, name: str) -> None:
    """Removes a temporary folder if the process that made it has ended. A process locks its folder
    before it makes the folder `name` inside. So if `name` is there and the lock is free, that
    process has ended. A folder with other contents stays, because the user may have made it."""
    try:
        if os.listdir(part) == [name]:
            with _locked(part) as is_locked:
                if is_locked:
                    shutil.rmtree(part)
                    _log.warning("%s: removed, because the run that wrote it was killed", part)
                    return
    except FileNotFoundError:
        return  # its run has just ended, and removed it
    except OSError:
        pass
    _log.warning("%s: another run is writing it, or was killed: then remove it", part)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder, and says whether this was possible. The lock ends with the process, however
    that ends."""
    if sys.platform == "win32":  # folders cannot be opened there
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has the lock, or the file system has no locks
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Makes sure that the files in a folder and its subfolders, and their names, are on the disk
    (fsync)."""
    for file in folder.iterdir():
        if file.is_dir():
            sync_files(file)
            continue
        with file.open("rb+") as f:
            os.fsync(f.fileno())
    sync_names(folder)


def sync_names(folder: Path) -> None:
    """Makes sure that the names of the files in a folder are on the disk (fsync)."""
    if os.name == "nt":  # folders cannot be opened on Windows
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Ended(SystemExit):
    """Raised when a signal asks the process to end, so that the block can clean up first."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def _cleaning_up_first() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the block with an exception, so that the block cleans up before
    the process ends.

    Does nothing for signals that are already handled or ignored. Does nothing outside the main
    thread, the only thread that may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, _: object) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_IGN)  # a second signal would interrupt the clean-up
        raise _Ended(number)

    for number in handled:
        signal.signal(number, end)
    ended_by = None
    try:
        yield
    except _Ended as ended:
        ended_by = ended.number
        raise
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        if ended_by is not None:
            signal.raise_signal(ended_by)  # the parent sees which signal ended this process
