"""Products with a kernel that stays split over eight devices equal those on one, and send rows in place of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.blocks.layers import linear
from antgmm_jax.blocks.low_rank import LowRank
from antgmm_jax.blocks.split import Split, split
from antgmm_jax.decoding import phases
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.sharding import make_mesh, place, place_tree
from antgmm_jax.presets import preset
from antgmm_jax.pure import abstract, functional
from experiments.lab.planning.collectives import sent
from experiments.lab.planning.shapes import batch_shapes

IN, OUT = ("text/embed", "text/heads", "head_dim"), ("text/heads", "head_dim", "text/embed")


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """The platform that the program is traced for; it runs on a CPU."""
    monkeypatch.setattr(sharding, "platform", lambda: request.param)


def problem(names, rows, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(rows), 2)
    inputs, shape = (1, (64, 4, 8)) if names is IN else (2, (4, 8, 64))
    kernel = jax.random.normal(keys[0], shape).astype(dtype)
    x = jax.random.normal(keys[1], (rows, 1, *shape[:inputs])).astype(dtype)
    return place(x, ("batch",)) if not rows % 8 else x, place(kernel, names), inputs


def program(names, inputs):
    def run(x, kernel):
        kept = split(kernel, names)
        assert isinstance(kept, Split) and kept.by_outputs == (names is OUT)
        return linear(x, kept, None, inputs=inputs)

    return jax.jit(run)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("names", [IN, OUT], ids=["inputs", "outputs"])
@pytest.mark.parametrize("rows", [16, 3])
@pytest.mark.usefixtures("platform")
def test_products_equal_those_of_one_device(mesh, names, rows):
    x, kernel, inputs = problem(names, rows)
    expected = np.tensordot(np.asarray(x, np.float64), np.asarray(kernel, np.float64), inputs)
    with jax.set_mesh(make_mesh(**mesh)):
        x, kernel, _ = problem(names, rows)
        actual = program(names, inputs)(x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_sums_of_bfloat16_products_are_float32():
    with jax.set_mesh(make_mesh(fsdp=8)):
        x, kernel, _ = problem(IN, 8, jnp.bfloat16)
        actual = program(IN, 1)(x, kernel)
    assert actual.dtype == jnp.bfloat16
    expected = np.tensordot(np.asarray(x, np.float64), np.asarray(kernel, np.float64), 1)
    # One rounding to 8 bits; parts rounded before their sum would be off by several.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_what_is_no_kernel_or_has_adapters_is_gathered():
    with jax.set_mesh(make_mesh(fsdp=8)):
        scale, kernel = place(jnp.ones(64), IN[:1]), place(jnp.ones((64, 4, 8)), IN)
        adapted = LowRank(kernel, jnp.ones((64, 2)), jnp.ones((2, 32)))
        whole = jax.jit(lambda: (split(scale, IN[:1]), split(adapted, IN)))()
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))
    assert split(kernel, IN) is kernel  # without a mesh


def test_a_token_sends_rows_and_no_weights():
    config = preset("llava-tiny")
    with jax.set_mesh(make_mesh(fsdp=8)):
        params = place_tree(abstract(config), functional(config).axes)
        run = phases(config, 5, (), 0)
        prompt = {name: jax.ShapeDtypeStruct((8, 32), jnp.int32) for name in ("input_ids", "attention_mask")}
        images = dict(batch_shapes(config, 8, 32, 0))["images"]
        features = jax.eval_shape(run.vision, params, images)
        state = jax.eval_shape(run.prefill, params, {**prompt, "images": images, "vision_features": features})
        rows = jax.tree.map(lambda leaf: place(leaf, ("batch",)) if leaf.shape else leaf, state)
        text = run.decode.lower(params, rows).compile().as_text()
    # Four tokens; to gather the layers for each would send 23 MB.
    assert sum(sent(text, 8).values()) < 1e6
    assert sum(leaf.size * 4 for leaf in jax.tree.leaves(params["language"]["decoder"])) > 6e6
