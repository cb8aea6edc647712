"""Fixtures that run tests for the shapes of the registered families; all but the quick ones are long.

`make test` computes logits of each family and of its cut (`every`), and runs the other tests on three shapes.
"""

from collections.abc import Collection, Sequence

import pytest

from tests.families.cases import FIRST, QUICK, SHAPES, Case, Shape, case_of


def _shapes(shapes: Sequence[Shape], quick: Collection[Shape]) -> list:
    return [pytest.param(one, marks=() if one in quick else pytest.mark.long, id=" ".join(one)) for one in shapes]


def _case(request, tmp_path_factory) -> Case:
    return case_of(*request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=_shapes(SHAPES, FIRST))
def every(request, tmp_path_factory) -> Case:
    """Each shape of each family; in `make test`, one or two of each."""
    return _case(request, tmp_path_factory)


@pytest.fixture(scope="module", params=_shapes(SHAPES, QUICK))
def case(request, tmp_path_factory) -> Case:
    """Each shape of each family; in `make test`, three of them."""
    return _case(request, tmp_path_factory)


@pytest.fixture(scope="module", params=_shapes(FIRST, QUICK))
def first(request, tmp_path_factory) -> Case:
    """One shape of each family, or of each of its language models; in `make test`, three of them."""
    return _case(request, tmp_path_factory)
