"""Low-rank adapters (LoRA, arXiv 2106.09685): linear maps are trained through a product of two small factors."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from antgmm_jax.blocks.low_rank import LowRank
from antgmm_jax.pure import Functional, Params
from distill.optimizer import linear_maps
from distill.trainable import by_path, check_prefixes, longest_prefix

ADAPTERS = "adapters"
"""Top-level name of the adapters beside the parameters of a model."""

Ranks = Mapping[str, int]
"""Path prefix of parameters -> rank of the adapters of the linear maps under it; the longest prefix applies."""


def with_adapters(params: Params, ranks: Ranks, key: jax.Array) -> Params:
    """Returns parameters with new adapters, which do not change the model yet.

    Args:
        params: model parameters.
        ranks: path prefix -> rank; empty for none.
        key: random key.

    Returns:
        `params` and, unless there are none, under `ADAPTERS`, {path: {"a" [L, in, rank], "b" [L, rank, out]}} with flat
        inputs and outputs, without L for a map outside of the stacks. `a` is random, `b` zero.
    """
    if not ranks:
        return params
    factors = {}
    for path, (layers, inputs, outputs, rank) in _maps(params, ranks).items():
        key, own = jax.random.split(key)
        a = inputs**-0.5 * jax.random.normal(own, (*layers, inputs, rank))
        factors[path] = {"a": a, "b": jnp.zeros((*layers, rank, outputs))}
    return {**params, ADAPTERS: factors}


def shapes_with_adapters(params: Params, ranks: Ranks) -> Params:
    """Returns the shapes of parameters with adapters; nothing is allocated.

    Args:
        params: model parameters, or their shapes.
        ranks: as in `with_adapters`.
    """
    return jax.eval_shape(lambda: with_adapters(params, ranks, jax.random.key(0)))


def merged(params: Params, *, own: bool = False) -> Params:
    """Returns the parameters of the model, with the product of each adapter added to its map.

    Args:
        params: from `with_adapters`, at any later step of training.
        own: whether nothing else uses the arrays: each map is freed once the sum is computed, so that the devices never
            hold all maps twice.

    Returns:
        Model parameters.
    """

    def sum_of(leaf: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        total = _sum(leaf, a, b)
        if own:
            jax.block_until_ready(total)
            leaf.delete()
        return total

    return _joined(params, sum_of) if ADAPTERS in params else params


@jax.jit
def _sum(leaf: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    # Accelerators would round the factors to TF32 or bfloat16.
    return leaf + jnp.matmul(a, b, precision="highest").reshape(leaf.shape)


def adapted(functional: Functional, ranks: Ranks) -> Functional:
    """Returns the functions of a model as functions of parameters with adapters.

    Args:
        functional: the model.
        ranks: as in `with_adapters`.

    Returns:
        `apply` and `head`, whose linear maps multiply by the factors (`LowRank`), and the axes of parameters with
        adapters; all other fields are the model's. The adapters are not split over devices.
    """

    if not ranks:
        return functional

    def of_factors(function: Callable) -> Callable:
        return lambda params, *args, **options: function(_joined(params, LowRank), *args, **options)

    maps = _maps(functional.shapes, ranks)
    whole = {path: dict.fromkeys("ab", ("",) * (len(layers) + 2)) for path, (layers, *_) in maps.items()}
    return functional._replace(
        apply=of_factors(functional.apply),
        head=of_factors(functional.head),
        axes={**functional.axes, ADAPTERS: whole},
    )


def _joined(params: Params, join: Callable[[jax.Array, jax.Array, jax.Array], Any]) -> Params:
    """Model parameters with `join(map, a, b)` in place of each map that has an adapter."""
    adapters, model = params[ADAPTERS], {name: tree for name, tree in params.items() if name != ADAPTERS}
    leaves, treedef = by_path(model)
    values = [join(leaf, *adapters[path].values()) if path in adapters else leaf for path, leaf in leaves.items()]
    return jax.tree.unflatten(treedef, values)


def _maps(params: Params, ranks: Ranks) -> dict[str, tuple[tuple[int, ...], int, int, int]]:
    """Layers ((), outside of the stacks), inputs, outputs and rank of each linear map with an adapter, by path.

    Raises:
        AntgmmError: a prefix of `ranks` has no linear map, so that nothing below it would be trained.
    """
    numbers, _ = jax.tree.flatten(linear_maps(params, connector=True), is_leaf=lambda node: not isinstance(node, dict))
    pairs = zip(by_path(params)[0].items(), numbers, strict=True)
    linear = {path: (leaf.shape, dims) for (path, leaf), dims in pairs if dims is not None}
    check_prefixes("adapters of", [*ranks], linear, "linear map")
    sizes: dict[str, Any] = {}
    for path, (shape, dims) in linear.items():
        if prefix := longest_prefix(path, ranks):
            inputs, outputs = (prod(shape[i] for i in axes) for axes in dims)
            sizes[path] = (shape[: dims[0][0]], inputs, outputs, ranks[prefix])
    return sizes
