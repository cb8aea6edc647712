"""Messages of errors: a stranger's names stay on their line."""

import copy

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError, memory_error


def test_line_breaks_in_names_are_escaped_and_lists_have_lines():
    error = AntgmmError("2 rows are invalid", "a\nerror: b", "c")
    assert str(error).split("\n") == ["2 rows are invalid", "a\\nerror: b", "c"]
    assert str(copy.copy(error)) == str(error)


def test_the_middle_of_a_long_line_is_left_out():
    line = str(AntgmmError("x" * 10_000_000 + ": correct it"))
    assert len(line) < 1100
    assert line.startswith("xxx") and line.endswith("x: correct it")


def test_memory_that_does_not_suffice_is_one_line_with_its_size():
    with pytest.raises(MemoryError) as caught:
        np.zeros(1 << 55, np.int64)
    assert str(memory_error(caught.value)).startswith("not enough memory for 256. PiB: choose a smaller batch")
    xla = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 25600000000 bytes.\n[tf-allocator]")
    assert str(memory_error(xla)).startswith("not enough memory for 25600000000 bytes: choose")
    assert str(memory_error(MemoryError())).startswith("not enough memory: choose")
    # What the other processes get.
    assert memory_error(AntgmmError("the first process failed: MemoryError: Unable to allocate 2. GiB")) is not None
    assert memory_error(RuntimeError("another")) is None
