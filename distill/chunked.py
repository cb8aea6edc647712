"""Losses over answer tokens in chunks, so that no [tokens, vocab] array is ever held."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from antgmm_jax.blocks.tokens import IGNORE
from distill import losses
from distill.losses import LossConfig

ANSWER_TERMS = ("hard", "soft", "pair", "rank")
Head = Callable[[Array], Array]


def at_positions(final: Float[Array, "B L D"], positions: Int[Array, "B A"]) -> Float[Array, "B A D"]:
    """The states at the answer positions, out of the states at every position."""
    return jnp.take_along_axis(final, positions[..., None], axis=1)


def answer_sums(
    config: LossConfig,
    head: Head,
    hidden: Float[Array, "T Ds"],
    targets: Int[Array, " T"],
    teacher_head: Head,
    teacher_hidden: Float[Array, "T Dt"],
    *,
    chunk: int = 512,
) -> dict[str, Float[Array, ""]]:
    """Sum of every answer-token loss over the tokens whose target is not ignored.

    More than `chunk` tokens are walked by a scan whose body is recomputed in the backward pass, so at most one chunk's
    logits are alive at a time. The result does not depend on `chunk` but for rounding.

    Args:
        config: which terms to compute, and their settings.
        head: final hidden state [..., Ds] to student logits [..., V].
        hidden: the student's final hidden states at the answer positions.
        targets: label token ids, -100 where ignored.
        teacher_head: the same as `head` for the teacher; called only when a term reads teacher logits.
        teacher_hidden: the teacher's final hidden states; [T, 0] when no term reads them.
        chunk: the largest number of tokens whose logits are alive at once.

    Returns:
        {term: float32 sum}, unweighted, for each of hard, soft, pair, rank with a weight above 0.
    """
    tokens = hidden.shape[0]
    count = -(-tokens // chunk)

    def sums(part: tuple[Array, Array, Array]) -> dict[str, Array]:
        return _chunk_sums(config, head, teacher_head, *part)

    if count == 1:
        return sums((hidden, targets, teacher_hidden))
    # Chunk i takes tokens i, i + count, ...: each device of a batch-sharded mesh then keeps its own rows.
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
    config: LossConfig, head: Head, teacher_head: Head, hidden: Array, targets: Array, teacher_hidden: Array
) -> dict[str, Array]:
    logits = head(hidden)
    names = _terms(config)
    values = {}
    if "hard" in names:
        values["hard"] = losses.hard(logits, targets)
    if "pair" in names:
        values["pair"] = losses.pair(logits, targets)
    if config.reads_logits:
        theirs = jax.lax.stop_gradient(teacher_head(teacher_hidden))
        if "soft" in names:
            values["soft"] = losses.soft(logits, theirs, temperature=config.temperature, direction=config.direction)
        if "rank" in names:
            values["rank"] = losses.rank(logits, theirs)
    valid = targets != IGNORE
    return {name: jnp.sum(jnp.where(valid, value, 0.0)) for name, value in values.items()}
