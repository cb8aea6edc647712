"""Marks of parameters."""

import pytest


def long(*values):
    """Returns a parameter set that `make test` leaves out and `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.long)
