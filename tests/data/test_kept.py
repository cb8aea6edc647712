"""Results of scans are read from disk until a file changes."""

import os

import numpy as np
import pytest

from data import kept as module
from data.kept import from_bytes, kept, to_bytes


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED", -1.0)
    path = tmp_path / "rows"
    path.write_text("abc")
    return path


def scans(file, about="scan"):
    """Result of a scan that returns the file's content, and how often it ran."""
    runs = []

    def scan():
        runs.append(1)
        return {"content": np.array(file.read_text())}

    return str(kept(about, [file], scan)["content"]), len(runs)


def test_a_scan_runs_once_and_again_after_a_change(file):
    assert [scans(file), scans(file)] == [("abc", 1), ("abc", 0)]
    assert scans(file, "another scan") == ("abc", 1)
    status = file.stat()
    file.write_text("abd")  # of the same size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [scans(file), scans(file)] == [("abd", 1), ("abd", 0)]
    other = file.with_name("copy")
    file.rename(other)
    file.write_text("abd")
    assert scans(file) == ("abd", 1)


def test_a_file_that_changed_a_moment_ago_is_scanned_again(file, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", 60.0)
    assert [scans(file), scans(file)] == [("abc", 1), ("abc", 1)]


def test_a_damaged_result_is_replaced_and_a_full_disk_ignored(file, tmp_path, monkeypatch):
    scans(file)
    (place,) = (tmp_path / "cache").rglob("*.npz")
    place.write_bytes(place.read_bytes()[:40])
    assert [scans(file), scans(file)] == [("abc", 1), ("abc", 0)]
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert scans(file, "not stored") == ("abc", 1)
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    monkeypatch.setattr(module, "FOLDER_BYTES", place.stat().st_size)
    scans(file, "the newest")
    assert len([*place.parent.iterdir()]) == 1


def test_names_come_back_in_order_without_duplicates():
    assert from_bytes(to_bytes(["b", "a\udcff", "b", ""])) == ["b", "a\udcff", ""]
    assert from_bytes(to_bytes([])) == []
