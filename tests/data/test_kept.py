"""Results of scans are read from disk until a file changes."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import kept as module
from data.kept import from_bytes, kept, to_bytes
from data.readers import read_records


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
    whole = place.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for byte, value in ((6, 99), (8, 1), (10, 99)):  # version, encrypted, method of compression
        place.write_bytes(whole[: directory + byte] + bytes([value]) + whole[directory + byte + 1 :])
        assert [scans(file), scans(file)] == [("abc", 1), ("abc", 0)]
    np.savez(place, names=np.array(["content"]))  # without its column
    assert [scans(file), scans(file)] == [("abc", 1), ("abc", 0)]
    np.save(place.with_suffix(""), np.zeros(3))
    place.with_suffix(".npy").rename(place)
    assert [scans(file), scans(file)] == [("abc", 1), ("abc", 0)]
    place.unlink()
    os.mkfifo(place)
    assert [scans(file), scans(file)] == [("abc", 1), ("abc", 0)]
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert scans(file, "not stored") == ("abc", 1)
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    monkeypatch.setattr(module, "FOLDER_BYTES", place.stat().st_size)
    scans(file, "the newest")
    assert len([*place.parent.iterdir()]) == 1


def files_of(kind, folder):
    """Three rows of a kind of files."""
    rows = [{"image": f"{row}.png", "question": "what?", "answer": f"red {row}", "id": f"{row}"} for row in range(3)]
    pictures = []
    for row in range(3):
        Image.new("RGB", (4, 5), (row, 0, 0)).save(folder / f"{row}.png")
        pictures.append((folder / f"{row}.png").read_bytes())
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "rows.jsonl"
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows))
        return folder / "rows.json"
    if kind == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), folder / "rows.parquet")
        return folder / "rows.parquet"
    with tarfile.open(folder / "rows.tar", "w") as archive:
        for row, picture in zip(rows, pictures, strict=True):
            for suffix, content in ((".png", picture), (".json", json.dumps({**row, "image": None}).encode())):
                info = tarfile.TarInfo(row["id"] + suffix)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return folder / "rows.tar"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "webdataset"])
def test_each_kind_of_files_is_scanned_once(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED", -1.0)
    (tmp_path / "rows").mkdir()
    path = files_of(kind, tmp_path / "rows")

    def opened():
        source = read_records("jsonl" if kind == "json" else kind, path)
        pictures = [record.images[0][0, 0, 0] for record in source]
        return source.digest(), len(source), [source.words(row).answer for row in range(3)], pictures

    first = opened()
    assert first[1:] == (3, ["red 0", "red 1", "red 2"], [0, 1, 2])
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("scanned again"))
    assert opened() == first


def test_a_column_may_have_any_name(file):
    columns = {"file": np.arange(3), "allow_pickle": np.zeros(2)}
    for _ in range(2):
        result = kept("names", [file], lambda: columns)
        assert result.keys() == columns.keys()
        np.testing.assert_array_equal(result["file"], columns["file"])


def test_names_come_back_in_order_without_duplicates():
    assert from_bytes(to_bytes(["b", "a\udcff", "b", ""])) == ["b", "a\udcff", ""]
    assert from_bytes(to_bytes([])) == []
