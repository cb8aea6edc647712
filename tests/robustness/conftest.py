"""A disk that fails."""

import pytest

from tests.robustness.mounts import Disk


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = Disk(place)
    except PermissionError as error:
        pytest.skip(str(error))
    yield mounted
    mounted.unmount()
