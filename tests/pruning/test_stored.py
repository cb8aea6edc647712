"""Checkpoints cut on disk, tensor by tensor: the files are those of the cut in memory, and so are the scores."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antgmm_jax.axes import sizes
from antgmm_jax.convert import load_hf, open_hf, save_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import local_axes
from pruning import identity, magnitude, plan, random, shrink, shrink_hf
from tests import reference
from tests.pruning.models import CONFIGS, parameters
from tests.pruning.strategies import keeps
from tests.pruning.test_export import CUTS
from tests.pruning.test_law import ALONE, HALF


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints as `transformers` writes them, in bfloat16, with a file to carry along."""
    made = {}
    for family in ("blip2", "llava"):
        model = getattr(reference, family)(seed=3).to(torch.bfloat16)
        made[family] = reference.saved(model, tmp_path_factory.mktemp(family) / "source")
        (made[family] / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The small models of odd shapes, as checkpoints."""
    made = {family: tmp_path_factory.mktemp(family) / "source" for family in CONFIGS}
    for family, directory in made.items():
        save_hf(CONFIGS[family], parameters(family), directory)
    return made


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def drawn(config, targets):
    return plan(random(jax.random.key(1), sizes(config), local_axes(config)), config, targets)


@pytest.mark.parametrize(("family", "targets"), CUTS.values(), ids=CUTS)
def test_a_cut_on_disk_is_the_cut_in_memory_bit_for_bit(tmp_path, written, family, targets):
    source = written[family]
    config, params = load_hf(source)
    keep = drawn(config, targets)
    smaller, cut = shrink(config, params, keep)
    save_hf(smaller, cut, tmp_path / "memory", like=source, max_shard_size="10KB")
    assert shrink_hf(source, keep, tmp_path / "disk", max_shard_size="10KB") == smaller
    assert files(tmp_path / "disk") == files(tmp_path / "memory")
    assert {"tokenizer.json", "model.safetensors.index.json"} < set(files(tmp_path / "disk"))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("counts", [ALONE, HALF], ids=["odd", "half"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_cut_reads_the_same_from_disk(ours, family, counts, data):
    """Also shapes that no family serves, which `save_hf` would refuse; a cut of a cut as well."""
    keep = data.draw(keeps(CONFIGS[family], counts[family]))
    first, memory = shrink(CONFIGS[family], parameters(family), keep)
    again, disk = shrink(*open_hf(ours[family]), keep)
    assert again == first
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, disk), memory)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), disk) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), memory
    )
    deeper = {axis: index[..., -1:] for axis, index in identity(first).items() if axis.endswith("/mlp")}
    expected, got = shrink(first, memory, deeper)[1], shrink(first, disk, deeper)[1]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, got), expected)


@pytest.mark.parametrize("family", ["blip2", "llava"])
def test_magnitude_on_disk_is_that_of_the_same_arrays_in_memory(written, family):
    config, stored = open_hf(written[family])
    scores, expected = magnitude(stored, config), magnitude(load_hf(written[family])[1], config)
    assert set(scores) == set(sizes(config))
    for axis, score in expected.items():
        np.testing.assert_allclose(scores[axis], score, rtol=1e-6, err_msg=axis)


def test_what_is_dropped_is_not_read_and_what_is_kept_is_read_once(tmp_path, written):
    read = []
    config, params = open_hf(written["llava"], on_read=read.append)
    assert read == []
    keep = drawn(config, {"vision/layers": 1, "text/layers": 1})
    save_hf(*shrink(config, params, keep), tmp_path / "out")
    # Whole layers go: what was read is what is written.
    _, cut = load_hf(tmp_path / "out")
    assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(cut))


def test_a_tensor_that_is_damaged_is_named_and_nothing_is_left(tmp_path, written):
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files(written["llava"]).items():
        (source / name).write_bytes(content)
    weights = source / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xff\x7f")  # a NaN in bfloat16
    config, _ = open_hf(source)
    with pytest.raises(AntgmmError, match=r"tensor .* holds a NaN"):
        shrink_hf(source, drawn(config, {"vision/mlp": 9}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
