"""Attention within segments, by blocks of queries and keys: memory grows linearly with the length of a row.

Blocks without a common segment are skipped: the time of more images of one size grows linearly too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from antgmm_jax.blocks import flash
from antgmm_jax.blocks.packing import same_sample
from antgmm_jax.parallel.sharding import padded_batch_size

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Logit of a masked key; far enough from the float32 limit that nothing overflows."""
LARGEST = 2**27
"""Bytes on a device: a row of 1 448 positions with 16 heads in float32."""
_BLOCK = 256
"""Positions. On a CPU, for 576 positions of 16 heads of 80, blocks of 256 take 0.061 s forward and 0.29 s with the
gradient, of 512 (more padding) 0.13 and 0.54, and all pairs at once 0.043 and 0.17: as much per pair with padding."""
_QUERIES = 1024
"""Queries that a kernel with a mask gets at once: for 65 536 keys, their mask in bfloat16 takes 134 MB a row."""
_NUMBER_OF_PADDING = int(jnp.iinfo(jnp.int32).max)  # behind all others, so that blocks with padding span few segments


def is_large(q: Any, bytes_per_pair: int) -> bool:
    """Whether what attention holds for all pairs of positions of a device's rows is too much, or too slow.

    Args:
        q: queries [B, T, N, d], of which only the shape is read.
        bytes_per_pair: bytes that the other path holds for a query and a key.

    Returns:
        Whether blocks are better.
    """
    rows = -(-q.shape[0] // padded_batch_size(1))
    return rows * q.shape[1] ** 2 * bytes_per_pair > LARGEST


def attend(
    q: Float[Array, "B T N d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    *,
    scale: float,
    causal: bool,
    segments: Int[Array, "B T"],
    size: int | None = None,
) -> Float[Array, "B T N d"]:
    """Computes self-attention by XLA with an online softmax (arXiv 2205.14135), on each device for its rows and heads.

    Args:
        q: queries.
        k, v: keys and values, heads before positions; N is a multiple of K.
        scale: factor of the logits.
        causal: whether query t sees only keys up to t.
        segments: queries see the keys with their own number.
        size: positions of a block; `_BLOCK` by default.

    Returns:
        Outputs of the heads.
    """
    size = size or _BLOCK

    def run(q: Array, k: Array, v: Array, numbers: tuple[Array, Array]) -> Array:
        length, groups, padded = q.shape[1], k.shape[1], partial(flash.padded, size=size)
        q, segments = padded(q, 1), padded(numbers[0], 1, _NUMBER_OF_PADDING)
        q = rearrange(q, "b (n t) (k g) d -> b n k (g t) d", k=groups, t=size)
        k, v = (rearrange(padded(x, 2), "b k (n s) d -> b n k s d", s=size) for x in (k, v))
        out: Array = _by_blocks(scale, causal, q, k, v, rearrange(segments, "b (n t) -> b n t", t=size))
        return rearrange(out, "b n k (g t) d -> b (n t) (k g) d", t=size)[:, :length]

    return flash.on_each_device(run, q, k, v, (segments, segments))


def by_queries(
    run: Callable[..., Array],
    q: Float[Array, "B T N d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    *,
    causal: bool,
    segments: Int[Array, "B T"],
) -> Float[Array, "B T N d"]:
    """Computes self-attention by a kernel that needs a mask of all pairs, for a block of queries after the other.

    Args:
        run: the kernel, of queries, keys, values and `mask`.
        q: queries.
        k, v: keys and values.
        causal: whether query t sees only keys up to t.
        segments: queries see the keys with their own number.

    Returns:
        Outputs of the heads.
    """
    length, dtype = q.shape[1], k.dtype

    @partial(jax.checkpoint, prevent_cse=False)
    def block(k: Array, v: Array, q: Array, numbers: Array, at: Array) -> Array:
        mask = same_sample(numbers, segments)
        if causal:
            mask = mask & (jnp.arange(length)[None, :] <= at[:, None])[None, None]
        return run(q, k.astype(dtype), v.astype(dtype), mask=mask)

    # The last queries are repeated: every query must see a key.
    ends = [(0, 0), (0, -length % _QUERIES), (0, 0), (0, 0)]
    q, numbers, at = (
        jnp.pad(x, ends[: x.ndim], mode="edge") for x in (q, segments, jnp.arange(length, dtype=jnp.int32)[None])
    )
    q, numbers, at = (rearrange(x, "b (n t) ... -> n b t ...", t=_QUERIES) for x in (q, numbers, at))
    # Gradients of keys and values are summed over the blocks in float32.
    k, v = (x.astype(jnp.float32) for x in (k, v))
    out = jax.lax.map(lambda here: block(k, v, here[0], here[1], here[2][0]), (q, numbers, at))
    return rearrange(out, "n b t h d -> b (n t) h d")[:, :length]


def _reach(segments: Int[Array, "n t"], causal: bool) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """The first block of keys that each block of queries sees, and the one after the last.

    Numbers of segments are compared as ranges, which are short if the numbers grow with the positions.
    """
    count = len(segments)
    low, high = segments.min(axis=1), segments.max(axis=1)
    seen = (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])
    if causal:
        seen = seen & jnp.tri(count, dtype=bool)
    return jnp.argmax(seen, axis=1), count - jnp.argmax(seen[:, ::-1], axis=1)


def _logits(q: Array, k: Array, scale: float, seen: Bool[Array, "t s"]) -> Float[Array, "K Gt s"]:
    """Logits of a block of queries [K, G * t, d] and a block of keys [K, s, d]."""
    size = len(seen)
    logits = _float_product(q, k.swapaxes(1, 2)) * scale
    whole = logits.reshape(len(k), -1, size, size)
    return jnp.where(seen[None, None], whole, HIDDEN).reshape(logits.shape)


def _seen(segments: Int[Array, "n t"], row: Array, column: Array, causal: bool) -> Bool[Array, "t t"]:
    """Which keys of block `column` the queries of block `row` see."""
    at, seen = jnp.arange(segments.shape[1]), segments[row][:, None] == segments[column][None, :]
    if causal:
        seen = seen & ((row > column) | (at[:, None] >= at[None, :]))
    return seen


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_blocks(
    scale: float,
    causal: bool,
    q: Float[Array, "B n K Gt d"],
    k: Float[Array, "B n K t d"],
    v: Float[Array, "B n K t d"],
    segments: Int[Array, "B n t"],
) -> Float[Array, "B n K Gt d"]:
    """Attention of blocks of queries to blocks of keys."""
    return _forward(scale, causal, q, k, v, segments)[0]


def _forward(scale: float, causal: bool, q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, Any]:
    """The outputs, and what the backward pass reads: those of the kernel for TPUs have the same name."""

    def of_row(row: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, segments = row

        def of_block(block: tuple[Array, ...]) -> tuple[Array, Array]:
            q, at, first, end = block

            def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                highest, total, out = carry
                logits = _logits(q, k[j], scale, _seen(segments, at, j, causal))
                new = jnp.maximum(highest, logits.max(axis=-1, keepdims=True))
                weights, old = jnp.exp(logits - new), jnp.exp(highest - new)
                more = _float_product(weights.astype(v.dtype), v[j])
                return new, old * total + weights.sum(axis=-1, keepdims=True), old * out + more

            one = (*q.shape[:-1], 1)
            empty = (jnp.full(one, HIDDEN), jnp.zeros(one), jnp.zeros(q.shape, jnp.float32))
            highest, total, out = jax.lax.fori_loop(first, end, step, empty)
            return (out / total).astype(q.dtype), highest + jnp.log(total)

        return jax.lax.map(of_block, (q, jnp.arange(len(q)), *_reach(segments, causal)))

    made = jax.lax.map(of_row, (q, k, v, segments))
    out, normaliser = (checkpoint_name(x, flash.RESIDUALS) for x in made)
    return out, (q, k, v, segments, out, normaliser)


def _backward(scale: float, causal: bool, saved: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    """Gradients of queries, keys and values; the weights are computed again, block by block."""

    def of_row(row: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, segments, out, normaliser, gradient = row
        inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

        def of_block(sums: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            q, gradient, normaliser, inner, at, first, end = block

            def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq, dk, dv = carry
                weights = jnp.exp(_logits(q, k[j], scale, _seen(segments, at, j, causal)) - normaliser)
                dv = dv.at[j].add(_float_product(weights.astype(v.dtype).swapaxes(1, 2), gradient))
                change = weights * (_float_product(gradient, v[j].swapaxes(1, 2)) - inner) * scale
                change = change.astype(q.dtype)
                dk = dk.at[j].add(_float_product(change.swapaxes(1, 2), q))
                return dq + _float_product(change, k[j]), dk, dv

            dq, dk, dv = jax.lax.fori_loop(first, end, step, (jnp.zeros(q.shape, jnp.float32), *sums))
            return (dk, dv), dq.astype(q.dtype)

        sums = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        blocks = (q, gradient, normaliser, inner, jnp.arange(len(q)), *_reach(segments, causal))
        (dk, dv), dq = jax.lax.scan(of_block, sums, blocks)
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    return *jax.lax.map(of_row, (*saved, gradient)), None


def _float_product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


_by_blocks.defvjp(_forward, _backward)
