"""Rows of bytes in several files: a file that is missing, foreign or damaged is one line."""

import os
import re

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.shards import Shards, Writer


@pytest.fixture
def folder(tmp_path):
    """Six rows in three files, with numbers that are not in order."""
    writer = Writer(tmp_path, 0)
    for rows in ([4, 1], [0, 5], [2, 3]):
        for row in rows:
            writer.add(row, b"row %d" % row)
        writer.flush()
    return tmp_path


def file(folder, number):
    return folder / f"00000-{number:05d}.array_record"


def refused(message, folder, samples=6):
    with pytest.raises(AntgmmError, match=f"{message}.*{re.escape(f'remove {folder.parent} and run it again')}$"):
        Shards(folder, samples, folder.parent)


def test_rows_are_found_by_their_numbers(folder):
    assert [Shards(folder, 6, folder)[row] for row in range(6)] == [b"row %d" % row for row in range(6)]


def test_a_missing_file_is_refused_or_its_rows_are_not_held(folder):
    file(folder, 1).unlink()
    refused("is damaged, a file is missing", folder)
    left = Shards(folder, 6)
    np.testing.assert_array_equal(left.held, [0, 1, 1, 1, 1, 0])
    with pytest.raises(IndexError, match="no row 5"):
        left[5]


def test_files_of_other_rows_are_refused(folder):
    refused(r"00000-00000\.array_record is damaged", folder, samples=4)
    writer = Writer(folder, 1)
    writer.add(-7, b"")
    writer.flush()
    refused(r"00001-00000\.array_record is damaged", folder)


def test_a_pipe_in_the_place_of_a_file_is_not_read(folder):
    file(folder, 2).unlink()
    os.mkfifo(file(folder, 2))
    with pytest.raises(AntgmmError, match="is not a regular file: replace it with one"):
        Shards(folder, 6)
