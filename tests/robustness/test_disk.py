"""A disk that is full or read-only: one line, nothing left half-written, and what was saved before is intact."""

import asyncio
import errno
import logging
import os
import resource
import threading
import time
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError, disk_error
from antgmm_jax.io import checkpoint, orbax_errors
from antgmm_jax.io.folders import Unwritten
from antgmm_jax.io.shards import Shards, Writer
from antgmm_jax.parallel import processes
from antgmm_jax.parallel.processes import run_on_first
from experiments.run.export.publishing import fresh, fresh_alone
from experiments.run.files import write_bytes
from experiments.run.folder import RunFolder, status_of
from experiments.run.host.logs import TensorBoard, open_logs
from experiments.run.schema.recipe import load_recipe
from experiments.run.training import save_processor
from tests.experiments.tiny import write_recipe


@contextmanager
def files_below(size):
    """Writes beyond `size` bytes of a file fail with EFBIG in this process, in C++ too, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def noise(count, size):
    random = np.random.default_rng(0)
    return {f"w{number}": jnp.asarray(random.integers(0, 256, size, dtype=np.uint8)) for number in range(count)}


@pytest.mark.parametrize("save", ["step", "stage"])
def test_a_failed_save_ends_all_its_writes_before_its_one_line(tmp_path, capfd, monkeypatch, save):
    def saved(number, tree):
        if save == "step":
            checkpoint.save_step(tmp_path, number, tree, {})()
        else:
            checkpoint.save_stage(tmp_path / f"{number}", tree, {})

    unraisable = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    saved(1, noise(2, 8))
    before = sorted(path.name for path in tmp_path.iterdir())
    for number in range(2, 5):
        with files_below(20_000), pytest.raises(AntgmmError, match=r"^cannot save .*: a file is larger .*intact$"):
            saved(number, noise(12, 100_000))
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert not [one for one in threading.enumerate() if type(one).__module__.startswith("orbax.")]
    saved(5, noise(2, 8))
    assert not unraisable and capfd.readouterr() == ("", "")


def test_tasks_end_before_the_error_of_the_first_one_is_raised():
    ended = []

    async def slow():
        await asyncio.sleep(0.02)
        ended.append(1)

    async def fails():
        task = asyncio.ensure_future(slow())
        await asyncio.sleep(0)
        assert not task.done()
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        orbax_errors.run_to_the_end(fails())
    assert ended == [1]
    assert orbax_errors.asyncio_utils._run_sync_via_new_loop is orbax_errors.run_to_the_end


def test_orbax_is_silent_until_the_last_of_several_saves():
    logger = logging.getLogger("absl")
    level, first, second = logger.level, orbax_errors.silent(), orbax_errors.silent()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level == logging.CRITICAL
    second.__exit__(None, None, None)
    assert logger.level == level


def test_rows_that_cannot_be_written_are_one_line(tmp_path):
    writer = Writer(tmp_path / "missing", 0)
    with pytest.raises(Unwritten, match=r"^cannot write .*missing[^\n]*; free space and run it again$"):
        writer.add(0, b"x")
    writer = Writer(tmp_path, 0)
    writer.add(0, bytes(50_000))
    with files_below(1000), pytest.raises(Unwritten, match=r"^cannot write .*array_record: [^\n]*run it again$"):
        writer.flush()
    assert not Shards(tmp_path, 10).held.any()


def test_files_of_a_report_and_of_a_processor_are_one_line(tmp_path, tokenizer_of_rust):
    with files_below(1000):
        with pytest.raises(AntgmmError, match=r"^cannot write .*a\.png: File too large; free disk space or choose"):
            write_bytes(tmp_path / "report" / "a.png", bytes(2000))
        with pytest.raises(AntgmmError, match=rf"^cannot write {tmp_path} .*: free disk space or choose another"):
            save_processor(tokenizer_of_rust, tmp_path)
    assert not [*(tmp_path / "report").iterdir()]


@pytest.fixture
def tokenizer_of_rust():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    class Processor:
        def save_pretrained(self, folder):
            words = {f"word {number}": number for number in range(1000)}
            Tokenizer(WordLevel(words, "word 0")).save(str(folder / "tokenizer.json"))

    return Processor()


def test_metrics_on_a_full_disk_neither_hang_nor_print(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("experiments.run.host.logs.FLUSH", 0.0)
    log, begin = TensorBoard(tmp_path), time.monotonic()
    log.write("01-a", 1, 1, {"loss": 1.0})
    line = rf"^cannot write {tmp_path}: File too large; free disk space .*, or leave out --log tensorboard$"
    with files_below(10):
        with pytest.raises(AntgmmError, match=line):
            log.write("01-a", 2, 2, {"loss": 1.0})
        with pytest.raises(AntgmmError, match=line):
            log.close()
    log.close()
    assert time.monotonic() - begin < 2 and capfd.readouterr() == ("", "")


def test_the_end_of_metrics_does_not_hide_why_a_run_ends(tmp_path):
    def end():
        with open_logs(["tensorboard"], tmp_path, {}) as logs:
            logs[0].write("01-a", 1, 1, {"loss": 1.0})
            raise AntgmmError("cannot save")

    with files_below(10), pytest.raises(AntgmmError, match="^cannot save$"):
        end()


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_recipe(tmp_path / "r.toml", tmp_path / "teacher"))


def raising(recipe, run, error):
    with RunFolder(run).opened(recipe):
        raise error


def test_a_run_that_meets_a_read_only_disk_fails_with_the_path(recipe, tmp_path):
    error, run = OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/b"), tmp_path / "run"
    with pytest.raises(AntgmmError, match=r"^/a/b: Read-only file system; fix this and start again$"):
        raising(recipe, run, error)
    assert status_of(run)["state"] == "failed" and "Read-only" in status_of(run)["error"]
    with pytest.raises(ConnectionResetError):
        raising(recipe, run, ConnectionResetError(errno.ECONNRESET, "reset"))  # a bug, or a network


def test_an_export_on_a_full_disk_names_its_folder(tmp_path):
    def publish():
        with fresh(tmp_path / "export") as hidden:
            hidden.mkdir()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a write, which does not know its file

    with pytest.raises(AntgmmError, match=rf"^{tmp_path / 'export'}: No space left on device; fix this and start"):
        publish()
    assert not [*tmp_path.iterdir()]


def test_a_run_in_a_link_to_nothing_is_one_line(recipe, tmp_path):
    (tmp_path / "link").symlink_to("/nonexistent/x")
    with pytest.raises(FileExistsError) as caught, RunFolder(tmp_path / "link").opened(recipe):
        pass
    assert str(disk_error(caught.value)) == f"{tmp_path / 'link'}: File exists; fix this and start again"


def test_a_folder_that_somebody_creates_meanwhile_is_kept(tmp_path):
    def publish():
        with fresh(tmp_path / "export") as hidden:
            hidden.mkdir()
            (tmp_path / "export").mkdir()
            (tmp_path / "export" / "thesis.txt").write_text("mine")

    with pytest.raises(AntgmmError, match="export was created by somebody else meanwhile"):
        publish()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "thesis.txt"]


def test_a_folder_that_one_process_writes_alone_waits_for_no_other(tmp_path, monkeypatch):
    """Others wait in `run_on_first`: one more exchange would be matched with theirs, and wait for ever."""

    def publish():
        with fresh_alone(tmp_path / "export") as hidden:
            hidden.mkdir()
            (hidden / "config.json").write_text("1")

    sent = []
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "broadcast_from_first", lambda tree: sent.append(1) or tree)
    run_on_first(publish)
    assert (tmp_path / "export" / "config.json").read_text() == "1" and len(sent) == 1
    with fresh(tmp_path / "other") as hidden:
        hidden.mkdir()
    assert (tmp_path / "other").is_dir() and len(sent) == 3


def test_files_that_are_not_of_an_export_are_not_removed_with_it(tmp_path):
    def publish(text):
        with fresh(tmp_path / "export") as hidden:
            hidden.mkdir()
            (hidden / "config.json").write_text(text)

    publish("1")
    (tmp_path / "export" / "thesis.txt").write_text("mine")
    with pytest.raises(AntgmmError, match=r"export/thesis\.txt is no file of an export, .*: move it elsewhere$"):
        publish("2")
    assert (tmp_path / "export" / "config.json").read_text() == "1"
    (tmp_path / "export" / "thesis.txt").unlink()
    publish("2")
    assert [path.read_text() for path in tmp_path.rglob("*.*")] == ["2"]


def test_a_status_that_cannot_be_written_does_not_hide_why_a_run_ends(recipe, tmp_path):
    def end():
        with RunFolder(tmp_path / "run").opened(recipe), files_below(10):
            raise AntgmmError("no space left on the disk")

    with files_below(10_000), pytest.raises(AntgmmError, match=r"^no space left on the disk$"):
        end()


def test_the_state_of_a_run_on_a_read_only_disk_hides_no_error(recipe, tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/.lock")

    with RunFolder(tmp_path / "run").opened(recipe), monkeypatch.context() as patched:
        patched.setattr("filelock.FileLock._acquire", read_only)
        assert status_of(tmp_path / "run")["state"] == "running"


def test_errors_of_the_disk_reach_every_process_as_one_line(monkeypatch):
    assert disk_error(OSError(errno.ECONNRESET, "reset")) is None
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")
    assert str(disk_error(error)) == "/a/b: No space left on device; fix this and start again"

    def full():
        raise error

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("antgmm_jax.parallel.processes.broadcast_from_first", lambda sent: sent)
    with pytest.raises(AntgmmError, match="^/a/b: No space left on device"):
        run_on_first(full)
