"""Training, cutting and saving a model that is sharded over eight devices give the results of one device."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, get_mesh

import pruning
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import StackConfig, VisionConfig
from antgmm_jax.families.common.text import TextConfig
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.io import checkpoint
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.processes import gather, run_on_first
from antgmm_jax.parallel.sharding import make_mesh, shard_rows, spec
from antgmm_jax.pure import functional
from distill import LossConfig, OptimizerConfig, init_state, make_optimizer, make_step, shard_state
from tests.marks import long
from tests.pruning.models import batch_of, randomised

# Without biases of keys: their gradient is only rounding, which Adam scales to full steps.
BARE = {"layers": 2, "embed": 32, "heads": 2, "head_dim": 16, "mlp": 48, "qkv_bias": False}
TEXT = {"q_per_kv": 2, "act": "silu", "norm": "rms", "gated": True, "causal": True, "positions": "rope"}
CONFIG = LlavaConfig(
    vision=VisionConfig(stack=StackConfig(**BARE, act="gelu"), image=16, patch=8, keep_cls=False),
    bridge=ProjectorConfig(mlp=32, act="gelu"),
    language=TextConfig(decoder=StackConfig(**BARE, **TEXT, out_bias=False, mlp_bias=False), vocab=64, tied=False),
    image_token=3,
)
PURE, OPTIMIZER = functional(CONFIG), make_optimizer(OptimizerConfig(learning_rate=1e-2), steps=10)
PARAMS = randomised(CONFIG)
BATCH = jax.tree.map(lambda leaf: np.tile(leaf, (4, *[1] * (leaf.ndim - 1))), batch_of(CONFIG))
STEP = make_step(PURE, OPTIMIZER, LossConfig(hard=1.0))
# Sums over devices have another order than sums on one device.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def fresh():
    return init_state(on_devices(CONFIG, PARAMS, "float32"), OPTIMIZER)


def bytes_here(tree) -> int:
    """Bytes of a tree on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def assert_close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def assert_stepped(actual, expected):
    """Asserts equal states after a first step of Adam, which divides gradients by their size: where a gradient is
    almost 0, rounding decides the direction of a step of at most the learning rate."""
    assert_close(actual._replace(params={}), expected._replace(params={}))
    trees = (actual.params, expected.params, expected.opt_state[1].mu)
    for one, other, moment in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-2)
        significant = np.abs(moment) > 1e-7
        np.testing.assert_allclose(np.asarray(one)[significant], np.asarray(other)[significant], **CLOSE)


def assert_laid_out(params, config):
    """Asserts that every parameter has the sharding of its axis names."""

    def lies(leaf, names) -> bool:
        return leaf.sharding.is_equivalent_to(NamedSharding(get_mesh(), spec(names, leaf.shape)), leaf.ndim)

    assert jax.tree.all(jax.tree.map(lies, params, functional(config).axes))


def compiled(state, batch):
    """The step, compiled without optimisation because it runs once."""
    program = STEP.program.lower(state, batch, {}, {}, STEP.schedule(state.step))
    return replace(STEP, program=program.compile({"xla_backend_optimization_level": 0}))


@pytest.fixture(scope="module")
def one():
    """State and metrics after a step on one device."""
    state, batch = fresh(), shard_rows(BATCH)
    return compiled(state, batch)(state, batch, {}, {})


@pytest.fixture
def mesh():
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)) as mesh:
        yield mesh


def test_a_sharded_step_equals_that_of_one_device_and_keeps_the_sharding(one, mesh):
    state, batch = fresh(), shard_rows(BATCH)
    assert_laid_out(state.params, CONFIG)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Nearly all bytes are matrices, split by fsdp and tensor: each device holds a quarter.
    assert bytes_here(state) < 0.3 * whole
    step = compiled(state, batch)
    memory = step.program.memory_analysis()
    assert memory.argument_size_in_bytes <= bytes_here((state, batch))
    assert memory.alias_size_in_bytes == bytes_here(state)  # donated, so updated in place
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < whole
    stepped, metrics = step(state, batch, {}, {})
    assert_laid_out(stepped.params, CONFIG)
    assert_laid_out(stepped.opt_state[1].mu, CONFIG)
    assert_stepped(stepped, one[0])
    assert_close(metrics, one[1])


@pytest.mark.parametrize(
    "embed", [np.arange(0, 32, 2, dtype=np.int32), long(np.eye(32, 16, dtype=np.float32))], ids=["channels", "basis"]
)
def test_a_cut_stays_on_the_devices(mesh, monkeypatch, embed):
    keep = {
        "text/embed": embed,
        "text/mlp": np.tile(np.arange(7, dtype=np.int32), (2, 1)),  # not divisible by the mesh
        "text/layers": np.array([1], np.int32),
    }
    params = on_devices(CONFIG, PARAMS, "float32")

    def copied(*_):
        raise AssertionError("an array came to the host")

    with monkeypatch.context() as patched:
        for way in ("__array__", "_value"):
            patched.setattr(type(params["vision"]["cls"]), way, property(copied) if way == "_value" else copied)
        config, cut = pruning.shrink(CONFIG, params, keep)
    assert_laid_out(cut, config)
    for actual, expected in zip(
        jax.tree.leaves(cut), jax.tree.leaves(pruning.shrink(CONFIG, PARAMS, keep)[1]), strict=True
    ):
        np.testing.assert_allclose(actual, expected, **(CLOSE if embed.ndim == 2 else {"rtol": 0}))


@pytest.mark.parametrize("other", [long({"data": 1}), {"fsdp": 4, "tensor": 2}, long(None)], ids=str)
def test_a_state_is_restored_under_another_mesh(one, mesh, other, tmp_path):
    state = fresh()
    checkpoint.save_step(tmp_path, 1, state, {})()
    expected = gather(state)
    with jax.set_mesh(None if other is None else make_mesh(**other)):
        like = jax.eval_shape(lambda: init_state(PURE.init(jax.random.key(0)), OPTIMIZER))
        restored, _ = checkpoint.load_step(tmp_path, 1, shard_state(like, PURE.axes, OPTIMIZER))
        if other is not None:
            assert_laid_out(restored.params, CONFIG)
            assert_laid_out(restored.opt_state[1].nu, CONFIG)
        assert jax.tree.all(jax.tree.map(np.array_equal, restored, expected))


def test_run_on_first_runs_outside_the_mesh(mesh):
    assert len(run_on_first(lambda: jax.numpy.ones(3)).sharding.device_set) == 1
