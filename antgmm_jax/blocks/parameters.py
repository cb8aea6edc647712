"""Parameters of modules: described when a module is built, drawn when a model is initialised."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def param(
    shape: tuple[int, ...], axes: tuple[str, ...], *, mean: float = 0.0, scale: float = 0.0, over: str = ""
) -> nnx.Param:
    """Describes a parameter with named axes. It has no value: building a module computes nothing.

    Args:
        shape: one size per axis.
        axes: one name per axis; axes with a "/" in their name can be pruned.
        mean: mean of the initial values.
        scale: standard deviation of the initial values, which are normally distributed.
        over: for the kernel of a linear map, the tokens that it multiplies: a tower, or a key of `LMMConfig.tokens`.

    Returns:
        An `nnx.Param` of a float32 shape with the other arguments as metadata.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, mean=mean, scale=scale, over=over)


def repeated_module(build: Callable[[], nnx.Module], count: int, axis: str) -> Any:
    """Builds `count` modules as one, with parameters stacked on a leading axis of the given name."""
    module = build()
    for _, leaf in nnx.iter_graph(module):
        if isinstance(leaf, nnx.Variable):
            one = leaf.get_value()
            leaf.set_value(jax.ShapeDtypeStruct((count, *one.shape), one.dtype))
            leaf.set_metadata(axes=(axis, *leaf.get_metadata()["axes"]))
    return module


def drawn(state: Any, key: jax.Array) -> Any:
    """Draws the initial values of parameters.

    Args:
        state: `nnx.State` of parameters as `param` describes them.
        key: random key.

    Returns:
        The state with arrays.
    """
    leaves, structure = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def one(leaf: nnx.Variable, key: jax.Array) -> nnx.Variable:
        about, shape = leaf.get_metadata(), leaf.get_value()
        value = jnp.full(shape.shape, about["mean"], shape.dtype)
        return leaf.replace(value + about["scale"] * jax.random.normal(key, shape.shape) if about["scale"] else value)

    return jax.tree.unflatten(structure, map(one, leaves, jax.random.split(key, len(leaves))))
