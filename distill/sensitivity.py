"""Sensitivity of the answers to each token of the bridge's output."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

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

    The share of a token in a sample is |dL/df|^2 |f|^2, normalised over the sample's tokens, with features f and
    cross-entropy L: the first-order effect of an equal relative error on the loss. A bridge that merges the patches of
    a square to one token has the sum of their shares for it. Averaging shares, not gradients, prevents a few samples
    with large gradients from dominating.

    Args:
        functional: `Functional` of the teacher.
        params: parameters of the teacher, in the dtype to compute in.
        batches: calibration batches with images, one sample per row; each shape is compiled once.

    Returns:
        float32 weights with mean 1, at least about `FLOOR`; equal ones if no batch has an image.

    Raises:
        AntgmmError: there is no batch.
    """
    summed, tokens, by_batch = jax.jit(token_shares(functional, params_dtype(params))), 0, []
    for batch in batches:
        tokens = tokens or _output_tokens(functional, params, batch)
        by_batch.append(gather(summed(params, batch)))
    if not by_batch:
        raise AntgmmError("bridge weights need at least one calibration batch; there was none")
    sums, images = (sum(np.asarray(part, np.float32) for part in parts) for parts in zip(*by_batch, strict=True))
    mean = _of_outputs(sums / np.maximum(images, 1), tokens)
    return ((mean / mean.mean() if images else np.ones_like(mean)) + FLOOR) / (1 + FLOOR)


def token_shares(
    functional: Any, dtype: DTypeLike
) -> Callable[[Any, Mapping[str, Any]], tuple[Float[Array, " N"], Int[Array, ""]]]:
    """Returns the function that `bridge_weights` applies to each batch.

    Args:
        functional: `Functional` of the teacher.
        dtype: dtype of its parameters and computation.

    Returns:
        (parameters, batch) -> share of each feature of an image, summed over the images, and their number.
    """
    loss = make_loss(functional, LossConfig(hard=1.0), dtype=dtype)

    def summed(params: Any, batch: Mapping[str, Any]) -> tuple[Float[Array, " N"], Int[Array, ""]]:
        valid = batch["images"]["valid"]
        rest = {**batch, "images": without_pixels(batch["images"])}
        features = functional.features(params, batch["images"])
        gradient = jax.grad(lambda candidate: loss(params, {}, {**rest, "vision_features": candidate}, {})[0])(features)
        effect = _square(gradient) * _square(features)
        shares = effect / jnp.maximum(jnp.sum(effect, axis=-1, keepdims=True), _TINY)
        return jnp.sum(shares, axis=(0, 1), where=valid[:, :, None]), valid.sum()

    return summed


def _output_tokens(functional: Any, params: Any, batch: Mapping[str, Any]) -> int:
    """Number of tokens of the bridge's output for each image slot; nothing is computed."""
    return jax.eval_shape(partial(functional.apply, collect=(OUT,)), params, batch)[OUT].shape[2]


def _of_outputs(shares: Float[np.ndarray, " N"], tokens: int) -> Float[np.ndarray, " Q"]:
    """Sums the shares of the patches that the bridge merges to one token: all, or those of a square of the image."""
    if tokens in (1, len(shares)):
        return shares.reshape(tokens, -1).sum(1)
    side = round((len(shares) / tokens) ** 0.5)
    return np.asarray(squares(jnp.asarray(shares)[None, :, None], side))[0, :, :, 0].sum(1)


def _square(values: Float[Array, "B M N D"]) -> Float[Array, "B M N"]:
    # Normalise first: the squares of tiny gradients would underflow.
    values = values.astype(jnp.float32)
    return jnp.sum(jnp.square(values / jnp.maximum(jnp.max(jnp.abs(values)), _TINY)), axis=-1)
