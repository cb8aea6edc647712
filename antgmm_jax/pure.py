"""Models as pure functions over trees of arrays."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from antgmm_jax.axes import sizes
from antgmm_jax.blocks import low_rank
from antgmm_jax.blocks.parameters import drawn
from antgmm_jax.blocks.pictures import Images, by_row
from antgmm_jax.config import LMMConfig, Remat
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.lmm import LMM
from antgmm_jax.parallel import sharding

Params = Any
"""A nested dict of arrays; the blocks of a stack are stacked on a leading axis."""


class Functional(NamedTuple):
    """A model as pure functions of its parameters.

    Attributes:
        init: key -> parameters, float32.
        apply: (params, batch, gates=None, *, collect=()) -> dict with `logits` [B, T, V] and every collected name:
            `final` [B, T, D], `<tower>/states` [L + 1, B, N, D], `bridge/out` [1, B * M, N, D] (image towers have
            B * M instead of B, with M image slots per row), or an axis name (norms of its units [L, B, units];
            [B, units] for widths and for a bridge with one layer). `gates` is a flat dict axis -> array, `[n]` for a
            shared axis, `[L, n]` for a local one. A batch padded on the right may hold `lengths` [B], the tokens of
            each row, with which kernels skip padding. Under jit, unused outputs are not computed.
        head: (params, hidden [..., D], gates=None) -> logits [..., V].
        features: (params, images) -> `vision_features` [B, M, N, D], which a batch may hold instead of images.
        vision: (params, images) -> states of the image encoder [B * M, N, D], and the features computed from them.
        shapes: tree like the parameters; each leaf is a float32 `jax.ShapeDtypeStruct`.
        axes: tree like the parameters; each leaf is the tuple of its axis names.
        over: tree like the parameters; for a linear kernel, the name of the token sequence that passes through it (a
            tower, or a key of `LMMConfig.tokens`), from which FLOPs are counted; "" for other parameters.
        graph: graph definition for `nnx.merge`.
    """

    init: Callable[..., Params]
    apply: Callable[..., dict[str, jax.Array]]
    head: Callable[..., jax.Array]
    features: Callable[..., jax.Array]
    vision: Callable[..., tuple[jax.Array, jax.Array]]
    shapes: Params
    axes: Any
    over: Any
    graph: Any


def functional(config: LMMConfig, remat: Remat | str = "dots") -> Functional:
    """Returns a model as pure functions, without allocating parameters.

    Args:
        config: model config.
        remat: what the stacks save for the backward pass (`antgmm_jax.blocks.stack.rematerialised`); results do not
            depend on it.

    Returns:
        The model's functions, axis names and graph.

    Raises:
        AntgmmError: no such rematerialisation policy.
    """
    if remat not in get_args(Remat):
        raise AntgmmError(f"remat = {remat!r}: give one of {', '.join(get_args(Remat))}")
    return _functional(config, cast(Remat, remat))


@lru_cache(maxsize=64)
def _functional(config: LMMConfig, remat: Remat) -> Functional:
    graph, state = nnx.split(family(config).build(config, remat=remat))
    axes, over = (_map_variables(lambda v, name=name: v.get_metadata()[name], state) for name in ("axes", "over"))

    def model(params: Params) -> LMM:
        return nnx.merge(graph, nnx.State(_arrays(params)))

    def gathered(params: Params) -> Params:
        """Gathers the parameters outside of the stacks and of the vocabulary, which are gathered at their use."""

        def one(leaf: Any, names: tuple[str, ...]) -> Any:
            apart = "vocab" in names or any(name.endswith("layers") for name in names)
            return leaf if apart else low_rank.gathered(leaf, names)

        def adapted(node: Any) -> bool:
            return isinstance(node, low_rank.LowRank)

        return jax.tree.map(one, params, axes, is_leaf=adapted) if sharding.splits_widths() else params

    def init(key: jax.Array) -> Params:
        return sharding.place_tree(nnx.to_pure_dict(drawn(state, key)), axes)

    def apply(params: Params, batch, gates: Mapping[str, Any] | None = None, *, collect=()):
        return model(gathered(params))(_arrays(batch), _arrays(gates or {}), collect)

    def head(params: Params, hidden: Any, gates: Mapping[str, Any] | None = None):
        return model(params).language.head(jnp.asarray(hidden), _arrays(gates or {}))

    def features(params: Params, images: Images):
        return vision(params, images)[1]

    def vision(params: Params, images: Images):
        whole, images = model(gathered(params)), _arrays(images)
        states, _ = whole.vision(images, {})
        return states, by_row(whole.bridged(states, images, {})[0], images)

    return Functional(jax.jit(init), apply, head, features, vision, nnx.to_pure_dict(state), axes, over, graph)


def _arrays(tree: Any) -> Any:
    """Converts NumPy leaves to JAX arrays."""
    return jax.tree.map(jnp.asarray, tree)


def _map_variables(f, state):
    return nnx.to_pure_dict(jax.tree.map(f, state, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def is_axes(leaf: Any) -> bool:
    """Whether a node of an axes tree is a leaf, that is a tuple of names."""
    return isinstance(leaf, tuple)


def abstract(config: LMMConfig, dtype=jnp.float32) -> Params:
    """Shapes and dtypes of the parameters, without allocating them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), functional(config).shapes)


@lru_cache(maxsize=64)
def local_axes(config: LMMConfig) -> frozenset[str]:
    """Returns the axes for which each layer keeps its own units: those of stacked parameters only.

    Args:
        config: model config.

    Returns:
        Names of the local axes. All other axes of `sizes(config)` are shared between layers.
    """
    shared: set[str] = set()
    for axes in jax.tree.leaves(functional(config).axes, is_leaf=is_axes):
        stacked = axes[0].endswith("layers")
        # Widths also appear on unstacked parameters; a head axis does if one bias table serves the whole stack.
        shared.update(axes[:1] if stacked else axes)
    return frozenset(axis for axis in sizes(config) if axis not in shared)
