"""Checkpoints cut on disk, tensor by tensor: the bytes that are read, and damaged files."""

import jax
import pytest
import torch

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf, open_hf, save_hf
from antgmm_jax.pure import local_axes
from pruning import plan, random, shrink, shrink_hf
from tests import reference


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint as `transformers` writes it, in bfloat16."""
    model = reference.llava(seed=3).to(torch.bfloat16)
    return reference.saved(model, tmp_path_factory.mktemp("llava") / "source")


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def drawn(config, targets):
    return plan(random(jax.random.key(1), sizes(config), local_axes(config)), config, targets)


def test_kept_tensors_are_read_once_and_dropped_ones_never(tmp_path, written):
    read = []
    config, params = open_hf(written, on_read=read.append)
    assert read == []
    keep = drawn(config, {"vision/layers": 1, "text/layers": 1})
    save_hf(*shrink(config, params, keep), tmp_path / "out")
    # Only whole layers are dropped, so the bytes read equal the bytes written.
    _, cut = load_hf(tmp_path / "out")
    assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(cut))


def test_a_damaged_tensor_is_named_and_nothing_is_written(tmp_path, written):
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files(written).items():
        (source / name).write_bytes(content)
    weights = source / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xff\x7f")  # a NaN in bfloat16
    config, _ = open_hf(source)
    with pytest.raises(AntgmmError, match=r"tensor .* contains NaN"):
        shrink_hf(source, drawn(config, {"vision/mlp": 9}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
