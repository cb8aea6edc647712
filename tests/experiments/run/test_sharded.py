"""A model split over eight devices is trained, cut and saved as on one: same numbers, a part of it on each device."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, get_mesh

import pruning
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import StackConfig, VisionConfig
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.families.text import TextConfig
from antgmm_jax.io import checkpoint
from antgmm_jax.parallel.processes import gather, run_on_first
from antgmm_jax.parallel.sharding import make_mesh, shard_rows, spec
from antgmm_jax.pure import float32, functional
from distill import LossConfig, OptimizerConfig, init_state, make_optimizer, make_step, shard_state
from tests.pruning.models import batch_of, randomised

# Without biases of keys: their gradient is zero but for rounding, of which Adam makes steps of full size.
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
# Sums go over the devices in another order than over one device's memory.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def fresh():
    return init_state(float32(CONFIG, PARAMS), OPTIMIZER)


def bytes_here(tree) -> int:
    """Bytes of a tree on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def assert_close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def assert_stepped(found, expected):
    """Equal states after a first step of Adam, which divides a gradient by its own size: of one that is all but 0,
    rounding decides where the parameter goes, by at most the learning rate either way."""
    assert_close(found._replace(params={}), expected._replace(params={}))
    trees = (found.params, expected.params, expected.opt_state[1].mu)
    for one, other, moment in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-2)
        told = np.abs(moment) > 1e-7
        np.testing.assert_allclose(np.asarray(one)[told], np.asarray(other)[told], **CLOSE)


def assert_laid_out(params, config):
    """Every parameter lies as the rules say, by its own names."""

    def lies(leaf, names) -> bool:
        return leaf.sharding.is_equivalent_to(NamedSharding(get_mesh(), spec(names, leaf.shape)), leaf.ndim)

    assert jax.tree.all(jax.tree.map(lies, params, functional(config).axes))


def compiled(state, batch):
    """The step, compiled quickly: it runs once."""
    program = STEP.program.lower(state, batch, {}, {}, STEP.schedule(state.step))
    return replace(STEP, program=program.compile({"xla_backend_optimization_level": 0}))


@pytest.fixture(scope="module")
def one():
    """A step on one device: state and metrics."""
    state, batch = fresh(), shard_rows(BATCH)
    return compiled(state, batch)(state, batch, {}, {})


@pytest.fixture
def mesh():
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)) as mesh:
        yield mesh


def test_a_step_is_that_of_one_device_and_leaves_the_state_split(one, mesh):
    state, batch = fresh(), shard_rows(BATCH)
    assert_laid_out(state.params, CONFIG)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Matrices, nearly all of it, by fsdp and tensor: a quarter of each on a device.
    assert bytes_here(state) < 0.3 * whole
    step = compiled(state, batch)
    memory = step.program.memory_analysis()
    assert memory.argument_size_in_bytes <= bytes_here((state, batch))
    assert memory.alias_size_in_bytes == bytes_here(state)  # donated, and so taken over in place
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < whole
    found, metrics = step(state, batch, {}, {})
    assert_laid_out(found.params, CONFIG)
    assert_laid_out(found.opt_state[1].mu, CONFIG)
    assert_stepped(found, one[0])
    assert_close(metrics, one[1])


@pytest.mark.parametrize(
    "embed", [np.arange(0, 32, 2, dtype=np.int32), np.eye(32, 16, dtype=np.float32)], ids=["channels", "basis"]
)
def test_a_cut_stays_on_the_devices(mesh, monkeypatch, embed):
    keep = {
        "text/embed": embed,
        "text/mlp": np.tile(np.arange(7, dtype=np.int32), (2, 1)),  # does not divide
        "text/layers": np.array([1], np.int32),
    }
    params = float32(CONFIG, PARAMS)

    def copied(*_):
        raise AssertionError("an array came to the host")

    with monkeypatch.context() as patched:
        for way in ("__array__", "_value"):
            patched.setattr(type(params["vision"]["cls"]), way, property(copied) if way == "_value" else copied)
        config, cut = pruning.shrink(CONFIG, params, keep)
    assert_laid_out(cut, config)
    for found, expected in zip(
        jax.tree.leaves(cut), jax.tree.leaves(pruning.shrink(CONFIG, PARAMS, keep)[1]), strict=True
    ):
        np.testing.assert_allclose(found, expected, **(CLOSE if embed.ndim == 2 else {"rtol": 0}))


@pytest.mark.parametrize("other", [{"data": 1}, {"fsdp": 4, "tensor": 2}, None], ids=str)
def test_a_state_goes_on_under_another_mesh(one, mesh, other, tmp_path):
    state = fresh()
    checkpoint.save_step(tmp_path, 1, state, {})()
    expected = gather(state)
    with jax.set_mesh(None if other is None else make_mesh(**other)):
        like = jax.eval_shape(lambda: init_state(PURE.init(jax.random.key(0)), OPTIMIZER))
        found, _ = checkpoint.load_step(tmp_path, 1, shard_state(like, PURE.axes, OPTIMIZER))
        if other is not None:
            assert_laid_out(found.params, CONFIG)
            assert_laid_out(found.opt_state[1].nu, CONFIG)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_one_process_alone_is_outside_of_the_mesh(mesh):
    assert len(run_on_first(lambda: jax.numpy.ones(3)).sharding.device_set) == 1
