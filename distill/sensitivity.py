"""Which of the tokens that the bridge hands on the answers depend on."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel.processes import gather
from distill.losses import LossConfig
from distill.step import make_loss

FLOOR = 0.1
"""Weight of a token that no answer depends on, beside a mean of 1: so that it does not drift away unseen."""
_TINY = 1e-30


def bridge_weights(functional: Any, params: Any, batches: Iterable[Mapping[str, Any]]) -> Float[np.ndarray, " N"]:
    """How much the answers depend on each token that the bridge hands on: what the `bridge` loss weighs it by.

    A token's share of a sample is |dL/df|^2 |f|^2 over the sum of all its tokens, with f the token's features and L the
    sample's cross-entropy: to first order what an equal relative error there does to the loss. Shares, not gradients,
    are averaged, or the few samples that the model is unsure of would decide alone.

    Args:
        functional: of the model that is distilled from.
        params: its parameters.
        batches: calibration batches with pictures, one sample a row; each shape compiles once.

    Returns:
        float32, mean 1, none below about `FLOOR`.

    Raises:
        AntgmmError: there is no batch.
    """
    loss = make_loss(functional, LossConfig(hard=1.0))

    @jax.jit
    def shares(params: Any, batch: Mapping[str, Array]) -> Float[Array, " N"]:
        valid = batch["images"]["valid"]
        rest = {**batch, "images": {"valid": valid}}
        features = functional.features(params, batch["images"])
        gradient = jax.grad(lambda given: loss(params, {}, {**rest, "vision_features": given}, {})[0])(features)
        felt = _square(gradient) * _square(features)
        shares = felt / jnp.maximum(jnp.sum(felt, axis=-1, keepdims=True), _TINY)
        return jnp.mean(shares, axis=(0, 1), where=valid[:, :, None])

    found = [np.asarray(gather(shares(params, batch)), np.float32) for batch in batches]
    if not found:
        raise AntgmmError("the weights of the bridge's tokens need at least one calibration batch; there was none")
    mean = np.mean(found, axis=0)
    return (mean / mean.mean() + FLOOR) / (1 + FLOOR)


def _square(values: Float[Array, "B M N D"]) -> Float[Array, "B M N"]:
    # Tiny gradients would vanish when squared.
    values = values.astype(jnp.float32)
    return jnp.sum(jnp.square(values / jnp.maximum(jnp.max(jnp.abs(values)), _TINY)), axis=-1)
