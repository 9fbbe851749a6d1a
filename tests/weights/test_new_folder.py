"""mistral_ext.weights.new_folder: complete and on the disk, or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mistral_ext.weights import new_folder as module
from mistral_ext.weights.new_folder import new_folder

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what a descriptor is")
def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """All that was written of them: nothing may wait in a buffer of Python's."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor):
        found = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        size = os.fstat(descriptor).st_size if found.is_file() else None
        events.append(("sync", found.name, size))
        fsync(descriptor)

    def renamed(self, target):
        events.append(("rename", target.name, None))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    target = tmp_path / "new" / "model"
    with new_folder(target) as folder:
        (folder / "a").write_bytes(b"x" * 10)
        (folder / "b").write_bytes(b"x" * 100_000)
    assert sorted(events[:2]) == [("sync", "a", 10), ("sync", "b", 100_000)]
    assert events[2:] == [("sync", "model", None), ("rename", "model", None), ("sync", "new", None)]
    assert sorted(file.name for file in target.iterdir()) == ["a", "b"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_after_an_error_nothing_is_left(tmp_path, error):
    def write():
        with new_folder(tmp_path / "model") as folder:
            (folder / "a").touch()
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_ends_the_process_leaves_nothing(tmp_path, number):
    """Nor does a second one meanwhile; and who waits for the process sees what ended it."""
    code = f"""if True:
        import os, pathlib, runpy, signal, tempfile
        signal.signal({number}, signal.SIG_DFL)  # what nohup starts ignores SIGHUP
        cleanup = tempfile.TemporaryDirectory.cleanup
        def interrupted(self):
            os.kill(os.getpid(), {number})
            cleanup(self)
        tempfile.TemporaryDirectory.cleanup = interrupted
        new_folder = runpy.run_path({module.__file__!r})["new_folder"]
        with new_folder(pathlib.Path({str(tmp_path / "model")!r})) as folder:
            (folder / "a").touch()
            os.kill(os.getpid(), {number})
            print("went on")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_keeps_pointing_to_the_folder(tmp_path, exists):
    target, link = tmp_path / "other" / "model", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    if exists:
        target.mkdir()
    with new_folder(link) as folder:
        (folder / "a").touch()
    assert link.is_symlink()
    assert [file.name for file in target.iterdir()] == ["a"]
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a", "link", "model", "other"]


@pytest.mark.parametrize("target", ["model", ".", "link"])
def test_a_folder_that_cannot_be_replaced_is_refused_first(tmp_path, monkeypatch, target):
    model, link = tmp_path / "model", tmp_path / "link"
    model.mkdir()
    link.symlink_to(model)
    monkeypatch.chdir(model if target == "." else tmp_path)
    is_mount = target != "." and model.resolve()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == is_mount)
    message = "current folder or a mount point, which cannot be"
    with pytest.raises(FileExistsError, match=message), new_folder(Path(target)):
        pytest.fail("the block began")
    assert sorted(tmp_path.rglob("*")) == [link, model]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what a descriptor is")
def test_files_of_subfolders_are_on_the_disk_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
    )
    with new_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").touch()
    assert synced[:3] == ["a", "inner", "model"]


def test_what_signals_did_before_they_do_again(tmp_path):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with new_folder(tmp_path / "a"):
        assert signal.getsignal(SIGNALS[0]) is not before[SIGNALS[0]]
    with pytest.raises(ValueError, match="b"), new_folder(tmp_path / "b"):
        raise ValueError("b")
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_signals_that_do_not_end_the_process_are_left_alone(tmp_path, handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with new_folder(tmp_path / "model"):
            assert signal.getsignal(signal.SIGTERM) is handler
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "model").is_dir()


def test_in_another_thread(tmp_path):
    """Where no signal may be handled."""
    errors = []

    def write():
        try:
            with new_folder(tmp_path / "model") as folder:
                (folder / "a").touch()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert errors == []
    assert (tmp_path / "model" / "a").is_file()


WRITING = f"""if True:
    import pathlib, runpy, sys, time
    new_folder = runpy.run_path({module.__file__!r})["new_folder"]
    with new_folder(pathlib.Path(sys.argv[1])) as folder:
        (folder / "a").touch()
        print(folder.parent, flush=True)
        time.sleep(300)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no locks on Windows")
def test_what_a_killed_run_left_is_removed(tmp_path, caplog):
    """But not what another run is writing."""
    target = tmp_path / "model[1]"
    command = [sys.executable, "-c", WRITING, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try:
            part = Path(run.stdout.readline().strip())
            with pytest.raises(KeyError), new_folder(target):
                raise KeyError
            assert (part / target.name / "a").is_file()
        finally:
            run.kill()
    with new_folder(target):
        assert not part.exists()
    assert list(tmp_path.iterdir()) == [target]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith(f"{part}: another run is writing it, or was killed")
    assert messages[1:] == [f"{part}: removed, because the run that wrote it was killed"]


@pytest.mark.parametrize("files", [[], ["model", "notes"], ["notes"]])
def test_what_a_user_may_have_made_is_named(tmp_path, caplog, files):
    left = tmp_path / "model.part-x"
    for name in ("model.part-x", "another.part-x"):
        (tmp_path / name).mkdir()
    for name in files:
        (left / name).mkdir()
    with new_folder(tmp_path / "model"):
        pass
    assert sorted(file.name for file in left.iterdir()) == files
    assert (tmp_path / "another.part-x").is_dir()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{left}: another run is writing it")


def test_an_error_of_the_block_is_not_hidden(tmp_path):
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "model"):
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []
