"""Files and folders have one writer at a time."""

import errno
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
from filelock import FileLock

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.folders import claimed, discard, new_file, new_folder, remove_leftovers


def write(folder: Path) -> str:
    """Writes a folder; returns the reason if it was refused."""
    try:
        with new_folder(folder) as hidden:
            (hidden / "a").write_text("b")
    except AntgmmError as error:
        return str(error)
    return ""


def test_a_second_process_is_refused_and_the_first_one_finishes(tmp_path):
    out = tmp_path / "new" / "out"
    with multiprocessing.get_context("spawn").Pool(1) as other:
        with new_folder(out) as hidden:
            (hidden / "a").write_text("first")
            refused = other.apply(write, [out])
        assert refused == f"{out} is being written by another process: wait for it or choose another name"
        assert [path.name for path in out.parent.rglob("*")] == ["out", "a"]
        assert (out / "a").read_text() == "first"
        assert other.apply(write, [out]) == f"{out} exists: choose another name or remove it"


def test_a_claim_ends_with_an_error_and_one_of_a_killed_process_is_taken_over(tmp_path):
    def fail():
        with claimed(tmp_path / "out"):
            raise OSError("of the body")

    (tmp_path / ".out.lock").touch()  # left by the killed process
    with pytest.raises(OSError, match="of the body"):
        fail()
    assert not [*tmp_path.iterdir()]


def test_a_lock_that_was_removed_while_a_process_waited_is_not_taken(tmp_path):
    """Two processes could hold it otherwise: one by its old file, one by the new one."""
    waiting = FileLock(tmp_path / ".out.lock", timeout=10, poll_interval=0.01)
    with multiprocessing.pool.ThreadPool(1) as thread:
        with claimed(tmp_path / "out"):
            taken = thread.apply_async(waiting.acquire)
        taken.get(10)
    with pytest.raises(AntgmmError, match="another process"), claimed(tmp_path / "out"):
        pass
    waiting.release()


def test_files_and_folders_have_the_modes_of_the_process(tmp_path):
    mask = os.umask(0)
    os.umask(mask)
    with new_file(tmp_path / "file") as partial:
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    with new_folder(tmp_path / "folder"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")]
    assert modes == [0o666 & ~mask, 0o777 & ~mask]


def test_a_folder_with_a_file_that_is_being_read_is_discarded_and_removed_later(tmp_path, monkeypatch):
    """A network file system keeps such a file as .nfsXXXX until it is closed, so that its folder is not empty."""

    def held(path, *_, **__):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    step = tmp_path / "00000002"
    step.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", held)
        discard(step)
    assert not step.exists() and [*tmp_path.iterdir()]
    remove_leftovers(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_a_link_to_nothing_or_to_itself_is_refused(tmp_path, target):
    (tmp_path / "out").symlink_to(target)
    assert write(tmp_path / "out") == f"{tmp_path / 'out'} is a link to nothing: choose another name or remove it"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_created_is_one_line():
    with pytest.raises(AntgmmError, match=r"^cannot write /proc/x/y: .*; free disk space or choose another folder$"):
        claimed(Path("/proc/x/y")).__enter__()
