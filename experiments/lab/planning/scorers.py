"""The programs that score units before a cut, as `experiments.run.calibration` runs them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from antgmm_jax.config import LMMConfig
from antgmm_jax.pure import functional, local_axes
from distill import LossConfig, make_loss
from distill.teacher import model_inputs
from experiments.run.calibration import scored_by
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
    pure, used, scored = functional(config, remat), {*methods.values()}, scored_by(config, methods)

    def apply(params: Any, batch: Any, *, collect: tuple[str, ...]) -> Any:
        return pure.apply(params, model_inputs(batch), collect=collect)

    if "taylor" in used:
        loss = make_loss(pure, LossConfig(hard=1.0), dtype=jnp.dtype(dtype))
        yield lambda params, batch: gate_gradient(lambda p, g, b: loss(p, g, b, {})[0], params, scored.gates, batch)
    if "activation" in used:
        yield partial(activation_norms, apply, scored.units, frozenset(local_axes(config)))
    if "block_influence" in used:
        yield partial(influences, apply, scored.towers)
    if "principal" in used:
        yield partial(second_moments, apply, config, scored.widths)
