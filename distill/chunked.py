"""Losses over answer tokens in chunks, so that the logits of all tokens are never in memory at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from antgmm_jax.blocks.tokens import IGNORE
from distill import losses, top
from distill.losses import LossConfig

ANSWER_TERMS = ("hard", "soft", "pair", "rank")
Head = Callable[[Array], Array]


def at_positions(final: Float[Array, "B L D"], positions: Int[Array | np.ndarray, "B A"]) -> Float[Array, "B A D"]:
    """Selects the states at the answer positions."""
    return jnp.take_along_axis(final, positions[..., None], axis=1)


def answer_sums(
    config: LossConfig,
    head: Head,
    hidden: Float[Array, "T Ds"],
    targets: Int[Array, " T"],
    teacher_head: Callable[[Array], Any],
    teacher_hidden: Shaped[Array, "T Dt"],
    *,
    chunk: int = 512,
) -> dict[str, Float[Array, ""]]:
    """Computes the sum of each answer-token loss over the tokens that are not ignored.

    More than `chunk` tokens are processed by a scan that recomputes each chunk in the backward pass, so only the logits
    of one chunk are in memory at a time. Apart from rounding, the result does not depend on `chunk`.

    Args:
        config: loss terms and their settings.
        head: final hidden states [..., Ds] -> student logits [..., V].
        hidden: the student's final hidden states at the answer positions.
        targets: label token ids, -100 for ignored positions.
        teacher_head: like `head`, for the teacher, or -> `Top`; called only if a term reads teacher logits.
        teacher_hidden: the teacher's final hidden states, or what its head reads; [T, 0] if no term reads them.
        chunk: maximum number of tokens per chunk.

    Returns:
        term -> unweighted float32 sum, for those of hard, soft, pair and rank with a positive weight.
    """
    tokens = hidden.shape[0]
    count = -(-tokens // chunk)

    def sums(part: tuple[Array, Array, Array]) -> dict[str, Array]:
        return _chunk_sums(config, head, teacher_head, *part)

    if count == 1:
        return sums((hidden, targets, teacher_hidden))
    # Chunk i has the tokens i, i + count, ..., so that each device of a batch-sharded mesh keeps its own rows.
    padding = -tokens % count
    parts = tuple(
        jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)
        .reshape(((tokens + padding) // count, count, *x.shape[1:]))
        .swapaxes(0, 1)
        for x, fill in ((hidden, 0), (targets, IGNORE), (teacher_hidden, 0))
    )
    body = jax.checkpoint(sums)
    start = {name: jnp.zeros((), jnp.float32) for name in _terms(config)}
    totals, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, body(part)), None), start, parts)
    return totals


def _terms(config: LossConfig) -> tuple[str, ...]:
    return tuple(name for name in config.terms() if name in ANSWER_TERMS)


def _chunk_sums(
    config: LossConfig,
    head: Head,
    teacher_head: Callable[[Array], Any],
    hidden: Array,
    targets: Array,
    teacher_hidden: Array,
) -> dict[str, Array]:
    logits = head(hidden)
    names = _terms(config)
    values = {}
    if "hard" in names:
        values["hard"] = losses.hard(logits, targets)
    if "pair" in names:
        values["pair"] = losses.pair(logits, targets)
    if config.reads_logits:
        teacher_logits: Any = jax.lax.stop_gradient(teacher_head(teacher_hidden))
        module: Any = top if isinstance(teacher_logits, top.Top) else losses
        if "soft" in names:
            values["soft"] = module.soft(
                logits, teacher_logits, temperature=config.temperature, direction=config.direction
            )
        if "rank" in names:
            values["rank"] = module.rank(logits, teacher_logits)
    valid = targets != IGNORE
    return {name: jnp.sum(jnp.where(valid, value, 0.0)) for name, value in values.items()}
