"""Checkpoints go to the devices tensor by tensor, in their own dtype and split over the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint, placed
from antgmm_jax.io.convert import load_hf, open_hf, save_hf
from antgmm_jax.io.placed import on_devices, on_first
from antgmm_jax.parallel import processes
from antgmm_jax.parallel.sharding import make_mesh, spec
from antgmm_jax.pure import functional, is_axes
from tests import reference

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model = reference.llava(seed=3).to(torch.bfloat16)
    return reference.saved(model, tmp_path_factory.mktemp("llava") / "source")


def with_axes(config, tree):
    names = jax.tree.leaves(functional(config).axes, is_leaf=is_axes)
    return zip(jax.tree.leaves(tree), names, strict=True)


@pytest.mark.parametrize("whole", [0, placed.WHOLE])
@pytest.mark.parametrize("mesh", [None, MESH])
def test_stored_parameters_arrive_bit_for_bit_and_split(written, monkeypatch, whole, mesh):
    """Layer by layer and as a whole, with and without a mesh."""
    monkeypatch.setattr(placed, "WHOLE", whole)
    config, stored = open_hf(written)
    expected = jax.tree.map(np.asarray, stored)
    if mesh is None:
        params = on_devices(config, stored)
    else:
        with jax.set_mesh(make_mesh(**mesh)):
            params = on_devices(config, stored)
            for leaf, names in with_axes(config, params):
                where = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(names, leaf.shape))
                assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    jax.tree.map(np.testing.assert_array_equal, load_hf(written)[1], expected)


def test_a_layer_at_a_time_is_on_the_host(written, monkeypatch):
    """With stacks read by layer, no read is larger than the largest layer or unstacked tensor."""
    monkeypatch.setattr(placed, "WHOLE", 0)
    read = []
    config, stored = open_hf(written, on_read=read.append)
    monkeypatch.setattr(placed.Stored, "__array__", lambda leaf, *_, **__: pytest.fail(f"all of {leaf.shape} is read"))
    stacks = stored["language"]["decoder"]["blocks"]["mlp"]
    names = functional(config).axes["language"]["decoder"]["blocks"]["mlp"]
    for name, leaf in stacks.items():
        placed.placed(leaf, names[name], dtype="float32")
    assert max(read) == max(leaf.nbytes // leaf.shape[0] for leaf in stacks.values())


def test_split_parameters_reach_the_host_a_tensor_at_a_time(written, tmp_path, monkeypatch):
    """For the first device and for files: no more than one layer, or one array without layers, is gathered."""
    gathered, gather = [], processes.gather
    monkeypatch.setattr(processes, "gather", lambda leaf: gathered.append(leaf.size) or gather(leaf))
    config, stored = open_hf(written)
    with jax.set_mesh(make_mesh(**MESH)):
        split = on_devices(config, stored, "float32")
        whole = on_first(config, split, "bfloat16")
        save_hf(config, split, tmp_path / "out", like=written, dtype="bfloat16")
    assert {leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(whole)} == {True}
    assert max(gathered) == max(leaf.size // (leaf.shape[0] if leaf.stacked else 1) for leaf in jax.tree.leaves(stored))
    for again in (whole, open_hf(tmp_path / "out")[1]):
        jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, stored))


def test_the_other_processes_are_not_left_waiting_after_an_error(monkeypatch):
    """The first process computes the items that its function did not take, as the others do."""
    computed = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "broadcast_from_first", lambda tree: tree)

    def fails(items):
        next(items)
        raise AntgmmError("the disk is full")

    with pytest.raises(AntgmmError, match="the disk is full"):
        processes.run_on_first_with((computed.append(number) for number in range(3)), fails)
    assert computed == [0, 1, 2]


def test_the_other_processes_are_not_left_waiting_if_the_first_device_is_full(written, monkeypatch):
    gathered, gather = [], processes.gather
    monkeypatch.setattr(processes, "gather", lambda leaf: gathered.append(leaf.shape) or gather(leaf))
    config, stored = open_hf(written)

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with jax.set_mesh(make_mesh(**MESH)):
        split = on_devices(config, stored)
        on_first(config, split, "float32")
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(processes, "broadcast_from_first", lambda tree: tree)
        monkeypatch.setattr(placed, "_split", full)
        every, gathered[:] = [*gathered], []
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            on_first(config, split, "float32")
    assert gathered == every


def test_the_result_may_be_donated(written):
    config, stored = open_hf(written)
    params = on_devices(config, stored, "float32")
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    jax.tree.map(np.testing.assert_array_equal, on_devices(config, stored), jax.tree.map(np.asarray, stored))


def test_a_stage_is_loaded_straight_into_shards(written, tmp_path):
    config, params = load_hf(written)
    image = {"vision": params["vision"]}  # a phase saves only what it trained
    checkpoint.save_stage(tmp_path / "stage", {"params": image}, {})
    with jax.set_mesh(make_mesh(**MESH)):
        tree, _ = checkpoint.load_stage(tmp_path / "stage", {"params": functional(config).axes})
        names = jax.tree.leaves(functional(config).axes["vision"], is_leaf=is_axes)
        for leaf, axes in zip(jax.tree.leaves(tree), names, strict=True):
            where = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(axes, leaf.shape))
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, tree["params"], image)
