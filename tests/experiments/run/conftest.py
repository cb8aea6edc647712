"""The rows of a user."""

import pytest

import data.maad as maad
from data.writers import write_jsonl


@pytest.fixture
def ads(tmp_path, monkeypatch):
    """The working folder; it holds `ads/train.jsonl`, `ads/test.jsonl` and pictures."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for split, rows in (("train", 24), ("test", 8)):
        write_jsonl(maad.source("s", split, rows), tmp_path / "ads" / f"{split}.jsonl")
    return tmp_path
