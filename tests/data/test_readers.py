"""Files of rows of any kind: which are read, their digests and their splits."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from data.readers import read_records
from data.writers import write_parquet
from tests.data.own_files import good, lines, picture, png, read


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("jsonl", "a.jsonl", b"", "has no rows"),
        ("jsonl", "a.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("jsonl", "a.json", b"{}", "not a JSON array"),
        ("jsonl", "a.json", b"[", "is not JSON"),
        ("parquet", "a.parquet", b"PAR1nothing", "not a readable Parquet file"),
        ("webdataset", "a.tar", b"nothing", "not a readable tar file"),
        ("csv", "a.csv", b"", "unknown kind of data 'csv'"),
    ],
)
def test_invalid_files_are_refused(tmp_path, kind, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AntgmmError, match=message):
        read(kind, tmp_path / name)


def test_folders_without_or_with_too_many_files_are_refused(tmp_path):
    with pytest.raises(AntgmmError, match="does not exist"):
        read("jsonl", tmp_path / "none")
    with pytest.raises(AntgmmError, match=r"contains no \.parquet file"):
        read("parquet", tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("{}")
    with pytest.raises(AntgmmError, match=r"a\.jsonl, b\.jsonl: specify one"):
        read("jsonl", tmp_path)


def test_a_pattern_selects_files(tmp_path):
    for name, rows in (("train-0", range(2)), ("train-1", range(2, 5)), ("test-0", range(1))):
        write_parquet([maad.source("s", "val", 5)[row] for row in rows], tmp_path / f"{name}.parquet")
    assert [len(read("parquet", tmp_path / name)) for name in ("train-*.parquet", "train-1*")] == [5, 3]
    with pytest.raises(AntgmmError, match=r"none-\*\.parquet matches no \.parquet file"):
        read("parquet", tmp_path / "none-*.parquet")


def test_a_digest_covers_rows_and_pictures(folder):
    file = lines(folder, good(0), good(1))
    pq.write_table(pa.table({"image": ["images/0.png"], "question": ["q"], "caption": ["a"]}), folder / "a.parquet")
    sources = {"jsonl": file, "parquet": folder / "a.parquet"}

    def digests():
        return {kind: read_records(kind, path).digest() for kind, path in sources.items()}

    before = digests()
    assert digests() == before
    (folder / "images" / "0.png").write_bytes(png(picture(2)))
    after = digests()
    assert all(after[kind] != before[kind] for kind in sources)
    lines(folder, good(0), good(1, text="more"))
    assert digests()["jsonl"] != after["jsonl"] and digests()["parquet"] == after["parquet"]


def test_the_splits_of_a_file_share_no_image_and_make_up_the_whole(folder):
    rows = [good(k % 2, id=f"{k}") | {"image": f"images/{k // 3}.png"} for k in range(300)]
    file = lines(folder, *rows)
    ids = {}
    for split in ("", "train", "test"):
        source = read_records("jsonl", file, split=split)
        words = [source.words(index) for index in range(len(source))]
        ids[split] = {row.id: row.images[0] for row in words}
    assert ids["train"] | ids["test"] == ids[""]
    assert not set(ids["train"].values()) & set(ids["test"].values())
    assert 10 <= len(ids["test"]) <= 60
    assert len({read_records("jsonl", file, split=split).digest() for split in ids}) == 3


def test_a_split_without_rows_is_named(folder):
    file = lines(folder, *(good(0, id=f"{k}") for k in range(3)))
    splits = [read_records("jsonl", file, split=split) for split in ("train", "test")]
    (empty,) = (source for source in splits if not len(source))
    with pytest.raises(AntgmmError, match=r"has no rows in its split '\w+': name other rows for it"):
        empty.check({})


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("vqa-train", "vqa-test"), "vqa-train"),
        (("train2014", "val2014"), "val2*"),
        (("dev-kit-train-00000-of-00001", "dev-kit-eval-00000-of-00001"), "dev-kit-train-*"),
        (("SET.Training_0", "SET.Validation_0"), "SET.Validation_*"),
    ],
)
def test_splits_are_found_at_any_place_of_a_name(tmp_path, names, pattern):
    for name in names:
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(AntgmmError, match="holds the splits") as caught:
        read_records("parquet", tmp_path)
    assert str(caught.value).endswith(f" such as {tmp_path / pattern}.parquet")


@pytest.mark.parametrize("names", [("contest-1", "latest-2"), ("trainer-0", "device-0"), ("a-train-0", "a-train-1")])
def test_files_of_one_split_are_read_together(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(AntgmmError, match="is not a readable Parquet file"):
        read_records("parquet", tmp_path)


def test_splits_of_a_folder_are_not_mixed(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(AntgmmError, match=r"holds the splits test, train, .* such as .*/train-\*\.parquet$"):
        read_records("parquet", tmp_path)
    with pytest.raises(AntgmmError, match=r"train-00000-of-00002\.parquet is not a readable Parquet file"):
        read_records("parquet", tmp_path / "train*.parquet")


def test_folders_below_are_named(tmp_path):
    (tmp_path / "data" / "en").mkdir(parents=True)
    (tmp_path / "data" / "en" / "a.parquet").touch()
    with pytest.raises(AntgmmError, match=r"has parquet files in folders: specify one, such as .*/data/en$"):
        read_records("parquet", tmp_path)


def test_a_file_without_valid_rows_is_not_read_to_its_end(folder):
    file = folder / "rows.jsonl"
    file.write_text('{"question": "what?"}\n' * 3000)
    with pytest.raises(AntgmmError) as refused:
        read_records("jsonl", file).check({})
    head, *rows = str(refused.value).split("\n")
    assert "1000 of 1000 rows are invalid" in head and len(rows) == 1000


def test_many_invalid_rows_are_counted_by_reason(folder):
    file = folder / "rows.jsonl"
    rows = [json.dumps(good())] + ['{"question": "what?", "image": []}'] * 1005 + ["{}"]
    file.write_text("\n".join(rows))
    with pytest.raises(AntgmmError) as refused:
        read_records("jsonl", file).check({})
    assert str(refused.value).split("\n")[1001:] == ["5 further rows: has no answer", "1 further rows: has no image"]


def test_a_json_file_with_an_object_on_each_line_is_read(folder):
    """`datasets` writes lines into a file of that name."""
    file = folder / "rows.json"
    file.write_text(f"{json.dumps(good())}\n{json.dumps(good(1))}\n")
    records = read_records("jsonl", file)
    assert [records.words(row).id for row in range(len(records))] == ["line 1", "line 2"]
    file.write_text(f"{json.dumps(good())}\n")
    with pytest.raises(AntgmmError, match="is not a JSON array of rows"):
        read_records("jsonl", file)


def test_a_compressed_file_is_named(folder):
    (folder / "rows.jsonl").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(AntgmmError, match="is compressed: gunzip it"):
        read_records("jsonl", folder / "rows.jsonl")
