"""Which rows of a file are records, and whether two sources share rows."""

import io
import json
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from antgmm_jax.errors import AntgmmError
from data.readers import read_records
from tests.data.own_files import picture, png


@pytest.fixture
def rows(tmp_path):
    """Ten rows, sorted by type, one of them invalid."""
    kinds = ["a"] * 5 + ["b"] * 5
    lines = [{"image": [], "question": f"{n}?", "answer": "yes", "type": kind} for n, kind in enumerate(kinds)]
    lines[2] = {"image": [], "question": "no answer"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def questions(source):
    return "".join(source.words(row).question.rstrip("?") for row in range(len(source)))


def test_spread_rows_are_at_equal_distances_among_the_valid_ones(rows):
    assert questions(read_records("jsonl", rows)) == "013456789"
    assert questions(read_records("jsonl", rows, most=3)) == "013"
    assert questions(read_records("jsonl", rows, most=3, spread=True)) == "059"
    assert questions(read_records("jsonl", rows, most=9, spread=True)) == "013456789"
    with pytest.raises(AntgmmError, match="1 of 10 rows are invalid"):
        read_records("jsonl", rows, most=3, spread=True).check({})
    rows.write_text("".join(line for line in rows.read_text().splitlines(keepends=True) if "no answer" not in line))
    with pytest.raises(AntgmmError, match="has 9 records, but samples = 10: reduce samples"):
        read_records("jsonl", rows, most=10, spread=True).check({})
    first, spread = (read_records("jsonl", rows, most=3, spread=spread) for spread in (False, True))
    assert first.digest() != spread.digest()


def test_sources_of_equal_files_overlap_unless_their_splits_exclude_each_other(rows, tmp_path):
    copy = shutil.copy(rows, tmp_path / "copy.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("9?", "10?"))
    whole = read_records("jsonl", rows)
    assert whole.overlaps(read_records("jsonl", copy, most=3, spread=True))
    assert read_records("jsonl", rows, split="train").overlaps(read_records("jsonl", copy))
    assert not whole.overlaps(read_records("jsonl", other))
    parts = (read_records("jsonl", file, split=split) for file, split in ((rows, "train"), (copy, "test")))
    assert not next(parts).overlaps(next(parts))


def parquet(file, rows, **more):
    columns = {"image": [[]] * rows, "question": [f"{n}?" for n in range(rows)], "answer": ["yes"] * rows}
    pq.write_table(pa.table({**columns, **more}), file)
    return file


def test_a_copy_of_a_parquet_file_is_noticed_among_others(tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    parquet(folders[0] / "train-0.parquet", 3)
    first = parquet(folders[0] / "train-1.parquet", 4)
    shutil.copyfile(first, folders[1] / "test.parquet")
    train, test = (read_records("parquet", folder) for folder in folders)
    assert train.overlaps(test) and test.overlaps(train)
    assert train.overlaps(read_records("parquet", first))
    other = parquet(tmp_path / "other.parquet", 4, answer=["no!"] * 4)  # of the same size
    assert other.stat().st_size == first.stat().st_size
    assert not train.overlaps(read_records("parquet", other))
    splits = (read_records("parquet", file, split=split) for file, split in ((first, "train"), (test.path, "test")))
    assert not next(splits).overlaps(next(splits))


def test_only_parquet_files_of_equal_sizes_are_read_for_their_contents(tmp_path, monkeypatch):
    files = [parquet(tmp_path / f"{rows}.parquet", rows) for rows in (3, 400)]
    sources = [read_records("parquet", file) for file in files]
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("reads a file of another size"))
    assert not sources[0].overlaps(sources[1])


def test_equal_parquet_files_with_other_pictures_do_not_overlap(tmp_path):
    for name in "ab":
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "0.png").write_bytes(png(picture(ord(name))))
        parquet(tmp_path / name / "rows.parquet", 1, image=["images/0.png"])
    a, b = (read_records("parquet", tmp_path / name) for name in "ab")
    assert not a.overlaps(b)
    copy = shutil.copyfile(tmp_path / "a" / "rows.parquet", tmp_path / "a" / "copy.parquet")
    assert a.overlaps(read_records("parquet", copy))


def test_a_copy_of_a_shard_is_noticed(tmp_path):
    for name in ("a/train.tar", "b/test.tar"):
        (tmp_path / name).parent.mkdir()
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, content in (("0.png", png(picture())), ("0.json", b'{"question": "q", "answer": "a"}')):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    train, test = (read_records("webdataset", tmp_path / name) for name in "ab")
    assert train.overlaps(test)
