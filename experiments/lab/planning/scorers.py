"""The programs that score units before a cut, as `experiments.run.calibration` runs them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

import pruning
from antgmm_jax.config import LMMConfig, towers
from antgmm_jax.pure import functional, local_axes
from distill import LossConfig, make_loss
from pruning.components import second_moments
from pruning.importance import activation_norms, gate_gradient, influences


def scorers(config: LMMConfig, methods: Mapping[str, str], dtype: str, remat: str) -> Iterator[Callable[..., Any]]:
    """Yields functions (params, batch) -> scores of a batch, one for each method that reads data.

    Args:
        config: config of the model.
        methods: axis -> importance method.
        dtype: dtype of the computation.
        remat: what Taylor scores store for the backward pass.
    """
    pure, used = functional(config, remat), {*methods.values()}

    def apply(params: Any, batch: Any, *, collect: tuple[str, ...]) -> Any:
        return pure.apply(params, batch, collect=collect)

    if "taylor" in used:
        loss = make_loss(pure, LossConfig(hard=1.0), dtype=jnp.dtype(dtype))
        gates = {axis: gate for axis, gate in pruning.ones(config).items() if methods.get(axis) == "taylor"}
        yield lambda params, batch: gate_gradient(lambda p, g, b: loss(p, g, b, {})[0], params, gates, batch)
    if "activation" in used:
        axes = tuple(sorted(axis for axis in methods if not axis.endswith("/layers")))
        yield partial(activation_norms, apply, axes, frozenset(local_axes(config)))
    if "block_influence" in used:
        deep = tuple(tower for tower in towers(config).values() if tower.axis("layers") in methods)
        yield partial(influences, apply, deep)
    if "principal" in used:
        yield partial(second_moments, apply, config, tuple(a for a, method in methods.items() if method == "principal"))
