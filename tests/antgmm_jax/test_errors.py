"""Messages of errors: a stranger's names stay on their line."""

import copy

from antgmm_jax.errors import AntgmmError


def test_line_breaks_in_names_are_escaped_and_lists_have_lines():
    error = AntgmmError("2 rows are invalid", "a\nerror: b", "c")
    assert str(error).split("\n") == ["2 rows are invalid", "a\\nerror: b", "c"]
    assert str(copy.copy(error)) == str(error)


def test_the_middle_of_a_long_line_is_left_out():
    line = str(AntgmmError("x" * 10_000_000 + ": correct it"))
    assert len(line) < 1100
    assert line.startswith("xxx") and line.endswith("x: correct it")
