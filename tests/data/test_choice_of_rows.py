"""Which rows of a file are records, and whether two sources share rows."""

import json
import shutil

import pytest

from antgmm_jax.errors import AntgmmError
from data.readers import read_records


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
