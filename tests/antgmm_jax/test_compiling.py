"""Options of XLA go to the train step on accelerators only, and their compilers know them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from antgmm_jax.parallel import compiling
from antgmm_jax.parallel.sharding import MESH, make_mesh, platform


def test_a_cpu_gets_none():
    assert compiling.options() is None
    with jax.set_mesh(make_mesh(fsdp=8)):
        assert compiling.options() is None


def test_a_mesh_of_other_devices_decides_and_the_tpu_compiler_takes_the_options(v5e):
    mesh = Mesh(np.array(v5e).reshape(1, 4, 1), MESH, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        assert platform() == "tpu"
        assert compiling.options() == compiling.PROFILES["tpu"]
        double = jax.jit(lambda x: 2 * x, compiler_options=compiling.options())
        assert double.trace(jax.ShapeDtypeStruct((8,), jnp.float32)).lower().compile()


def test_several_gpus_get_options_and_one_alone_none(monkeypatch):
    monkeypatch.setattr(compiling, "platform", lambda: "gpu")
    for devices, expected in ((1, None), (8, compiling.PROFILES["gpu"])):
        monkeypatch.setattr(compiling, "devices", lambda count=devices: count)
        assert compiling.options() == expected


def test_this_jax_knows_the_options_of_gpus_by_their_names():
    def compiled(options):
        return jax.jit(lambda x: 2 * x, compiler_options=options).lower(jnp.ones(2)).compile()

    assert compiled(compiling.PROFILES["gpu"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compiled({"xla_gpu_pipeline_some": True})
