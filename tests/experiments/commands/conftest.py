"""A teacher for commands."""

import pytest

from tests import reference


@pytest.fixture
def teacher(tmp_path):
    return reference.saved(reference.blip2(), tmp_path / "teacher")
