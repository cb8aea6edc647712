"""Attention by the flash kernel for TPUs, which never holds the logits of all pairs of positions in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from antgmm_jax.parallel import sharding

LANES = 128
RESIDUALS = "attention"
"""Name of what the kernel's backward pass reads of its forward pass, for rematerialisation policies."""
_LARGEST_BLOCK = 768
"""The kernel's backward pass holds four float32 blocks of this side in the 16 MB of a v5e's vector memory."""
_SMALLEST_BLOCK = 384
"""Of rows that do not fit into one block. Each block of queries reads all keys and values, for as many FLOPs a byte as
it has queries: with fewer than 240, a v5e waits for its memory. Blocks that divide 896 or 61 312 positions have 128."""
_FEWEST_KEYS = 640
"""On a v5e, forward and backward by the compiler's estimate, without the kernel's own time: 4 x 32 causal heads of
688 x 128 take 5.88 ms by XLA and 2.08 around the kernel (542 and 77 MB of temporaries); 4 x 16 heads of 577 x 64 take
0.60 and 0.88."""
_MOST_COPIES = 8
"""Blocks of keys up to which one kernel computes the whole backward pass, in 5 products for each pair of positions. It
stores a gradient of the queries for each block of keys, which grows with the square of a row; two kernels take 7
products and store one. On a v5e, the temporaries of forward and backward of 16 heads of 64: for 6 144 positions (8
blocks) 303 MB in one kernel; for 16 384 (32 blocks) 2 484 MB in one and 403 in two."""


def supports(q: Any, k: Any, mask: Array | None, bias: Array | None, segments: Array | None) -> bool:
    """Whether the kernel computes this attention: bfloat16, long enough, masked by keys or by segments at most."""
    width = q.shape[3]
    return (
        q.dtype == jnp.bfloat16
        and bias is None
        and (mask is None or mask.shape[2] == 1 or segments is not None)
        and q.shape[1] >= LANES
        and k.shape[2] >= _FEWEST_KEYS
        and (width <= LANES or width % LANES == 0)
        and q.shape[0] % sharding.padded_batch_size(1) == 0
    )


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    causal: bool,
    mask: Bool[Array, "#B 1 #T S"] | None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
) -> Array:
    """Computes attention on each device for its own rows and heads.

    Args:
        q: queries [B, T, N, d].
        k, v: keys and values [B, K, S, d].
        scale: factor of the logits.
        causal: whether query t sees only keys up to t.
        mask: which keys all queries see, [B, 1, 1, S]; ignored if there are segments.
        segments: numbers of queries and of keys: queries see the keys with their own; None without segments.

    Returns:
        Outputs of the heads [B, T, N, d].
    """
    rows, queries, keys = q.shape[0], q.shape[1], k.shape[2]
    if segments is not None:
        numbers = segments
    elif mask is not None:
        seen = jnp.broadcast_to(mask[:, 0, 0], (rows, keys)).astype(jnp.int32)
        numbers = (jnp.ones((rows, queries), jnp.int32), seen)
    else:
        numbers = (jnp.ones((rows, queries), jnp.int32), jnp.ones((rows, keys), jnp.int32))
    return on_each_device(partial(_on_one_device, scale=scale, causal=causal), q, k, v, numbers)


def on_each_device(run: Callable[..., Array], q: Array, k: Array, v: Array, numbers: tuple[Array, Array]) -> Array:
    """Runs a function of queries, keys, values and segments on each device, for its own rows and heads.

    Args:
        run: the function; its result is like the queries.
        q: queries [B, T, N, d].
        k, v: keys and values [B, K, S, d].
        numbers: segments of queries [B, T] and keys [B, S].

    Returns:
        The results, [B, T, N, d].
    """
    if not sharding.active() or q.shape[0] % sharding.padded_batch_size(1):
        return run(q, k, v, numbers)
    by_row = sharding.RULES["batch"]
    heads = "tensor" if k.shape[1] % jax.sharding.get_abstract_mesh().shape["tensor"] == 0 else None
    ahead, behind = PartitionSpec(by_row, None, heads), PartitionSpec(by_row, heads)
    specs = (ahead, behind, behind, PartitionSpec(by_row))
    return jax.shard_map(run, in_specs=specs, out_specs=ahead, check_vma=False)(q, k, v, numbers)


def _on_one_device(q: Array, k: Array, v: Array, numbers: tuple[Array, Array], *, scale: float, causal: bool) -> Array:
    # Imported on use: Pallas takes half a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = q.shape[1]
    block_q, block_k = block_size(length), block_size(k.shape[2])
    q = padded((q * scale).astype(q.dtype).swapaxes(1, 2), 2, size=block_q)
    k, v = (padded(x, 2, size=block_k) for x in (k, v))
    shape = (q.shape[2], k.shape[2])
    together = shape[1] // block_k <= _MOST_COPIES
    kernel: Any = splash.make_splash_mha(
        masks.MultiHeadMask([(masks.CausalMask if causal else masks.FullMask)(shape)] * q.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=None if together else block_q,
            block_kv_dq=None if together else block_k,
            use_fused_bwd_kernel=together,
        ),
        residual_checkpoint_name=RESIDUALS,
    )
    # Padding has a number of its own.
    segments = splash.SegmentIds(*(padded(x, 1, -1, size=n) for x, n in zip(numbers, (block_q, block_k), strict=True)))
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)[:, :length]


def padded(x: Array, axis: int, value: int = 0, *, size: int) -> Array:
    """Pads an axis to a multiple of a size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths, constant_values=value)


def block_size(length: int) -> int:
    """Chooses the size of the kernel's blocks of queries or keys, which are padded to a multiple of it.

    The size with the least padding, and of those the largest: 640 positions are one block, 896 are padded to two blocks
    of 512, and 61 312 to 80 blocks of 768. Padding to a multiple of the size changes nothing the second time.

    Args:
        length: number of positions.

    Returns:
        A multiple of `LANES`; at least `_SMALLEST_BLOCK` if the positions do not fit into one block.
    """
    if length <= _LARGEST_BLOCK:
        return -(-length // LANES) * LANES
    return min(range(_LARGEST_BLOCK, _SMALLEST_BLOCK - 1, -LANES), key=lambda size: -length % size)
