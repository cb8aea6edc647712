"""A bfloat16 step sums in float32: softmax, norms, losses, moments, and gradients of shared parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill
import pruning
from antgmm_jax.blocks.layers import gated, plus, repeated
from antgmm_jax.blocks.tables import lookup
from antgmm_jax.families import FAMILIES
from antgmm_jax.pure import abstract, functional
from pruning.importance import gate_gradient
from tests.families.cases import batch, read_fields
from tests.marks import long
from tests.programs import equations
from tests.pruning.models import CONFIGS, batch_of

BATCH = 2
LOSSES = distill.LossConfig(hard=1.0, soft=1.0, pair=1.0, rank=1.0, hidden=1.0, vision=1.0, bridge=1.0)


STEPS = [("llava", "adamw"), long(("llava", "muon")), *(long(("blip2_t5", kind)) for kind in ("adamw", "muon"))]


@pytest.fixture(scope="module", params=STEPS, ids=str)
def step(request):
    """The operations of a step in bfloat16, and the shapes of its results."""
    family, kind = request.param
    config, pure = CONFIGS[family], functional(CONFIGS[family])
    optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-3, kind=kind), steps=1)
    state = jax.eval_shape(partial(distill.init_state, optimizer=optimizer), abstract(config))
    frozen = abstract(config, jnp.bfloat16)
    options = {"parts": distill.parts(config, pruning.identity(config)), "dtype": jnp.bfloat16, "chunk": 2}
    made = distill.make_step(pure, optimizer, LOSSES, teacher=distill.online(pure, frozen), **options)
    traced = made.program.trace(state, batch_of(config), {}, frozen, jax.ShapeDtypeStruct((), jnp.float32))
    return list(equations(traced.jaxpr.jaxpr)), jax.eval_shape(made, state, batch_of(config), {}, frozen)


def narrow(variable) -> bool:
    return variable.aval.dtype == jnp.bfloat16


def test_the_model_is_computed_in_bfloat16(step):
    products = [e for e in step[0] if e.primitive.name == "dot_general" and narrow(e.invars[0])]
    assert len(products) > 20


@pytest.mark.parametrize("name", ["reduce_sum", "reduce_max", "cumsum", "rsqrt", "log", "logsumexp"])
def test_sums_maxima_and_roots_are_in_float32(step, name):
    narrow_operations = [
        (e.invars[0].aval.shape, e.outvars[0].aval.shape)
        for e in step[0]
        # A sum along an axis of 1 adds nothing.
        if e.primitive.name == name and narrow(e.invars[0]) and (name != "reduce_sum" or _adds(e))
    ]
    assert not narrow_operations


def _adds(equation) -> bool:
    return equation.invars[0].aval.size > equation.outvars[0].aval.size


def test_scans_carry_only_the_residual_stream_in_bfloat16(step):
    carried = [
        v.aval.shape
        for e in step[0]
        if e.primitive.name == "scan"
        for v in e.invars[e.params["num_consts"] :][: e.params["num_carry"]]
        if narrow(v)
    ]
    # Gradients of shared parameters, such as the head and T5's bias, must not be carried here.
    assert carried and all(len(shape) == 3 and shape[0] == BATCH for shape in carried)


def test_gradients_of_tables_are_summed_in_float32(step):
    added = [e.invars[0].aval for e in step[0] if e.primitive.name == "scatter-add"]
    wide = [aval.shape for aval in added if aval.dtype == jnp.float32]
    # Image tokens and answer positions are each read once.
    assert all(len(aval.shape) == 3 and aval.shape[0] == BATCH for aval in added if aval.dtype == jnp.bfloat16)
    assert any(shape[0] == 32 and len(shape) == 2 for shape in wide)


def test_losses_parameters_and_moments_are_float32(step):
    state, metrics = step[1]
    leaves = jax.tree.leaves((state.params, state.opt_state, metrics))
    assert {leaf.dtype for leaf in leaves} <= {np.dtype("float32"), np.dtype("int32")}
    assert LOSSES.terms() == distill.losses.TERMS and set(LOSSES.terms()) < set(metrics)


@pytest.mark.parametrize("family", ["llava", "gemma3", *map(long, ("blip2", "internvl", "mistral3", "qwen3_vl"))])
def test_gradients_of_gates_are_summed_in_float32(family):
    config = read_fields(next(iter(FAMILIES[family].tiny(0).values())).fields)
    loss = distill.make_loss(functional(config), distill.LossConfig(hard=1.0), dtype=jnp.bfloat16)
    gates = {axis: jnp.asarray(gate, jnp.float32) for axis, gate in pruning.ones(config).items()}
    score = partial(gate_gradient, lambda *about: loss(*about, {})[0])
    program = list(equations(jax.make_jaxpr(score)(abstract(config), gates, batch(config)).jaxpr))
    assert any(e.primitive.name == "dot_general" and narrow(e.invars[0]) for e in program)
    sums = [e for e in program if e.primitive.name == "reduce_sum" and narrow(e.invars[0]) and _adds(e)]
    assert not [e.invars[0].aval.shape for e in sums]


def test_gradients_of_parameters_shared_by_rows_are_summed_in_float32():
    # In bfloat16 the sum of 4096 ones stops at 256, because 257 is rounded to 256.
    rows, parameter = 4096, jnp.zeros((1, 3), jnp.bfloat16)
    ids = jnp.zeros((rows,), jnp.int32)
    for read in (
        lambda p: lookup(p, ids),
        lambda p: repeated(p, rows),
        lambda p: plus(jnp.zeros((rows, 3), jnp.bfloat16), p),
        lambda p: gated(jnp.ones((rows, 3), jnp.bfloat16), p[0]),
    ):
        out, back = jax.vjp(read, parameter)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(back(jnp.ones_like(out))[0].astype(jnp.float32), np.full((1, 3), rows))
