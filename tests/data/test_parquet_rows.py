"""Rows of Parquet files."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from data import parquet_rows
from data.readers import read_records
from data.writers import write_parquet
from tests.data.own_files import picture, png, read


def test_parquet_round_trip(tmp_path):
    source, seen = maad.source("s", "val", 700), []
    write_parquet(source, tmp_path / "val.parquet", progress=lambda *step: seen.append(step))
    records = read("parquet", tmp_path)
    assert seen == [("val.parquet", 512, 700), ("val.parquet", 700, 700)]
    assert len(records) == 700
    for row in (0, 511, 512, 699):
        before, after = source[row], records[row]
        np.testing.assert_array_equal(after.images[0], before.images[0])
        for name in ("question", "answer", "text", "type", "id", "slice"):
            assert getattr(after, name) == getattr(before, name)
        assert after.latents == before.latents
    described = json.loads(pq.read_schema(tmp_path / "val.parquet").metadata[b"huggingface"])
    assert described["info"]["features"]["image"] == {"_type": "Image"}


def test_parquet_with_paths_and_plain_bytes(folder):
    for name, value in (("path", "images/1.png"), ("bytes", png(picture(1)))):
        file = folder / f"{name}.parquet"
        pq.write_table(pa.table({"image": [value], "question": ["q"], "caption": ["a"], "other": [1]}), file)
        (record,) = read("parquet", file)
        np.testing.assert_array_equal(record.images[0], picture(1))
    bad = folder / "bad.parquet"
    pq.write_table(pa.table({"image": [value] * 2, "question": ["q", ""], "caption": ["a"] * 2}), bad)
    with pytest.raises(AntgmmError, match=r"bad\.parquet row 2: question is empty"):
        read("parquet", bad)


def test_rows_of_parquet_are_read_by_group(tmp_path, monkeypatch):
    source, read_group = maad.source("s", "val", 9), pq.ParquetFile.read_row_group
    for name, rows in (("a", range(5)), ("b", range(5, 9))):
        write_parquet([source[row] for row in rows], tmp_path / f"{name}.parquet")
    for file in tmp_path.iterdir():
        pq.write_table(pq.read_table(file), file, row_group_size=2)
    read_groups = []

    def counted(self, group, columns):
        read_groups.append(group)
        return read_group(self, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    records = read_records("parquet", tmp_path)
    assert len(records) == 9 and read_groups == [0, 1, 2, 0, 1]
    for row in (8, 7, 4, 5, 0, 1, 0):
        np.testing.assert_array_equal(records[row].images[0], source[row].images[0])
        assert records.words(row).id == source.words(row).id
    assert len(read_groups) < 5 + 7


@pytest.mark.parametrize(("most", "reads"), [(1 << 20, 5), (0, 15)])
def test_row_groups_are_kept_within_a_number_of_bytes(tmp_path, monkeypatch, most, reads):
    monkeypatch.setattr(parquet_rows, "_KEPT_BYTES", most)
    columns = {"image": [[]] * 10, "question": [f"{n}?" for n in range(10)], "answer": ["yes"] * 10}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    table, read_group, numbers = parquet_rows.ParquetRows([tmp_path / "a.parquet"]), parquet_rows._read_group, []
    monkeypatch.setattr(parquet_rows, "_read_group", lambda *about: numbers.append(about[2]) or read_group(*about))
    for row in [0, 2, 4, 6, 8] * 3:
        assert table[row]["question"] == f"{row}?"
    assert len(numbers) == reads
    assert len(table._kept) == (5 if most else 2)
