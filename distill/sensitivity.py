"""Sensitivity of the answers to each token of the bridge's output."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from antgmm_jax.blocks.merger import squares
from antgmm_jax.blocks.pictures import without_pixels
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel.processes import gather
from distill.losses import LossConfig
from distill.step import make_loss
from distill.teacher import params_dtype

FLOOR = 0.1
"""Added to the weights (with mean 1), so that tokens on which no answer depends do not drift."""
_TINY = 1e-30


def bridge_weights(functional: Any, params: Any, batches: Iterable[Mapping[str, Any]]) -> Float[np.ndarray, " Q"]:
    """Computes weights of the bridge's output tokens by how much the answers depend on them.

    The share of a token in a sample is |dL/df|^2 |f|^2, normalised over the tokens of all its images, with features f
    and cross-entropy L: the first-order effect of an equal relative error on the loss. A bridge that merges the patches
    of a square to one token has the sum of their shares for it. Averaging shares over samples with images, not
    gradients, prevents a few samples with large gradients from dominating.

    Args:
        functional: `Functional` of the teacher.
        params: parameters of the teacher, in the dtype to compute in.
        batches: calibration batches with images, one sample per row; each shape is compiled once.

    Returns:
        float32 weights with mean 1, at least about `FLOOR`; equal ones if no answer depends on an image, or if an image
        has one token, for which nothing is computed.

    Raises:
        AntgmmError: there is no batch.
    """
    summed, by_batch = jax.jit(token_shares(functional, params_dtype(params))), []
    tokens, in_order = 0, False
    for batch in batches:
        tokens = tokens or _output_tokens(functional, params, batch)
        if tokens == 1:
            return np.ones(1, np.float32)
        by_batch.append(np.asarray(gather(summed(params, batch)), np.float32))
        in_order = "place" in batch["images"]
    if not by_batch:
        raise AntgmmError("bridge weights need at least one calibration batch; there was none")
    # The shares of a sample have the sum 1, or 0 if its answers depend on no image. Divided by the mean over tokens,
    # their sum over samples is their average.
    total = _of_outputs(np.sum(by_batch, axis=0), tokens, in_order)
    return ((total / total.mean() if total.any() else np.ones_like(total)) + FLOOR) / (1 + FLOOR)


def token_shares(functional: Any, dtype: DTypeLike) -> Callable[[Any, Mapping[str, Any]], Float[Array, " N"]]:
    """Returns the function that `bridge_weights` applies to each batch.

    Args:
        functional: `Functional` of the teacher.
        dtype: dtype of its parameters and computation.

    Returns:
        (parameters, batch) -> share of each feature of an image, summed over the images of all rows.
    """
    loss = make_loss(functional, LossConfig(hard=1.0), dtype=dtype)

    def summed(params: Any, batch: Mapping[str, Any]) -> Float[Array, " N"]:
        rest = {**batch, "images": without_pixels(batch["images"])}
        features = functional.features(params, batch["images"])
        gradient = jax.grad(lambda candidate: loss(params, {}, {**rest, "vision_features": candidate}, {})[0])(features)
        effect = jnp.where(batch["images"]["valid"][:, :, None], _square(gradient) * _square(features), 0.0)
        return jnp.sum(effect / jnp.maximum(jnp.sum(effect, axis=(1, 2), keepdims=True), _TINY), axis=(0, 1))

    return summed


def _output_tokens(functional: Any, params: Any, batch: Mapping[str, Any]) -> int:
    """Number of tokens of the bridge's output for each image slot; nothing is computed."""
    return jax.eval_shape(partial(functional.apply, collect=(OUT,)), params, batch)[OUT].shape[2]


def _of_outputs(shares: Float[np.ndarray, " N"], tokens: int, in_order: bool) -> Float[np.ndarray, " Q"]:
    """Sums the shares of the patches that the bridge merges to one token: those of a square of the image.

    `in_order`: a slot has a place in the image, and the patches of a token stand one after another.
    """
    if in_order or tokens == len(shares):
        return shares.reshape(tokens, -1).sum(axis=1)
    side = round((len(shares) / tokens) ** 0.5)
    return np.asarray(squares(jnp.asarray(shares)[None, :, None], side))[0, :, :, 0].sum(1)


def _square(values: Float[Array, "B M N D"]) -> Float[Array, "B M N"]:
    # Normalise first: the squares of tiny gradients would underflow.
    values = values.astype(jnp.float32)
    return jnp.sum(jnp.square(values / jnp.maximum(jnp.max(jnp.abs(values)), _TINY)), axis=-1)
