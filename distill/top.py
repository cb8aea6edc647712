"""The teacher's distribution as its largest logits and the mass of the other tokens, and losses that read it.

For a cache: k tokens take 6 bytes each, where a final state takes 2 bytes a channel and all logits 2 bytes a token of
the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from antgmm_jax.errors import AntgmmError
from distill.losses import Direction, order_margin

_LEAST = -60000.0
"""Logarithm of a mass of 0 in float16."""
_NAME = "top"


@partial(jax.tree_util.register_dataclass, data_fields=("tokens", "mass"), meta_fields=("temperature",))
@dataclass(frozen=True)
class Top:
    """The k most probable tokens of a teacher.

    Attributes:
        tokens: the tokens, most probable first, int32 [..., k].
        mass: logarithm of their probabilities at the temperature, and of all other tokens together, float32
            [..., k + 1]; without the last entry if k is the size of the vocabulary.
        temperature: softmax temperature.
    """

    tokens: Array
    mass: Array
    temperature: float


def name_of(top: int, temperature: float) -> str:
    """Returns the name under which a cache stores the `top` most probable tokens at a temperature."""
    return f"{_NAME}/{top}/{float(temperature)}"


def is_top(name: str) -> bool:
    """Whether a name is from `name_of`."""
    return name.startswith(f"{_NAME}/")


def settings_of(name: str) -> tuple[int, float]:
    """Returns the arguments of `name_of`."""
    _, top, temperature = name.split("/")
    return int(top), float(temperature)


def largest(logits: Float[Array, "*T V"], top: int, temperature: float) -> Top:
    """Returns the most probable tokens of logits.

    Args:
        logits: teacher logits.
        top: number of tokens, at most V.
        temperature: softmax temperature of the probabilities.

    Returns:
        The tokens.

    Raises:
        AntgmmError: there are fewer than `top` tokens.
    """
    if top > logits.shape[-1]:
        raise AntgmmError(f"top = {top}: the vocabulary has only {logits.shape[-1]} tokens")
    log = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    mass, tokens = jax.lax.top_k(log, top)
    if top < logits.shape[-1]:
        mass = jnp.append(mass, _rest(log, tokens), axis=-1)
    return Top(tokens, mass, temperature)


def _rest(log: Float[Array, "*T V"], tokens: Int[Array, "*T k"]) -> Float[Array, "*T 1"]:
    """Logarithm of the sum of the probabilities of all other tokens."""
    others = jnp.put_along_axis(log, tokens, jnp.full(tokens.shape, -jnp.inf), axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1, keepdims=True)


def packed(top: Top) -> UInt16[Array, "*T U"]:
    """Returns tokens (int32) and masses (float16) as 16-bit units, two for each token and one for each mass."""
    tokens = jax.lax.bitcast_convert_type(top.tokens, jnp.uint16)
    mass = jnp.maximum(top.mass, _LEAST).astype(jnp.float16)
    units = tokens.reshape(*tokens.shape[:-2], -1)
    return jnp.concatenate([units, jax.lax.bitcast_convert_type(mass, jnp.uint16)], axis=-1)


def unpacked(units: UInt16[Array, "*T U"], top: int, temperature: float) -> Top:
    """Returns what `packed` packed, with a sum of probabilities of exactly 1."""
    tokens = units[..., : 2 * top].reshape(*units.shape[:-1], top, 2)
    mass = jax.lax.bitcast_convert_type(units[..., 2 * top :], jnp.float16).astype(jnp.float32)
    return Top(jax.lax.bitcast_convert_type(tokens, jnp.int32), jax.nn.log_softmax(mass), temperature)


def soft(
    logits: Float[Array, "*T V"], teacher: Top, *, temperature: float = 1.0, direction: Direction = "forward"
) -> Float[Array, "*T"]:
    """`losses.soft` over the teacher's tokens and, as one class, all others; never more than the loss over all tokens.

    Args:
        logits: student logits.
        teacher: the teacher's tokens.
        temperature: as for `losses.soft`.
        direction: as for `losses.soft`.

    Returns:
        float32 nats times T^2 per token, >= 0.

    Raises:
        AntgmmError: the teacher's masses are for another temperature.
    """
    if temperature != teacher.temperature:
        raise AntgmmError(
            f"temperature = {temperature:g}: the cached top tokens of the teacher are for {teacher.temperature:g}"
        )
    log = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    student = jnp.take_along_axis(log, teacher.tokens, axis=-1)
    if teacher.mass.shape[-1] > teacher.tokens.shape[-1]:
        student = jnp.append(student, _rest(log, teacher.tokens), axis=-1)
    first, second = (teacher.mass, student) if direction == "forward" else (student, teacher.mass)
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1) * temperature**2


def rank(logits: Float[Array, "*T V"], teacher: Top, *, top: int = 4) -> Float[Array, "*T"]:
    """`losses.rank` for a teacher of which at least the `top` most probable tokens are known."""
    return order_margin(logits, teacher.tokens[..., :top])


def states(
    head: Callable[[Any, Array], Array], params: Any, final: Float[Array, "B A D"], name: str
) -> UInt16[Array, "B A U"]:
    """Computes what a cache stores of the most probable tokens.

    Args:
        head: (params, hidden [B, D]) -> logits [B, V].
        params: parameters of the teacher.
        final: the teacher's final states at the answer positions.
        name: from `name_of`.

    Returns:
        Result of `packed`.
    """
    top, temperature = settings_of(name)
    # One position at a time, so that only the logits of one token per row are in memory.
    units = jax.lax.map(lambda x: packed(largest(head(params, x), top, temperature)), jnp.swapaxes(final, 0, 1))
    return jnp.swapaxes(units, 0, 1)
