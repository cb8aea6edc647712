"""Layers of all towers. Every parameter has named axes, and every unit that can be pruned has a gate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from antgmm_jax.blocks.attention import attend
from antgmm_jax.blocks.low_rank import LowRank
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.rope import Rope, rotate
from antgmm_jax.blocks.split import Split, product
from antgmm_jax.blocks.windows import Windows
from antgmm_jax.config import StackConfig, Tower

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def linear(
    x: Array, kernel: Array | LowRank | Split, bias: Array | None, *, inputs: int = 1, dtype: DTypeLike | None = None
) -> Array:
    """Contracts the last `inputs` axes of x with the first ones of the kernel and adds the bias.

    The result has the dtype of x, or `dtype`: float32 keeps the sums of a 16-bit product as they are accumulated.
    """
    rows, columns = math.prod(x.shape[x.ndim - inputs :]), kernel.shape[inputs:]
    flat, dtype = x.reshape(-1, rows), jnp.dtype(x.dtype if dtype is None else dtype)
    if isinstance(kernel, LowRank):
        y = _product(flat, kernel.kernel.reshape(rows, -1), dtype)
        y = y + _product(_product(flat, kernel.a, flat.dtype), kernel.b, dtype)
    elif isinstance(kernel, Split):
        y = product(flat, kernel, math.prod(columns), dtype)
    else:
        y = _product(flat, kernel.reshape(rows, -1), dtype)
    y = y.reshape(*x.shape[: x.ndim - inputs], *columns)
    return y if bias is None else plus(y, bias)


def aligned(value: Array, x: Array) -> Array:
    """Gives a value of the last axes of x leading axes of size 1, so that it broadcasts to x."""
    return value.reshape((1,) * (x.ndim - value.ndim) + value.shape)


def plus(x: Array, bias: Array) -> Array:
    """x + bias in the dtype of x. Adds in float32, so that the bias gradient is summed in float32."""
    return (x.astype(jnp.float32) + aligned(bias, x).astype(jnp.float32)).astype(x.dtype)


def gated(x: Array, gate: Array | None) -> Array:
    """x times the gate of its last axes in the dtype of x; x without a gate.

    Multiplies in float32, so that the gate's gradient is summed in float32.
    """
    return x if gate is None else (x.astype(jnp.float32) * aligned(gate, x).astype(jnp.float32)).astype(x.dtype)


def repeated(parameter: Float[Array, "..."], rows: int) -> Float[Array, "rows ..."]:
    """Repeats a parameter [...] to [rows, ...]; its gradient is summed over the rows in float32."""
    whole = jnp.broadcast_to(parameter.astype(jnp.float32), (rows, *parameter.shape))
    return whole.astype(parameter.dtype)


def _matmul(x: Float[Array, "n k"], kernel: Float[Array, "k m"], dtype: np.dtype) -> Float[Array, "n m"]:
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _matmul_backward(dtype, saved, dy):
    x, kernel = saved
    # Products of two 16-bit operands, also behind a float32 result: mixed ones run at float32's rate.
    dy = jax.lax.optimization_barrier(dy.astype(x.dtype))
    return dy @ kernel.T, (dy.T @ jax.lax.optimization_barrier(x)).T


# The backward pass reads its operands without transposing them in memory. Otherwise, XLA on a CPU recomputes the
# activation's gradient inside the transposed copy that the kernel's gradient reads: the gradient of a feed-forward
# layer then takes twice as long (measured).
_product = jax.custom_vjp(_matmul, nondiff_argnums=(2,))
_product.defvjp(lambda x, kernel, dtype: (_matmul(x, kernel, dtype), (x, kernel)), _matmul_backward)


def initial(config: StackConfig, fan_in: int) -> float:
    """Standard deviation of a new kernel: 0.02 as in ViT, BERT and Llama, or by fan-in as in T5.

    A post-norm stack at fan-in scale hardly learns: its branches dominate the residual stream.
    """
    return 0.02 if config.scaled else fan_in**-0.5


def normed(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    *,
    eps: float,
    rms: bool,
    gate: Float[Array, " D"] | None = None,
) -> Float[Array, "... D"]:
    """LayerNorm or RMSNorm of the last axis with statistics over open channels only.

    With a gate g the mean of z is sum(g * z) / sum(g), and the output, including the bias, is multiplied by g. With a
    0/1 gate this equals the norm of the kept channels.

    Args:
        x: states.
        scale: scale of each channel.
        bias: bias of each channel, or None.
        eps: added to the variance.
        rms: RMSNorm, which does not subtract the mean.
        gate: gate of each channel; None if all are open.

    Returns:
        The normalised states in the dtype of x.
    """
    # In float32: in bfloat16 the variance of a wide stream loses its last digits, and so do the gradients of scale
    # and bias, which are sums over all tokens.
    z = x.astype(jnp.float32)
    opened = None if gate is None else aligned(gate, x)

    def mean(v):
        if opened is None:
            return jnp.mean(v, axis=-1, keepdims=True)
        return jnp.sum(v * opened, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(opened), 1.0)

    if not rms:
        z = z - mean(z)
    y = z * jax.lax.rsqrt(mean(z * z) + eps) * aligned(scale, x).astype(jnp.float32)
    y = (y if bias is None else plus(y, bias)).astype(x.dtype)
    return gated(y, gate)


def new_scale(config: StackConfig, size: int, axis: str) -> nnx.Param:
    """Creates the scale of a norm that is the identity on normalised states."""
    return param((size,), (axis,), mean=0.0 if config.norm == "rms1" else 1.0)


def plus_one(scale: Float[Array, " D"]) -> Float[Array, " D"]:
    """1 + scale in float32: bfloat16 would drop the last digits of a small scale."""
    return 1 + scale.astype(jnp.float32)


class Norm(nnx.Module):
    """The norm of a stack's width, as `normed` computes it."""

    def __init__(self, config: StackConfig, axis: str):
        self.eps, self.rms, self.shift = config.eps, config.norm != "layer", config.norm == "rms1"
        self.scale = new_scale(config, config.embed, axis)
        self.bias = None if self.rms else param((config.embed,), (axis,))

    def __call__(self, x: Float[Array, "... D"], gate: Float[Array, " D"] | None = None) -> Float[Array, "... D"]:
        """Normalises the last axis of x over its open channels."""
        bias = None if self.bias is None else self.bias[...]
        scale = plus_one(self.scale[...]) if self.shift else self.scale[...]
        return normed(x, scale, bias, eps=self.eps, rms=self.rms, gate=gate)


class HeadNorm(nnx.Module):
    """RMSNorm over the units of each head."""

    def __init__(self, config: StackConfig):
        self.eps, self.shift = config.eps, config.norm == "rms1"
        self.scale = new_scale(config, config.head_dim, "head_dim")

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises the last axis of x."""
        scale = plus_one(self.scale[...]) if self.shift else self.scale[...]
        return normed(x, scale, None, eps=self.eps, rms=True)


class Attention(nnx.Module):
    """Multi-head attention with grouped queries; a gate multiplies the outputs of each key-value head."""

    def __init__(self, tower: Tower, *, memory: int = 0):
        """`memory` is the width of the states that cross-attention reads; 0 for self-attention."""
        config, cross = tower.stack, memory > 0
        heads, group, width = (config.cross_heads if cross else config.heads), config.q_per_kv, config.head_dim
        reads, keys_over = (memory, tower.reads) if cross else (config.embed, tower.name)
        over = f"{tower.name}/queries" if cross and config.text_mlp else tower.name
        heads_axis = tower.axis("cross_heads" if cross else "heads")
        embed, source = tower.embed, tower.memory if cross else tower.embed
        self.scale = (config.scale_width or width) ** -0.5 if config.scaled else 1.0
        # T5 has no factor 1/sqrt(d) on the logits; the initial scale of the queries includes it.
        q_scale = initial(config, config.embed * width)
        q_axes, kv_axes = (heads_axis, "q_per_kv", "head_dim"), (heads_axis, "head_dim")
        self.q = param((config.embed, heads, group, width), (embed, *q_axes), scale=q_scale, over=over)
        keys = {"axes": (source, *kv_axes), "scale": initial(config, reads), "over": keys_over}
        self.k = param((reads, heads, width), **keys)
        self.v = param((reads, heads, width), **keys)
        o_scale = initial(config, heads * group * width)
        out_axes, size = (*q_axes, embed), (heads, group, width, config.embed)
        self.o = param(size, out_axes, scale=o_scale, over=over)
        self.q_bias = param((heads, group, width), q_axes) if config.qkv_bias else None
        self.k_bias = param((heads, width), kv_axes) if config.qkv_bias else None
        self.v_bias = param((heads, width), kv_axes) if config.qkv_bias else None
        self.o_bias = param((config.embed,), (embed,)) if config.out_bias else None
        self.q_norm, self.k_norm = (HeadNorm(config) if config.qk_norm else None for _ in "qk")

    def keys_values(self, x: Float[Array, "B S E"], positions: Rope | None = None) -> tuple[Array, Array]:
        """Keys and values [B, heads, S, head_dim] of the attended states."""
        k = linear(x, self.k[...], None if self.k_bias is None else self.k_bias[...])
        v = linear(x, self.v[...], None if self.v_bias is None else self.v_bias[...])
        k = k if self.k_norm is None else self.k_norm(k)
        k = k if positions is None else rotate(k, positions)
        return k.swapaxes(1, 2), v.swapaxes(1, 2)

    def attend(
        self,
        x: Float[Array, "B T E"],
        k: Float[Array, "B K S d"],
        v: Float[Array, "B K S d"],
        *,
        causal: bool = False,
        mask: Bool[Array, "#B 1 #T S"] | None = None,
        bias: Float[Array, "1 N T S"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        windows: Windows | None = None,
        lengths: Int[Array, " B"] | None = None,
        positions: Rope | None = None,
        gate: Float[Array, " K"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B T K G d"]]:
        """Attends from x; returns the output for the residual stream, and the head outputs before the last map."""
        q = linear(x, self.q[...], None if self.q_bias is None else self.q_bias[...])
        q = q if self.q_norm is None else self.q_norm(q)
        batch, length, heads, group, width = q.shape
        q = q.reshape(batch, length, heads * group, width)
        if positions is not None:
            q = rotate(q, positions)
            if positions.query_factor is not None:
                q = q * positions.query_factor[:, :, None, None].astype(q.dtype)
        seen = {"causal": causal, "mask": mask, "bias": bias, "segments": segments, "lengths": lengths}
        out = attend(q, k, v, scale=self.scale, **seen, windows=windows)
        out = out.reshape(batch, length, heads, group, width)
        out = gated(out, None if gate is None else gate[:, None, None])
        return linear(out, self.o[...], None if self.o_bias is None else self.o_bias[...], inputs=3), out


class MLP(nnx.Module):
    """Feed-forward layer, plain or gated; a gate multiplies each hidden unit."""

    def __init__(self, tower: Tower, *, units: str = "mlp", over: str = ""):
        """`units` is the field of the hidden units, `over` the tokens that it reads if not all of the tower's."""
        config, over = tower.stack, over or tower.name
        self.act = config.act
        embed, hidden = (config.embed, tower.embed), (getattr(config, units), tower.axis(units))
        up = ((embed[0], hidden[0]), (embed[1], hidden[1]))
        self.up = param(*up, scale=initial(config, embed[0]), over=over)
        self.gate = param(*up, scale=initial(config, embed[0]), over=over) if config.gated else None
        self.down = param(up[0][::-1], up[1][::-1], scale=initial(config, hidden[0]), over=over)
        self.up_bias = param(hidden[:1], hidden[1:]) if config.mlp_bias else None
        self.down_bias = param(embed[:1], embed[1:]) if config.mlp_bias else None
        biased = config.gated and config.mlp_bias
        self.gate_bias = param(hidden[:1], hidden[1:]) if biased else None

    def __call__(self, x: Float[Array, "B T E"], gate: Float[Array, " M"] | None = None) -> tuple[Array, Array]:
        """Returns the output for the residual stream, and the hidden units [B, T, M] before the last map."""
        act = ACTIVATIONS[self.act]
        hidden = linear(x, self.up[...], None if self.up_bias is None else self.up_bias[...])
        if self.gate is None:
            hidden = act(hidden)
        else:
            hidden = act(linear(x, self.gate[...], None if self.gate_bias is None else self.gate_bias[...])) * hidden
        hidden = gated(hidden, gate)
        return linear(hidden, self.down[...], None if self.down_bias is None else self.down_bias[...]), hidden
