"""A model's head as a function of the parameters that it reads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = Any


def reads(head: Callable[..., Any], params: Params, *arguments: Any) -> tuple[list[int], Callable[..., Any]]:
    """Returns which parameters a head reads, and the head as a function of only these.

    Args:
        head: (params, *arguments) -> logits, or another tree.
        params: parameters of the whole model, or their shapes.
        arguments: the other arguments, or their shapes.

    Returns:
        Numbers of the leaves of `params`, and (list of these leaves, *arguments) -> logits.
    """
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    traced = jax.make_jaxpr(lambda leaves, *rest: head(jax.tree.unflatten(treedef, leaves), *rest))(shapes, *arguments)
    read = {id(v) for eqn in traced.jaxpr.eqns for v in eqn.invars} | {id(v) for v in traced.jaxpr.outvars}
    chosen = [i for i, v in enumerate(traced.jaxpr.invars[: len(leaves)]) if id(v) in read]

    def of_read(used: list[Array], *arguments: Any) -> Any:
        # Zeros stand in for the other parameters; the compiler removes them.
        full = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
        for i, leaf in zip(chosen, used, strict=True):
            full[i] = leaf
        return head(jax.tree.unflatten(treedef, full), *arguments)

    return chosen, of_read
