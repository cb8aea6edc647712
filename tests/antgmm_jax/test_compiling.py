"""Options of XLA go to the train step on accelerators only, and their compilers know them."""

import jax
import jax.numpy as jnp
import numpy as np
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
