"""Files of object stores, against fsspec's store in memory: copies, what is new, and errors in one line."""

import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import stores
from antgmm_jax.io.books import read_book, write_book
from antgmm_jax.io.convert import load_hf
from data.readers import read_records
from tests import reference
from tests.data.own_files import picture, png


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An empty store in memory, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = MemoryFileSystem()
    memory.store.clear()
    yield memory
    memory.store.clear()


ROW = b'{"image": "images/1.png", "question": "which?", "answer": "this"}\n'


def test_rows_and_their_pictures_are_read_from_a_store(bucket, tmp_path):
    bucket.pipe({"/b/text/rows.jsonl": ROW, "/b/text/images/1.png": png(picture(1)), "/b/text/run.py": b"raise"})
    records = read_records("jsonl", "memory://b/text/rows.jsonl")
    np.testing.assert_array_equal(records[0].images[0], picture(1))
    copies = [path.name for path in (tmp_path / "cache").rglob("*.*")]
    assert "rows.jsonl" in copies and "run.py" not in copies


def test_a_changed_file_is_copied_again_and_others_are_not(bucket, monkeypatch):
    copied, get_file = [], MemoryFileSystem.get_file

    def counted(self, source, *arguments, **options):
        copied.append(source.rsplit("/", 1)[1])
        return get_file(self, source, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    bucket.pipe({f"/b/{name}.parquet": b"old" for name in "xy"})
    assert stores.local("memory://b/*.parquet", ("*.parquet",)).name == "*.parquet"
    bucket.pipe("/b/y.parquet", b"new")
    folder = stores.local("memory://b", ("*.parquet",))
    assert copied == ["x.parquet", "y.parquet", "y.parquet"]
    assert (folder / "y.parquet").read_bytes() == b"new"


def test_copies_of_files_that_the_store_has_removed_are_removed(bucket):
    """An old index of shards would be read instead of the one file of weights, old shards beside the new ones."""
    old = ("model.safetensors.index.json", "train-0-of-1.parquet", "train.txt", "code.json")
    bucket.pipe({f"/b/{name}": b"old" for name in old})
    stores.local("memory://b", ("*.json", "*.parquet", "*.txt"))
    bucket.rm("/b", recursive=True)
    bucket.pipe({"/b/model.safetensors": b"new", "/b/train-0-of-2.parquet": b"new"})
    folder = stores.local("memory://b", ("*.safetensors", "*.json"), skipped=("code.*",))

    def names():
        return {path.name for path in folder.iterdir()} - {".stamps.json"}

    assert names() == {"model.safetensors", "train-0-of-1.parquet", "train.txt", "code.json"}
    stores.local("memory://b/train-*.parquet", ("*.parquet",))
    assert names() == {"model.safetensors", "train-0-of-2.parquet", "train.txt", "code.json"}


def test_a_record_of_copies_that_names_files_elsewhere_removes_none(bucket, tmp_path):
    bucket.pipe("/b/a.json", b"{}")
    folder = stores.local("memory://b", ("*.json",))
    mine = [tmp_path / "mine.json", folder.parent / "mine.json"]
    for path in mine:
        path.write_text("mine")
    write_book(folder / ".stamps.json", {str(mine[0]): "", "../mine.json": ""})
    stores.local("memory://b", ("*.json",))
    assert all(path.exists() for path in mine)
    assert read_book(folder / ".stamps.json").keys() == {"a.json"}


def test_a_name_that_leads_out_of_the_cache_is_refused_and_nothing_is_copied(bucket, tmp_path):
    bucket.store.clear()
    bucket.pipe({"/b/a.json": b"{}", "/b/x/../../../mine.json": b"theirs"})
    with pytest.raises(
        AntgmmError, match=r"^memory://b/x/\.\./\.\./\.\./mine\.json would be written outside of .*: rename it"
    ):
        stores.local("memory://b", ("*.json",))
    assert not [*tmp_path.rglob("*.json")]


def test_a_checkpoint_is_read_from_a_store(bucket, tmp_path):
    folder = reference.saved(reference.llava(), tmp_path / "model")
    bucket.pipe({f"/b/model/{path.name}": path.read_bytes() for path in folder.iterdir()})
    bucket.pipe({"/b/model/old/config.json": b"{", "/b/model/code.py": b"raise"})
    config, params = load_hf("memory://b/model")
    expected_config, expected = load_hf(folder)
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://b/none", "memory://b/none: there is no such file or folder"),
        ("memory://b/none.json", "memory://b/none.json: there is no such file or folder"),
        ("nosuch://b/x", r"nosuch://b/x: Protocol not known: nosuch: use gs://, s3:// or"),
        ("dropbox://b/x", r"dropbox://b/x: .*\(pip install 'fsspec\[dropbox\]'\)"),
    ],
)
def test_a_store_without_the_files_is_refused_in_one_line(bucket, url, reason):
    bucket.pipe("/b/other.json", b"{}")
    with pytest.raises(AntgmmError, match=f"^{reason}[^\n]*$"):
        stores.local(url, ("*.json",))


def test_a_lost_store_is_reported_in_one_line(bucket, monkeypatch):
    def lost(*_, **__):
        raise ConnectionResetError("connection reset\nby peer")

    monkeypatch.setattr(MemoryFileSystem, "find", lost)
    with pytest.raises(AntgmmError, match=r"^cannot read memory://b \(connection reset by peer\): check the name"):
        stores.local("memory://b", ("*.json",))


def test_a_full_disk_leaves_no_half_file(bucket, monkeypatch):
    def full(self, source, target, **_):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    bucket.pipe("/b/a.json", b"whole")
    with pytest.raises(AntgmmError, match=r"^cannot write .*a\.json: No space left on device; free disk space"):
        stores.local("memory://b", ("*.json",))
    monkeypatch.undo()
    assert (stores.local("memory://b", ("*.json",)) / "a.json").read_bytes() == b"whole"


def test_paths_are_not_urls(tmp_path):
    for path in (tmp_path, "hf:org/name", "C:/models", "runs/a"):
        assert not stores.is_url(path)
    assert stores.is_url("gs://bucket/model")
