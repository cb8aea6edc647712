"""Fixtures that run tests for each registered family: on its first small shape, or on all (those after it are long)."""

import pytest

from tests.families.cases import FIRST, SHAPES, Case, case_of

_LONG = [pytest.param(one, marks=() if one in FIRST else pytest.mark.long, id=" ".join(one)) for one in SHAPES]


@pytest.fixture(scope="module", params=_LONG)
def case(request, tmp_path_factory) -> Case:
    """Each shape of each family; the first one of each also in `make test`."""
    return case_of(*request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=FIRST, ids=" ".join)
def first(request, tmp_path_factory) -> Case:
    """One shape of each family, or of each of its language models."""
    return case_of(*request.param, tmp_path_factory.getbasetemp())
