"""Written safetensors files equal the library's; opening a checkpoint reads no tensors."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf, open_hf
from antgmm_jax.io.tensors import Spec, Tensors, _finite, write
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
def test_files_equal_the_librarys_byte_for_byte(tmp_path, order):
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


def test_a_tensor_that_does_not_fit_its_spec_is_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"a is float32\(3,\)"):
        write({"a": Spec((4,), np.dtype(np.float32))}, [("a", np.zeros(3, np.float32))], tmp_path, "5GB")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_by_the_config_or_by_equal_tensors(tmp_path, tied, scaled):
    reference.saved(reference.blip2(tied=tied, scaled=scaled).to(torch.bfloat16), tmp_path / "model")
    read = []
    assert open_hf(tmp_path / "model", on_read=read.append)[0].language.tied == tied
    assert load_hf(tmp_path / "model")[0].language.tied == tied
    assert read == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.filterwarnings("ignore:invalid value encountered in isfinite")  # NumPy's, of signalling NaNs
def test_finite_agrees_with_numpy_for_all_16_bit_values(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = [_finite(every[i : i + 1]) for i in range(len(every))]
    np.testing.assert_array_equal(finite, np.isfinite(every))
    assert _finite(every[np.isfinite(every)]) and not _finite(every)


def test_only_the_requested_rows_are_read(tmp_path):
    tensors = {"a": np.arange(12, dtype=np.float32).reshape(6, 2), "b": np.arange(5, dtype=np.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    read = []
    tensors_on_disk = Tensors(tmp_path, ((r"^b$", "c"),), read.append)
    np.testing.assert_array_equal(tensors_on_disk.read("a", 1, 3), tensors["a"][2:4])
    np.testing.assert_array_equal(tensors_on_disk.read("c"), tensors["b"])
    assert read == [16, 10]
    assert tensors_on_disk.equal("a", "a") and not tensors_on_disk.equal("a", "c")


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, ml_dtypes.float8_e4m3fn])
def test_numbers_of_other_types_are_refused(tmp_path, dtype):
    save_file({"a": np.ones((2, 2), dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(AntgmmError, match=r"model\.safetensors: tensor a is .*: convert the checkpoint to F64, F32"):
        Tensors(tmp_path, ()).spec("a")


@pytest.mark.parametrize("shape", [(), (0,)])
def test_a_scalar_or_an_empty_tensor_has_a_shape(tmp_path, shape):
    save_file({"a": np.zeros(shape, np.float32), "b": np.zeros(shape, np.float32)}, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path, ())
    assert tensors.spec("a").shape == shape
    assert tensors.equal("a", "b")


def test_a_tensor_in_two_shards_must_be_equal(tmp_path):
    for file, value in (("a.safetensors", 0), ("b.safetensors", 1)):
        save_file({"w": np.full(3, value, np.float32)}, tmp_path / file)
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AntgmmError, match=r"b\.safetensors: tensor w is also in a\.safetensors, and they differ"):
        Tensors(tmp_path, ())


def test_a_file_cut_short_while_it_is_open_is_named(tmp_path):
    save_file({"a": np.zeros(6, np.float32)}, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path, ())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    with pytest.raises(AntgmmError, match="tensor a cannot be read"):
        tensors.read("a")
