"""One block of a transformer stack and the inputs that all blocks share."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from antgmm_jax.blocks import flash
from antgmm_jax.blocks.attention import for_flash_kernel
from antgmm_jax.blocks.layers import MLP, Attention, Norm, aligned
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.rope import Rope
from antgmm_jax.blocks.windows import Windows
from antgmm_jax.config import Tower
from antgmm_jax.parallel.sharding import place

Gates = Mapping[str, Array]
Cache = tuple[Array, Array]  # keys and values, each [B, heads, slots, head_dim]


class Context(NamedTuple):
    """Inputs that all blocks of a stack share.

    Attributes:
        causal: whether positions see no later ones.
        mask: which keys a query sees, in addition to `causal`, bool [B, 1, T or 1, S]; None for all.
        bias: added to attention logits, [1, H, T, S].
        positions: rotary angles.
        memory: states [B, M, E] that cross-attention reads.
        memory_mask: which states of `memory` are tokens, bool [B, 1, 1, M].
        valid: which positions are tokens, [B, T]; collected norms ignore the others.
        local: mask and positions of the stack's local layers (`StackConfig.local_layers`), None where they are None
            here; None if all layers see the same.
        queries: number of queries before the text, in a stack that reads both.
        segments: number of each position's segment [B, T], if queries see the keys of their own segment: `mask` is then
            that of equal segments, or None; None for other masks.
        windows: segments that the local layers see instead; None if they see the same.
        lengths: number of tokens of each row [B], if `mask` is that of rows padded on the right; None for other masks.
        memory_lengths: the same for `memory_mask`.
    """

    causal: bool = False
    mask: Bool[Array, "..."] | None = None
    bias: Array | None = None
    positions: Rope | None = None
    memory: Array | None = None
    memory_mask: Array | None = None
    valid: Array | None = None
    local: "Context | None" = None
    queries: int = 0
    segments: Array | None = None
    windows: Windows | None = None
    lengths: Array | None = None
    memory_lengths: Array | None = None

    def counted(self, units: str) -> Array | None:
        """Returns `valid` at the positions that have units of a local name."""
        if self.valid is None or not self.queries:
            return self.valid
        parts = {"mlp": slice(self.queries), "cross_heads": slice(self.queries), "text_mlp": slice(self.queries, None)}
        return self.valid[:, parts.get(units, slice(None))]

    def of_layer(self, is_local: Array | bool) -> "Context":
        """Returns the context of one layer, of which `is_local` may be a traced bool."""
        if self.windows is not None:
            return self._replace(windows=self.windows._replace(used=is_local))
        if self.local is None:
            return self
        ours, theirs = ((one.mask, one.positions) for one in (self, self.local))
        if isinstance(is_local, bool):  # a global layer keeps its mask of keys, which flash kernels take
            mask, positions = theirs if is_local else ours
        else:
            mask, positions = jax.tree.map(partial(jnp.where, is_local), theirs, ours)
        return self._replace(mask=mask, positions=positions, local=None)


def _in_whole_blocks(x: Float[Array, "B T D"], context: Context, width: int) -> tuple[Float[Array, "B S D"], Context]:
    """Pads positions for the flash kernel for TPUs, if self-attention with heads of a width will use it.

    On a v5e, for 4 x 704 positions of 20 heads of 128, that saves 0.43 of the 1.80 ms of an attention layer by the
    compiler's estimate, against padding queries, keys and values; for 4 x 896, padded to 1 024, 0.30 of the 5.20 ms of
    a layer with its gradient.
    """
    (rows, length, _), causal, mask = x.shape, context.causal, context.mask
    head, key = (jax.ShapeDtypeStruct((rows, *shape, width), x.dtype) for shape in ((length, 1), (1, length)))
    size = flash.block_size(length)
    if not length % size or not for_flash_kernel(head, key, mask, context.bias, context.segments):
        return x, context
    pad = partial(flash.padded, size=size)
    if mask is None and not causal and context.segments is None:
        mask = jnp.ones((1, 1, 1, length), bool)
    if mask is not None:
        mask = pad(mask, 3)
        mask = mask if mask.shape[2] == 1 else pad(mask, 2)
    segments = None if context.segments is None else pad(context.segments, 1, -1)
    windows = context.windows and context.windows._replace(segments=pad(context.windows.segments, 1, -1))
    positions = jax.tree.map(lambda angles: pad(angles, 1), context.positions)
    return pad(x, 1), context._replace(mask=mask, segments=segments, windows=windows, positions=positions)


class LayerScale(nnx.Module):
    """A factor for each channel of what a sublayer adds to the residual stream (arXiv 2103.17239)."""

    def __init__(self, tower: Tower):
        self.scale = param((tower.stack.embed,), (tower.embed,), mean=0.1)

    def __call__(self, x: Float[Array, "... D"], gate: Float[Array, " D"] | None = None) -> Float[Array, "... D"]:
        """Multiplies the channels by their factors. Gates change nothing here: the next norm reads open channels."""
        # In float32: the gradient of a factor is a sum over all positions.
        return (x * aligned(self.scale[...], x).astype(jnp.float32)).astype(x.dtype)


class CrossAttention(nnx.Module):
    """A block's cross-attention with its norm."""

    def __init__(self, tower: Tower, memory: int):
        self.norm = Norm(tower.stack, tower.embed)
        self.attention = Attention(tower, memory=memory)


def _after(tower: Tower) -> Norm | LayerScale | None:
    """What a sublayer's output passes through before it is added to the residual stream."""
    if tower.stack.sandwich:
        return Norm(tower.stack, tower.embed)
    return LayerScale(tower) if tower.stack.layer_scale else None


class Block(nnx.Module):
    """Self-attention, optional cross-attention and feed-forward layer, with norms before or after each, or both."""

    def __init__(self, tower: Tower):
        self.config = tower.stack
        self.norm1 = Norm(tower.stack, tower.embed)
        self.attention = Attention(tower)
        self.norm2 = Norm(tower.stack, tower.embed)
        reads_text = tower.stack.text_mlp > 0
        self.mlp = MLP(tower, over=f"{tower.name}/queries" if reads_text else "")
        self.text_norm = Norm(tower.stack, tower.embed) if reads_text else None
        over = f"{tower.name}/text"
        self.text_mlp = MLP(tower, units="text_mlp", over=over) if reads_text else None
        self.after1, self.after2 = (_after(tower) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        gates: Gates,
        *,
        cross: CrossAttention | None = None,
        cache: Cache | None = None,
        cross_cache: Cache | None = None,
        slot: Array | int | None = None,
    ) -> tuple[Array, dict[str, Any], Cache | None]:
        """Applies the block.

        Args:
            x: residual stream.
            context: masks, positions and the states that cross-attention reads.
            gates: local name -> gate of this layer (`heads`, `cross_heads`, `mlp`, `text_mlp`, `embed`, scalar
                `layers`).
            cross: the cross-attention of this layer, if it has one.
            cache: keys and values of earlier positions; those of x are written at `slot`.
            cross_cache: keys and values of the states that cross-attention reads.
            slot: first cache slot of x, which sees the whole cache; None if x are the first positions: they see only
                one another, without the empty slots, so that flash kernels can compute them.

        Returns:
            The residual stream, the outputs of the units by local name, and the cache.
        """
        # Without this the partitioner may split the stream by width, like the weights, and not by rows.
        x = place(x, ("batch",))
        start, units = x, {}

        def residual(x, norm, inner, name, after=None):
            if self.config.post_norm:
                delta, units[name] = inner(x)
                return norm(x + delta, gates.get("embed"))
            y = norm(x, gates.get("embed"))
            units.setdefault("embed", []).append(y)
            delta, units[name] = inner(y)
            return x + (delta if after is None else after(delta, gates.get("embed")))

        def attend(y):
            nonlocal cache
            length, here = y.shape[1], context
            if slot is None:
                y, here = _in_whole_blocks(y, context, self.config.head_dim)
            k, v = self.attention.keys_values(y, here.positions)
            if cache is not None:
                written, at = zip(cache, (k, v), strict=True), 0 if slot is None else slot
                keys, values = (jax.lax.dynamic_update_slice_in_dim(c, n[:, :, :length], at, 2) for c, n in written)
                cache = (keys, values)
                k, v = (k, v) if slot is None else cache
            seen = {name: getattr(here, name) for name in ("causal", "mask", "bias", "segments", "windows", "lengths")}
            both = self.attention.attend(y, k, v, **seen, positions=here.positions, gate=gates.get("heads"))
            return jax.tree.map(lambda out: out[:, :length], both)

        x = residual(x, self.norm1, attend, "heads", self.after1)
        text_mlp, text = self.text_mlp, x[:, context.queries :]
        x = x if text_mlp is None else x[:, : context.queries]
        if cross is not None:
            attention, lengths = cross.attention, context.memory_lengths
            if cross_cache is None:
                assert context.memory is not None
                cross_cache = attention.keys_values(context.memory)
            k, v = cross_cache

            def read(y):
                return attention.attend(
                    y, k, v, mask=context.memory_mask, lengths=lengths, gate=gates.get("cross_heads")
                )

            x = residual(x, cross.norm, read, "cross_heads")
        x = residual(x, self.norm2, lambda y: self.mlp(y, gates.get("mlp")), "mlp", self.after2)
        if text_mlp is not None:
            text = residual(text, self.text_norm, lambda y: text_mlp(y, gates.get("text_mlp")), "text_mlp")
            x = jnp.concatenate([x, text], axis=1)
        if self.config.post_norm:
            units["embed"] = [x]
        if "layers" in gates:
            # In float32: a gate's gradient is the difference of two sums over all positions, which nearly cancel.
            g = gates["layers"].astype(jnp.float32)
            x = (g * x + (1 - g) * start).astype(x.dtype)
        return x, units, cache
