"""Fixtures of tests of rows."""

import pytest

from tests.data.own_files import picture, png


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures."""
    (tmp_path / "images").mkdir()
    for k in range(2):
        (tmp_path / "images" / f"{k}.png").write_bytes(png(picture(k)))
    return tmp_path
