"""The one bridge from NNX modules to pure functions over trees of arrays."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from antgmm_jax.axes import sizes
from antgmm_jax.blocks.pictures import Images, by_row
from antgmm_jax.config import LMMConfig, Remat
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.lmm import LMM
from antgmm_jax.parallel import sharding

Params = Any
"""A nested dict of arrays; the blocks of a stack lie stacked on a leading axis."""


class Functional(NamedTuple):
    """A model as pure functions of its parameters.

    Attributes:
        init: key -> parameters, float32.
        apply: (params, batch, gates=None, *, collect=()) -> dict with `logits` [B, T, V] and every collected name:
            `final` [B, T, D], `<tower>/states` [L + 1, B, N, D], `bridge/out` [1, B * M, N, D] (of image towers B * M
            in the place of B, for M picture slots a row), or an axis name (norms of its units [L, B, units]; of widths
            and of a bridge's one layer [B, units]). `gates` is a flat dict axis -> array, `[n]` where the axis is
            shared, `[L, n]` where it is local. Under jit what the caller does not use is not computed.
        head: (params, hidden [..., D], gates=None) -> logits [..., V].
        features: (params, images) -> `vision_features` [B, M, N, D], which a batch may have in the place of pictures.
        vision: (params, images) -> the image encoder's states [B * M, N, D] and the features made of them.
        axes: tree like the parameters, each leaf the tuple of its axes' names.
        over: the same, each leaf the tokens that a linear map's kernel multiplies: a tower, a key of
            `LMMConfig.tokens`, or "" for what is no such kernel.
        graph: what `nnx.merge` needs to rebuild the module from the parameters.
    """

    init: Callable[..., Params]
    apply: Callable[..., dict[str, jax.Array]]
    head: Callable[..., jax.Array]
    features: Callable[..., jax.Array]
    vision: Callable[..., tuple[jax.Array, jax.Array]]
    axes: Any
    over: Any
    graph: Any


def functional(config: LMMConfig, remat: Remat = "dots") -> Functional:
    """Pure functions of a model; nothing is allocated.

    Args:
        config: the model.
        remat: what its stacks keep for the backward pass (`antgmm_jax.blocks.stack.rematerialised`); no value changes.

    Returns:
        Its init, apply, head, features, vision, axis names and graph.

    Raises:
        AntgmmError: no such policy.
    """
    if remat not in get_args(Remat):
        raise AntgmmError(f"remat = {remat!r}: give one of {', '.join(get_args(Remat))}")
    return _functional(config, remat)


@lru_cache(maxsize=64)
def _functional(config: LMMConfig, remat: Remat) -> Functional:
    build = family(config).build
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config, remat=remat, rngs=nnx.Rngs(0))))
    axes, over = (_map_variables(lambda v, name=name: v.get_metadata()[name], state) for name in ("axes", "over"))

    def model(params: Params) -> LMM:
        return nnx.merge(graph, nnx.State(params))

    def init(key: jax.Array) -> Params:
        return sharding.lay(nnx.to_pure_dict(nnx.state(build(config, remat=remat, rngs=nnx.Rngs(key)))), axes)

    def apply(params: Params, batch, gates: Mapping[str, jax.Array] | None = None, *, collect=()):
        return model(params)(batch, gates or {}, collect)

    def head(params: Params, hidden: jax.Array, gates: Mapping[str, jax.Array] | None = None):
        return model(params).language.head(hidden, gates or {})

    def features(params: Params, images: Images):
        return vision(params, images)[1]

    def vision(params: Params, images: Images):
        whole = model(params)
        states, _ = whole.vision(images, {})
        return states, by_row(whole.bridge.features(states, {})[0], images)

    return Functional(jax.jit(init), apply, head, features, vision, axes, over, graph)


def _map_variables(f, state):
    return nnx.to_pure_dict(jax.tree.map(f, state, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def is_axes(leaf: Any) -> bool:
    """Whether a node of an axes tree is a leaf: a tuple of names."""
    return isinstance(leaf, tuple)


def abstract(config: LMMConfig, dtype=jnp.float32) -> Params:
    """The parameters' shapes and dtypes, nothing allocated."""
    shapes = jax.eval_shape(lambda: functional(config).init(jax.random.key(0)))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)


def float32(config: LMMConfig, params: Params) -> Params:
    """Parameters in float32, on the device or where the mesh's rules put them.

    Args:
        config: the model.
        params: its parameters, numpy or JAX.

    Returns:
        The tree as JAX arrays.
    """
    placed = sharding.lay(params, functional(config).axes)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), placed)


@lru_cache(maxsize=64)
def local_axes(config: LMMConfig) -> frozenset[str]:
    """Axes whose units each layer chooses for itself: those that stand on stacked parameters only.

    Args:
        config: the model.

    Returns:
        Names of local axes; every other axis of `sizes(config)` is shared by all its readers.
    """
    shared: set[str] = set()
    for axes in jax.tree.leaves(functional(config).axes, is_leaf=is_axes):
        stacked = axes[0].endswith("layers")
        # A width stands on unstacked parameters as well, a head axis only where one table serves the stack.
        shared.update(axes[:1] if stacked else axes)
    return frozenset(axis for axis in sizes(config) if axis not in shared)
