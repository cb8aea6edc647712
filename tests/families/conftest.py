"""Fixtures that run tests for each registered family: on all of its small shapes, or on the first."""

import pytest

from tests.families.cases import FIRST, SHAPES, Case, case_of


@pytest.fixture(scope="module", params=SHAPES, ids=" ".join)
def case(request, tmp_path_factory) -> Case:
    """Each shape of each family."""
    return case_of(*request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=FIRST, ids=" ".join)
def first(request, tmp_path_factory) -> Case:
    """One shape of each family, or of each of its language models."""
    return case_of(*request.param, tmp_path_factory.getbasetemp())
