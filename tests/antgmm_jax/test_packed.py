"""Arrays inside of records."""

import json

import ml_dtypes
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import books, checkpoint, files
from antgmm_jax.io.packed import LISTED, packed, unpacked


@pytest.mark.parametrize("dtype", [bool, np.int32, np.int64, np.float32, ">f4"])
def test_a_large_array_comes_back_bit_for_bit(dtype):
    array = (np.random.default_rng(0).standard_normal((LISTED, 3)) * 9).astype(dtype)[:, ::-1]
    values = json.loads(json.dumps({"keep": {"text/embed": packed(array)}, "seed": 1}))
    back = unpacked(values)
    assert back["seed"] == 1
    np.testing.assert_array_equal(back["keep"]["text/embed"], array)
    assert back["keep"]["text/embed"].dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), np.zeros(LISTED + 1, ml_dtypes.bfloat16)], ids=str)
def test_small_arrays_and_other_dtypes_are_lists(array):
    assert packed(array) == unpacked(packed(array)) == array.tolist()


@pytest.mark.parametrize(
    "change",
    [{"dtype": "object"}, {"shape": [3]}, {"shape": [-1]}, {"shape": "9"}, {"base64": "§"}, {"base64": 3}],
    ids=str,
)
def test_damaged_arrays_are_refused(change):
    whole = packed(np.zeros(LISTED + 1, np.float32))
    with pytest.raises(ValueError, match="array"):
        unpacked({"keep": {"text/embed": {**whole, **change}}})


def test_a_stage_with_the_basis_of_a_wide_model_is_read_again(tmp_path):
    """As lists of numbers, the record has over 32 MB: a finished stage was refused as damaged."""
    basis = np.random.default_rng(0).standard_normal((2048, 1024)).astype(np.float32)
    checkpoint.save_stage(tmp_path / "01-cut", {"w": np.zeros(1)}, {"keep": {"text/embed": basis}})
    assert (tmp_path / "01-cut/stage.json").stat().st_size < 1.4 * basis.nbytes
    assert checkpoint.is_complete(tmp_path / "01-cut")
    np.testing.assert_array_equal(checkpoint.load_record(tmp_path / "01-cut")["keep"]["text/embed"], basis)


def test_answers_with_many_brackets_are_read_again(tmp_path):
    answers = ["[{}]" * 10] * 10_000
    books.write_book(tmp_path / "answers.json", {"answers": answers})
    assert books.read_book(tmp_path / "answers.json")["answers"] == answers
    with pytest.raises(AntgmmError, match="has over 100000 lists and objects"):
        files.read_json(tmp_path / "answers.json")
