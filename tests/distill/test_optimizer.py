"""Schedules, clipping, weight decay, rates and frozen parameters, against optax and PyTorch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import abstract, functional, is_axes
from distill.optimizer import OptimizerConfig, linear_maps, make_optimizer, muon_flops
from distill.state import init_state, map_moments
from distill.trainable import check_paths, combine, trainable
from tests.families.cases import FIRST, config_with

PARAMS = {"a": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([1.0, -1.0])}, "ab": jnp.array([5.0])}


def rates(at, steps, **options):
    schedule = make_optimizer(OptimizerConfig(learning_rate=2.0, **options), steps).schedule
    return np.array([schedule(jnp.array(step)) for step in at])


def test_cosine_equals_optax_after_warmup_and_never_rises():
    got = rates(range(60), steps=30, warmup=5)
    expected = optax.cosine_decay_schedule(2.0, 25)
    np.testing.assert_allclose(got[5:], np.array([expected(step) for step in range(55)]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[:5], 2.0 * np.arange(1, 6) / 6, rtol=1e-6)
    assert (np.diff(got[5:]) <= 1e-7).all()
    np.testing.assert_allclose(got[30:], 0.0, atol=1e-6)


def test_a_constant_rate_by_hand():
    np.testing.assert_allclose(rates([0, 1, 9, 99], steps=10, schedule="constant", warmup=1), [1.0, 2.0, 2.0, 2.0])


def test_a_stage_without_training_needs_no_room_for_the_warmup():
    assert rates([0], steps=0, warmup=20) == [2.0]


def test_clipping_clips_to_the_global_norm():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, clip=0.5, weight_decay=0.0), steps=1)
    gradient = jax.tree.map(lambda x: 100.0 * x, PARAMS)
    _, opt_state = optimizer.transform.update(gradient, optimizer.transform.init(PARAMS), PARAMS)
    moment = optax.tree.get(opt_state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), 0.1 * 0.5, rtol=1e-5)


@pytest.mark.parametrize("rates", [{}, {"kernel": 0.25}, {"kernel": 1.5, "bias": 0.5}])
def test_updates_equal_torch_adamw(rates):
    torch = pytest.importorskip("torch")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.3, clip=1.0, rates=rates), steps=3)
    kernel = torch.nn.Parameter(torch.tensor(np.array(PARAMS["a"]["kernel"])))
    bias = torch.nn.Parameter(torch.tensor(np.array(PARAMS["a"]["bias"])))
    groups = [{"params": [kernel], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1)
    params = {"kernel": PARAMS["a"]["kernel"], "bias": PARAMS["a"]["bias"]}
    opt_state = optimizer.transform.init(params)
    for step in range(3):
        gradient = {"kernel": params["kernel"] * (step + 1), "bias": params["bias"] + 1.0}
        kernel.grad, bias.grad = kernel.detach() * (step + 1), bias.detach() + 1.0
        torch.nn.utils.clip_grad_norm_([kernel, bias], 1.0)
        rate = optimizer.schedule(jnp.array(step))
        for group, name in zip(reference.param_groups, ("kernel", "bias"), strict=True):
            group["lr"] = float(rate) * rates.get(name, 1.0)
        reference.step()
        updates, opt_state = optimizer.transform.update(gradient, opt_state, params)
        params = jax.tree.map(lambda p, u, rate=rate: p - rate * u, params, updates)
    np.testing.assert_allclose(params["kernel"], kernel.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(params["bias"], bias.detach().numpy(), rtol=1e-5)


def test_the_longest_prefix_sets_the_rate():
    def updates(frozen=(), **options):
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, **options), 1, frozen)
        trained = trainable(PARAMS, optimizer.frozen)
        return optimizer.transform.update(trained, optimizer.transform.init(trained), trained)[0]

    plain, scaled = updates(), updates(rates={"a": 0.5, "a/bias": 2.0})
    factors = {"a": {"kernel": 0.5, "bias": 2.0}, "ab": jax.tree.map(lambda _: 1.0, plain["ab"])}
    jax.tree.map(lambda s, p, f: np.testing.assert_allclose(s, f * p, rtol=1e-6), scaled, plain, factors)
    # Frozen parameters have no rate.
    assert updates(frozen=("ab",), rates={"a": 0.5})["ab"] == jax.tree.map(lambda _: None, PARAMS["ab"])
    # A cut may have removed the parameters of a rate.
    jax.tree.map(np.testing.assert_array_equal, updates(rates={"gone": 0.5}), plain)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_the_loss_does_not_depend_on_is_not_decayed(kind):
    params = {"bridge": {"up": jnp.ones((4, 4))}, "language": {"up": jnp.ones((4, 4))}}
    optimizer = make_optimizer(OptimizerConfig(kind=kind, learning_rate=1.0, weight_decay=0.5), 1)
    gradient = jax.grad(lambda params: (params["bridge"]["up"] ** 2).sum())(params)
    first, _ = optimizer.transform.update(gradient, optimizer.transform.init(params), params)
    assert not first["language"]["up"].any()
    bare = make_optimizer(OptimizerConfig(kind=kind, learning_rate=1.0, weight_decay=0.0), 1)
    plain, _ = bare.transform.update(gradient, bare.transform.init(params), params)
    np.testing.assert_allclose(first["bridge"]["up"], plain["bridge"]["up"] + 0.5, rtol=1e-6)


@pytest.mark.parametrize("rates", [{}, {"vision": 0.5}], ids=["one", "rates"])
def test_muon_leaves_maps_where_they_are_in_batches_that_do_not_reach_them(rates):
    """Its updates have full size however small the momentum is. AdamW's shrink with the momentum, and go on."""
    params = {name: {"up": jnp.eye(4), "up_bias": jnp.ones(4)} for name in ("vision", "language")}
    config = OptimizerConfig(kind="muon", learning_rate=1.0, weight_decay=0.5, rates=rates)
    optimizer = make_optimizer(config, 1)
    whole = jax.tree.map(lambda leaf: 1 + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), params)
    blind = {**whole, "vision": jax.tree.map(jnp.zeros_like, whole["vision"])}
    first, state = optimizer.transform.update(whole, optimizer.transform.init(params), params)
    second, _ = optimizer.transform.update(blind, state, params)
    assert jnp.abs(first["vision"]["up"]).max() > 0.1 and not second["vision"]["up"].any()
    assert second["vision"]["up_bias"].any() and jnp.abs(second["language"]["up"]).max() > 0.1


def test_a_prefix_freezes_only_whole_path_components():
    kept = trainable(PARAMS, ("a",))
    assert kept["a"] == {"kernel": None, "bias": None}
    assert kept["ab"] is PARAMS["ab"]
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, combine(kept, PARAMS), PARAMS))


@pytest.mark.parametrize(("frozen", "message"), [(("vision",), "vision.*a, ab"), (("a", "ab"), "nothing to train")])
def test_invalid_frozen_prefixes_are_refused(frozen, message):
    with pytest.raises(AntgmmError, match=message):
        check_paths(PARAMS, frozen, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sgd"}, "kind = 'sgd': Input should be 'adamw' or 'muon'"),
        ({"schedule": "zigzag"}, "schedule = 'zigzag': Input should be 'cosine' or 'constant'"),
        ({"warmup": 10}, "warmup = 10 with steps = 10: use fewer"),
        ({"clip": 0.0}, "clip = 0.0: Input should be greater than 0"),
        ({"clip": float("nan")}, "clip = nan: Input should be greater than 0"),
        ({"learning_rate": float("inf")}, "learning_rate = inf: Input should be a finite number"),
        ({"rates": {"a": 0.0}}, "rates.a = 0.0: Input should be greater than 0"),
        ({"floor": 0.1}, "floor = 0.1: Unexpected keyword argument"),
    ],
)
def test_invalid_optimizer_configs_are_refused(options, message):
    with pytest.raises(AntgmmError, match=re.escape(message)) as caught:
        make_optimizer(OptimizerConfig(**{"learning_rate": 1.0, **options}), 10)
    assert "\n" not in str(caught.value)


def test_an_infinite_clip_leaves_gradients_unchanged():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, clip=float("inf"), weight_decay=0.0), steps=1)
    gradient = jax.tree.map(lambda x: 100.0 * x, PARAMS)
    _, opt_state = optimizer.transform.update(gradient, optimizer.transform.init(PARAMS), PARAMS)
    moment = optax.tree.get(opt_state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), 0.1 * optax.tree.norm(gradient), rtol=1e-5)


def test_muon_orthogonalises_each_linear_map_separately():
    """The first update has the gradient's singular vectors, and singular values of about 0.2 sqrt(n)."""
    optimizer = make_optimizer(OptimizerConfig(kind="muon", learning_rate=1.0, weight_decay=0.0, clip=1e9), steps=1)
    q, o, rest = (jax.random.normal(key, (2, 4, 3, 2)) for key in jax.random.split(jax.random.key(0), 3))
    gradient = {"blocks": {"q": q, "o": jnp.moveaxis(o, 1, 3)}, "tokens": rest}
    updates, _ = optimizer.transform.update(gradient, optimizer.transform.init(gradient), gradient)
    for name, flat in (("q", (4, 6)), ("o", (6, 4))):
        for layer in range(2):
            update, given = (np.asarray(tree["blocks"][name][layer]).reshape(flat) for tree in (updates, gradient))
            left, _, right = np.linalg.svd(given, full_matrices=False)
            inside = left.T @ update @ right.T / (0.2 * 6**0.5)
            np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0.0, atol=1e-4)
            # Newton-Schulz with these coefficients leaves singular values between 0.68 and 1.13.
            assert (np.diag(inside) > 0.6).all()
            assert (np.diag(inside) < 1.2).all()
    # By hand, the first step of Adam with Nesterov's momentum: sign times (b1 m2 + (1 - b1) m1), both bias-corrected.
    first = 0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9)
    np.testing.assert_allclose(updates["tokens"], first * jnp.sign(rest), rtol=1e-4)


def test_flops_of_muon_by_hand():
    params = {"blocks": {"q": jnp.ones((2, 8, 3, 2)), "bias": jnp.ones((2, 3))}, "tokens": jnp.ones((5, 4)), "k": None}
    # Two maps of 8 x 6: by its transpose 2 * 6^2 * 8, the square 2 * 6^3, and their product with the map 2 * 6^2 * 8.
    assert muon_flops(params) == 5 * 2 * (576 + 432 + 576)


def test_muon_updates_equal_optax():
    optimizer = make_optimizer(OptimizerConfig(kind="muon", learning_rate=1.0, weight_decay=0.0, clip=1e9), steps=1)
    params = {"blocks": {"q": jax.random.normal(jax.random.key(0), (2, 4, 3, 2)), "bias": jnp.ones((2, 3))}}
    reference = optax.contrib.muon(1.0, consistent_rms=0.2, muon_weight_dimension_numbers=linear_maps)
    states = [optimizer.transform.init(params), reference.init(params)]
    for step in range(3):
        gradient = jax.tree.map(lambda leaf, step=step: jnp.cos(leaf + step), params)
        ours, states[0] = optimizer.transform.update(gradient, states[0], params)
        theirs, states[1] = reference.update(gradient, states[1], params)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, -other, rtol=1e-4, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("shape", FIRST, ids=" ".join)
def test_muon_applies_to_exactly_the_linear_maps_of_a_model(shape):
    config = config_with(*shape)
    params, names = abstract(config), functional(config).axes
    maps = jax.tree.map(lambda axes, rule: (axes, rule), names, linear_maps(params), is_leaf=is_axes)
    for path, (axes, rule) in jax.tree_util.tree_leaves_with_path(maps, is_leaf=is_axes):
        leaf, map_axes = path[-1].key, [axis for axis in axes if not axis.endswith(("layers", "mergers"))]
        tables = {"vocab", "queries", "positions", "buckets", "words"} & {*map_axes}
        # A connector that is a single map ("kernel") is trained by Adam, as embeddings and heads are.
        if len(map_axes) < 2 or tables or leaf.endswith(("bias", "scale", "kernel")):
            assert rule is None, path
            continue
        read, written = ([axes[i] for i in part] for part in rule)
        assert read + written == map_axes, path
        # One side is a stream or the hidden units; the other may have several axes (heads, a patch, merged patches).
        assert [side for side in (read, written) if len(side) == 1 and side[0].endswith(("embed", "mlp"))], path
        assert (leaf in ("q", "k", "v")) == (len(written) > 1), path


@pytest.mark.parametrize("frozen", [(), ("blocks/bias",)])
def test_muon_moments_are_cut_like_parameters(frozen):
    params = {"blocks": {"q": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3))}, "tokens": jnp.ones((5, 4))}
    optimizer = make_optimizer(OptimizerConfig(kind="muon", learning_rate=0.1), steps=4, frozen=frozen)
    kept = trainable(params, frozen)
    _, opt_state = optimizer.transform.update(kept, optimizer.transform.init(kept), kept)

    def cut(tree):
        return {"blocks": {name: leaf[:1] for name, leaf in tree["blocks"].items()}, "tokens": tree["tokens"][:, :2]}

    small = map_moments(opt_state, params, optimizer, cut)
    fresh = jax.eval_shape(optimizer.transform.init, trainable(cut(params), frozen))
    assert jax.tree.structure(small) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, fresh)


@pytest.mark.parametrize("frozen", [(), ("a/bias",)])
def test_moments_are_cut_like_parameters(frozen):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), steps=4, frozen=frozen)
    state = init_state(PARAMS, optimizer)
    kept = trainable(PARAMS, frozen)
    _, opt_state = optimizer.transform.update(kept, state.opt_state, kept)

    def cut(tree):
        return {"a": {"kernel": tree["a"]["kernel"][:, :1], "bias": tree["a"]["bias"][:1]}, "ab": tree["ab"]}

    small = map_moments(opt_state, PARAMS, optimizer, cut)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(optimizer.transform.init, trainable(cut(PARAMS), frozen)))
    assert jax.tree.map(jnp.shape, small) == shapes
    before, after = (optax.tree.get(x, "nu")["a"]["kernel"] for x in (opt_state, small))
    np.testing.assert_array_equal(after, before[:, :1])
    assert optax.tree.get(small, "count") == 1


def test_the_state_copies_the_parameters():
    state = init_state(PARAMS, make_optimizer(OptimizerConfig(learning_rate=0.1), steps=4))
    assert state.params["ab"] is not PARAMS["ab"]
    assert state.params["ab"].unsafe_buffer_pointer() != PARAMS["ab"].unsafe_buffer_pointer()


def test_trained_parameters_of_bfloat16_files_are_float32():
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    state = init_state(narrow, make_optimizer(OptimizerConfig(learning_rate=0.1), steps=4, frozen=("a/bias",)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable(state.params, ("a/bias",)))} == {"float32"}
    assert state.params["a"]["bias"].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(optax.tree.get(state.opt_state, "nu"))} == {"float32"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_cut_may_remove_parameters_with_their_moments(kind):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, kind=kind), steps=4)

    def cut(tree):
        return {"a": {"kernel": tree["a"]["kernel"][:, :1]}, "ab": tree["ab"]}

    small = map_moments(init_state(PARAMS, optimizer).opt_state, PARAMS, optimizer, cut)
    fresh = jax.eval_shape(optimizer.transform.init, cut(PARAMS))
    assert jax.tree.structure(small) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, fresh)
