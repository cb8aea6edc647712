"""Attention, by flash kernels (cuDNN's on GPUs, Pallas' on TPUs) where possible and by XLA elsewhere."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jaxtyping import Array, Bool, Float, Int

from antgmm_jax.blocks import blocked, flash
from antgmm_jax.blocks import windows as within
from antgmm_jax.blocks.packing import same_sample
from antgmm_jax.blocks.windows import Windows
from antgmm_jax.parallel.sharding import place, platform


def widest_for_cudnn() -> int:
    """Largest head width for which cuDNN's flash attention computes gradients on JAX's own devices; 0 if none.

    None before Ampere (8.0), 256 on Hopper (9.0) and 128 on the others: the support matrix of
    https://docs.nvidia.com/cudnn/operations/Attention. JAX before 0.11.1 brings a frontend in which gradients of masked
    heads of 256 were wrong (https://github.com/NVIDIA/cudnn-frontend/pull/326).
    """
    if platform() != "gpu" or "cuda" not in get_backend().platform_version:
        return 0
    capability = float(jax.local_devices()[0].compute_capability)
    return 0 if capability < 8.0 else 256 if capability == 9.0 and jax.__version_info__ >= (0, 11, 1) else 128


def for_flash_kernel(q: Any, k: Any, mask: Array | None, bias: Array | None, segments: Array | None) -> bool:
    """Whether `attend` uses the flash kernel for TPUs, from the shapes of queries and keys."""
    return platform() == "tpu" and flash.supports(q, k, mask, bias, segments)


def attend(
    q: Float[Array, "B T N d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    *,
    scale: float,
    causal: bool = False,
    mask: Bool[Array, "#B 1 #T S"] | None = None,
    bias: Float[Array, "1 N T S"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    windows: Windows | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N d"]:
    """Computes attention with a float32 softmax, by a flash kernel of the platform where it supports the case.

    cuDNN supports 16-bit inputs and head widths in steps of 8 (`widest_for_cudnn`), and returns the gradient of a bias
    (T5 learns its bias). XLA computes single queries (decoding), and a bias combined with a mask without `lengths`:
    their sum [B, N, T, S] would use the memory that a flash kernel saves. Long rows of segments are computed in blocks.

    Args:
        q: queries.
        k, v: keys and values, heads before positions; N is a multiple of K.
        scale: factor of the logits.
        causal: whether query t sees only keys up to t.
        mask: which keys a query sees, in addition to `causal`.
        bias: added to the logits.
        segments: if queries see exactly the keys of their own segment (and with `causal` no later ones), the number of
            each position's segment. This replaces `mask`, which may be None.
        windows: smaller segments, which queries see instead where the windows are used; only together with `segments`.
        lengths: if the mask is that of rows padded on the right, the number of keys of each row, at least 1: the mask
            in a form with which cuDNN skips padding. Outputs at padding are then 0.

    Returns:
        Outputs of the heads.
    """
    if windows is not None:
        assert segments is not None and not causal and mask is None and bias is None and lengths is None
        if within.pay(windows, q.shape[1]):
            near = partial(_near, windows=windows, scale=scale)
            return jax.lax.cond(windows.used, near, partial(attend, scale=scale, segments=segments), q, k, v)
        segments = jnp.where(windows.used, windows.segments, segments)
    if for_flash_kernel(q, k, mask, bias, segments):
        numbers = None if segments is None else (segments, segments)
        return flash.attend(q, k, v, scale=scale, causal=causal, mask=mask, segments=numbers)
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[3] % 8 == 0 and q.shape[1] > 1
    by_cudnn = (
        fits and (bias is None or lengths is not None or (causal and mask is None)) and q.shape[3] <= widest_for_cudnn()
    )
    if segments is not None and bias is None and blocked.is_large(q, 2 if by_cudnn else 4 * q.shape[2]):
        seen = {"causal": causal, "segments": segments}
        if not by_cudnn:
            return blocked.attend(q, k, v, scale=scale, **seen)
        run = partial(_cudnn, scale=scale, causal=False, bias=None, lengths=None)
        return blocked.by_queries(run, q, k, v, **seen)
    if segments is not None and mask is None:
        mask = same_sample(segments, segments)
    if by_cudnn:
        return _cudnn(q, k, v, scale=scale, causal=causal, mask=mask, bias=bias, lengths=lengths)
    return _plain(q, k, v, scale=scale, causal=causal, mask=mask, bias=bias)


def _near(q: Array, k: Array, v: Array, *, windows: Windows, scale: float) -> Array:
    """Attention within windows, in blocks on a CPU and in pieces for the kernels of accelerators."""
    if platform() == "cpu":
        return blocked.attend(q, k, v, scale=scale, causal=False, segments=windows.segments, size=within.BLOCK)
    return within.attend(partial(_numbered, scale=scale), q, k, v, segments=windows.segments, reach=windows.reach)


def _numbered(q: Array, k: Array, v: Array, segments: tuple[Array, Array], *, scale: float) -> Array:
    """Attention of queries to the keys with their number; both have numbers of their own."""
    if for_flash_kernel(q, k, None, None, segments[0]):
        return flash.attend(q, k, v, scale=scale, causal=False, mask=None, segments=segments)
    return attend(q, k, v, scale=scale, mask=same_sample(*segments))


def _plain(
    q: Array, k: Array, v: Array, *, scale: float, causal: bool, mask: Array | None, bias: Array | None
) -> Array:
    """Attention by XLA, as products of [T, d] and [d, S] matrices.

    `jax.nn.dot_product_attention` puts positions before heads: on a CPU its gradient takes nearly twice as long, and
    XLA copies the whole cache for every decoded token.
    """
    (batch, length, heads, width), (groups, keys) = q.shape, k.shape[1:3]
    q = q.transpose(0, 2, 1, 3).reshape(batch, groups, heads // groups * length, width)
    k = k.swapaxes(2, 3)
    logits = jnp.matmul(q, k, preferred_element_type=jnp.float32).reshape(batch, heads, length, keys) * scale
    if bias is not None:
        logits = logits + bias
    if causal:
        seen = (jnp.arange(keys)[None, :] <= jnp.arange(length)[:, None])[None, None]
        mask = seen if mask is None else mask & seen
    if mask is not None:
        logits = jnp.where(mask, logits, blocked.HIDDEN)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(batch, groups, -1, keys)
    return jnp.matmul(weights, v).reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    causal: bool,
    mask: Array | None,
    bias: Array | None,
    lengths: Array | None,
) -> Array:
    """Attention by cuDNN. Its backward pass supports only even lengths, so odd ones get a masked position."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    (batch, length), keys = q.shape[:2], k.shape[1]
    more: dict[str, Any] = {}
    odd = (length % 2, keys % 2)
    if bias is not None or (mask is not None and lengths is None):
        # Before cuDNN 9.26, the backward pass on Hopper may return NaN if the last block of 128 keys is half full
        # (https://github.com/NVIDIA/cudnn-frontend/pull/628).
        odd = (odd[0], odd[1] + 2 * ((keys + odd[1]) % 128 == 64))
    padding = ((0, 0), (0, 0), (0, odd[0]), (0, odd[1]))
    if lengths is not None or (mask is None and any(odd) and not causal):
        queries, used = (jnp.full((batch,), x.shape[1], jnp.int32) for x in (q, k))
        if lengths is not None:
            used = place(lengths.astype(jnp.int32), ("batch",))
        more = {"query_seq_lengths": used if causal else queries, "key_value_seq_lengths": used}
    elif mask is not None:
        # cuDNN treats a mask as a bias and needs a row for every query.
        mask = jnp.pad(jnp.broadcast_to(mask, (mask.shape[0], 1, length, keys)), padding)
    if bias is not None:
        bias = jnp.pad(bias.astype(q.dtype), padding)
    q, k, v = (jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0))) for x, n in ((q, odd[0]), (k, odd[1]), (v, odd[1])))
    mask = None if more else mask
    out = jax.nn.dot_product_attention(
        q, k, v, bias=bias, mask=mask, scale=scale, is_causal=causal, implementation="cudnn", **more
    )
    return out[:, :length]
