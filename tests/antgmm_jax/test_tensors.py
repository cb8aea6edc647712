"""Safetensors files as they are written here against the library's own, and what opening a checkpoint reads."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from antgmm_jax.convert import load_hf, open_hf
from antgmm_jax.tensors import Spec, write
from tests import reference


def arrays():
    rng = np.random.default_rng(0)
    names = ("z.bias", "a.weight", "m.scale", "b.table", "k")
    dtypes = (np.float32, ml_dtypes.bfloat16, np.float16, np.float32, np.float64)
    shapes = ((3,), (2, 5), (7,), (4, 1, 2), (2, 2))
    return {n: rng.normal(size=s).astype(d) for n, d, s in zip(names, dtypes, shapes, strict=True)}


def specs(tensors):
    return {name: Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_is_the_librarys_own_byte_for_byte(tmp_path, order):
    tensors = arrays()
    write(specs(tensors), [*tensors.items()][::order], tmp_path, "5GB")
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_shards_hold_each_tensor_once(tmp_path):
    tensors = arrays()
    write(specs(tensors), tensors.items(), tmp_path, "0.03KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"a is float32\(3,\)"):
        write({"a": Spec((4,), np.dtype(np.float32))}, [("a", np.zeros(3, np.float32))], tmp_path, "5GB")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_where_the_file_says_so_or_repeats_the_table(tmp_path, tied, scaled):
    reference.saved(reference.blip2(tied=tied, scaled=scaled).to(torch.bfloat16), tmp_path / "model")
    read = []
    assert open_hf(tmp_path / "model", on_read=read.append)[0].language.tied == tied
    assert load_hf(tmp_path / "model")[0].language.tied == tied
    assert read == []
