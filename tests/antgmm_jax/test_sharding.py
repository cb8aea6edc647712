"""Rules that split arrays over a mesh by the names of their axes."""

import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.sharding import make_mesh, place, shard_rows, spec


@pytest.fixture
def mesh():
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)) as mesh:
        yield mesh


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("layers", "vision/embed", "vision/heads", "head_dim"), (4, 8, 2, 4), (None, "fsdp", "tensor", None)),
        (("vision/layers", "vision/mlp", "vision/embed"), (3, 12, 6), (None, "tensor", "fsdp")),
        (("vocab", "text/embed"), (10, 8), ("tensor", "fsdp")),
        (("bridge/embed", "text/embed"), (4, 8), ("fsdp", None)),  # two axes match one rule: the first
        (("bridge/embed", "text/embed"), (5, 8), (None, "fsdp")),  # that is divisible is split
        (("batch",), (8, 3), (("data", "fsdp"),)),
        ((), (3,), ()),
    ],
)  # fmt: skip
def test_axis_names_determine_the_sharding(mesh, names, shape, expected):
    assert spec(names, shape) == P(*expected)


def test_an_indivisible_axis_is_replicated_with_one_warning(mesh, caplog, monkeypatch):
    monkeypatch.setattr(sharding, "_warned", set())
    with caplog.at_level(logging.WARNING):
        for size in (3, 5, 4, 3):
            placed = place(np.ones((size, 2), np.float32), ("encoder/heads", "head_dim"))
            assert placed.sharding.spec == P("tensor" if size == 4 else None, None)
            np.testing.assert_array_equal(placed, np.ones((size, 2)))
        place(np.ones(3, np.float32), ("decoder/heads",))
    warning = "%s = 3 is not divisible by tensor = 2: it is replicated on every device"
    assert caplog.messages == [warning % "encoder/heads", warning % "decoder/heads"]


def test_arrays_shape_structs_and_traced_arrays_get_the_same_sharding(mesh):
    whole = np.arange(8, dtype=np.float32).reshape(4, 2)
    names = ("text/embed", "text/mlp")
    described = place(jax.ShapeDtypeStruct(whole.shape, whole.dtype), names)
    traced = jax.jit(lambda x: place(x, names))(whole)
    for placed in (place(whole, names), place(jax.numpy.asarray(whole), names), traced):
        assert placed.sharding.is_equivalent_to(described.sharding, 2)
        np.testing.assert_array_equal(placed.addressable_shards[-1].data, whole[2:, 1:])


def test_a_parameter_is_gathered_over_fsdp_and_its_gradient_is_split_again(mesh):
    whole = np.arange(32, dtype=np.float32).reshape(8, 4)
    names = ("text/embed", "text/mlp")

    def loss(w):
        w = sharding.gathered(w, names)
        return (w * w).sum(), w

    gradient, used = jax.jit(jax.grad(loss, has_aux=True))(place(whole, names))
    assert used.sharding.spec == P(None, "tensor")
    assert gradient.sharding.spec == P("fsdp", "tensor")
    np.testing.assert_array_equal(used, whole)
    np.testing.assert_array_equal(gradient, 2 * whole)


def test_rows_are_split_over_data_and_fsdp(mesh):
    placed = shard_rows({"x": np.arange(8)})["x"]
    assert [shard.data.tolist() for shard in placed.addressable_shards] == [
        [i, i + 1] for i in (0, 0, 2, 2, 4, 4, 6, 6)
    ]
    assert sharding.local_rows(8).tolist() == [*range(8)]
    assert sharding.padded_batch_size(5) == 8
    with pytest.raises(AntgmmError, match="batch of 6 rows is not divisible by data x fsdp = 4: use a multiple"):
        sharding.local_rows(6)


def test_without_a_mesh_nothing_is_placed():
    whole = np.ones((3, 2))
    assert place(whole, ("vocab",)) is whole
    assert sharding.local_rows(3).tolist() == [0, 1, 2]
    assert sharding.padded_batch_size(3) == 3
    with jax.set_mesh(make_mesh(data=8)), sharding.without_mesh():
        assert place(whole, ("vocab",)) is whole


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(
        AntgmmError, match=r"mesh data=4,fsdp=1,tensor=4 needs 16 devices: there are 8 \(cpu\): choose .* at most 8$"
    ):
        make_mesh(data=4, tensor=4)


def test_devices_of_several_slices_are_refused():
    devices = [SimpleNamespace(slice_index=index // 4, device_kind="TPU v4", platform="tpu") for index in range(8)]
    with pytest.raises(AntgmmError, match="mesh data=2,fsdp=4,tensor=1 has devices of several TPU slices"):
        make_mesh(data=2, fsdp=4, devices=devices)


def test_gpus_of_several_machines_make_a_mesh():
    """Each machine's GPUs have a number of their own, which is none of a TPU slice."""
    gpus = [
        _Chip(id=n, slice_index=n // 4, device_kind="NVIDIA H100", platform="gpu", process_index=n // 4)
        for n in range(8)
    ]
    mesh = make_mesh(data=2, fsdp=4, devices=gpus)
    assert [[gpu.process_index for gpu in row.ravel()] for row in mesh.devices] == [[0] * 4, [1] * 4]


class _Chip(SimpleNamespace):
    """A device that is a key of dictionaries."""

    __hash__ = object.__hash__


@pytest.mark.parametrize("sizes", [(2, 8, 1), (8, 2, 1), (1, 8, 2), (2, 4, 2)])
def test_an_axis_of_a_mesh_may_be_a_part_of_an_axis_of_the_slice(sizes):
    """Of a slice of 4 x 4 chips of v6e; `jax.make_mesh` refuses these sizes there."""
    chips = [
        _Chip(
            id=4 * x + y, coords=(x, y, 0), core_on_chip=0, process_index=0, platform="tpu", device_kind="TPU v6 lite"
        )
        for x in range(4)
        for y in range(4)
    ]
    mesh = make_mesh(**dict(zip(sharding.MESH, sizes, strict=True)), devices=chips)
    assert mesh.devices.shape == sizes
    assert sorted(chip.id for chip in mesh.devices.flat) == [*range(16)]
