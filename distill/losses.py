"""Distillation losses: pure functions that return one float32 value per token; callers mask and sum.

The losses hard, soft and pair are those of "Large Multimodal Model Compression via Efficient Pruning and Distillation
at AntGroup" (arXiv 2312.05795). We add rank (order of the teacher's top tokens), hidden, vision and bridge (states).
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped
from pydantic import Field, model_validator

from distill.schema import settings

Direction = Literal["forward", "reverse"]
Weight = Annotated[float, Field(ge=0)]
TERMS = ("hard", "soft", "pair", "rank", "hidden", "vision", "bridge")
_TINY = 1e-12


@settings
class LossConfig:
    """Weights and settings of the loss terms; a term of weight 0 is not computed.

    Attributes:
        hard: cross-entropy with the label.
        soft: divergence from the teacher's distribution at `temperature`.
        pair: margin between the label's logit and the two largest logits.
        rank: order of the teacher's four largest logits.
        hidden: block outputs of the language model, at text tokens.
        vision: block outputs of the image side.
        bridge: the bridge's output, which the language model reads.
        bridge_tokens: weights of the bridge's tokens: "alike" for equal weights, "sensitivity" for how much the
            teacher's answers depend on each (`distill.bridge_weights`).
        temperature: softmax temperature of `soft`.
        direction: "forward" for KL(teacher || student), "reverse" for KL(student || teacher).
    """

    hard: Weight = 1.0
    soft: Weight = 0.0
    pair: Weight = 0.0
    rank: Weight = 0.0
    hidden: Weight = 0.0
    vision: Weight = 0.0
    bridge: Weight = 0.0
    bridge_tokens: Literal["alike", "sensitivity"] = "alike"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    direction: Direction = "forward"

    @model_validator(mode="after")
    def _some_weight(self) -> "LossConfig":
        if not self.terms():
            raise ValueError("every weight is 0: set at least one")
        if self.bridge_tokens != "alike" and not self.bridge:
            raise ValueError(f"bridge_tokens = {self.bridge_tokens!r} has no effect: set the weight of bridge")
        return self

    def terms(self) -> tuple[str, ...]:
        """Names of the terms with a positive weight, in a fixed order."""
        return tuple(name for name in TERMS if getattr(self, name) > 0)

    @property
    def reads_answers(self) -> bool:
        """Whether a term needs the language model's output or states (all terms but vision and bridge)."""
        return bool(self.hard or self.soft or self.pair or self.rank or self.hidden)

    @property
    def reads_logits(self) -> bool:
        """Whether a term compares with the teacher's logits, which are made of its final states."""
        return bool(self.soft or self.rank)

    @property
    def reads_teacher(self) -> bool:
        """Whether a term needs the teacher (all terms but hard and pair)."""
        return bool(self.soft or self.rank or self.hidden or self.vision or self.bridge)


def hard(logits: Float[Array, "*T V"], targets: Int[Array, "*T"]) -> Float[Array, "*T"]:
    """Cross-entropy with the label. A negative (ignored) target counts as token 0: mask it.

    Args:
        logits: student logits.
        targets: label token ids.

    Returns:
        float32 nats per token.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.maximum(targets, 0))


def soft(
    logits: Float[Array, "*T V"],
    teacher_logits: Float[Array, "*T V"],
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Float[Array, "*T"]:
    """Kullback-Leibler divergence of the distributions at temperature T, times T^2 (Hinton et al., arXiv 1503.02531).

    Args:
        logits, teacher_logits: student and teacher logits.
        temperature: T.
        direction: "forward" = KL(teacher || student), "reverse" = KL(student || teacher).

    Returns:
        float32 nats times T^2 per token, >= 0.
    """
    student = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    first, second = (teacher, student) if direction == "forward" else (student, teacher)
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1) * temperature**2


def _margin(gap: Float[Array, "*T"]) -> Float[Array, "*T"]:
    """max(0, gap * min(|gap|, 1)): quadratic up to 1, linear above; the gradient flows through both factors."""
    return jnp.maximum(0.0, gap * jnp.minimum(jnp.abs(gap), 1.0))


def pair(logits: Float[Array, "*T V"], targets: Int[Array, "*T"]) -> Float[Array, "*T"]:
    """The paper's pairwise loss: compares the label's logit with the mean m of the two largest student logits.

    As in the released code, with gap = m - s_y it is max(0, gap * min(|gap|, 1)), which is 0 if the label is top-1; the
    gradient also flows through the second factor. A negative (ignored) target counts as token 0: mask it.

    Args:
        logits: student logits, V >= 2.
        targets: label token ids.

    Returns:
        float32 per token, >= 0.
    """
    logits = logits.astype(jnp.float32)
    largest, _ = jax.lax.top_k(logits, 2)
    label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return _margin(jnp.mean(largest, axis=-1) - label)


def rank(logits: Float[Array, "*T V"], teacher_logits: Float[Array, "*T V"], *, top: int = 4) -> Float[Array, "*T"]:
    """Our ranking loss: penalises pairs among the teacher's `top` tokens that the student orders differently.

    For a pair that the teacher orders i before j, it applies the margin of `pair` to the gap s_j - s_i, and averages
    over pairs; 0 if the student has the same order.

    Args:
        logits, teacher_logits: student and teacher logits.
        top: number of the teacher's top tokens; at most V.

    Returns:
        float32 per token, >= 0.
    """
    _, order = jax.lax.top_k(teacher_logits.astype(jnp.float32), min(top, logits.shape[-1]))
    return order_margin(logits, order)


def order_margin(logits: Float[Array, "*T V"], order: Int[Array, "*T K"]) -> Float[Array, "*T"]:
    """Mean margin of the pairs of tokens that a student orders differently.

    Args:
        logits: student logits.
        order: tokens, the most probable first.

    Returns:
        float32 per token, >= 0; 0 for a single token, which has no pair.
    """
    if order.shape[-1] < 2:
        return jnp.zeros(order.shape[:-1])
    chosen = jnp.take_along_axis(logits.astype(jnp.float32), order, axis=-1)  # [..., top], teacher's best first
    before, after = np.triu_indices(order.shape[-1], k=1)
    return jnp.mean(_margin(chosen[..., after] - chosen[..., before]), axis=-1)


def hidden(
    student: Float[Array, "Ks B N Ds"],
    teacher: Float[Array, "Kt B N Dt"],
    *,
    layers: Int[np.ndarray, " Ls"],
    embed: Shaped[np.ndarray, "*Dt Ds"],
    layer_gates: Float[Array, " Ls"] | float = 1.0,
    embed_gates: Float[Array, " Ds"] | float = 1.0,
) -> Float[Array, "B N"]:
    """Compares the output of each student block with the teacher state that enters the next kept block.

    The last block is compared with the teacher's final state. The error of a token and block is `relative_error`;
    blocks are averaged. Closed gates count as pruned: a gated student and one shrunk to its open units have equal loss.

    Args:
        student: input of each student block, then the output of the last block.
        teacher: the same for the teacher.
        layers: teacher layer of each student layer, ascending.
        embed: teacher channel of each student channel, or a basis [Dt, Ds].
        layer_gates, embed_gates: 1 for an open unit of the student, 0 for a closed one.

    Returns:
        float32 per token, dimensionless.
    """
    following = np.append(layers[1:], teacher.shape[0] - 1)
    errors = relative_error(student[1:], teacher[following], embed=embed, embed_gates=embed_gates)
    blocks = _block_weights(jnp.broadcast_to(jnp.asarray(layer_gates, jnp.float32), (len(layers),)))
    return jnp.einsum("lbn,l->bn", errors, blocks)


def relative_error(
    student: Float[Array, "*T Ds"],
    teacher: Float[Array, "*T Dt"],
    *,
    embed: Shaped[np.ndarray, "*Dt Ds"],
    embed_gates: Float[Array, " Ds"] | float = 1.0,
) -> Float[Array, "*T"]:
    """Squared error over the kept channels, divided by the teacher's sum of squares over the same channels.

    Args:
        student, teacher: states; the teacher's get no gradient.
        embed: teacher channel of each student channel, or a basis [Dt, Ds].
        embed_gates: 1 for an open channel of the student, 0 for a closed one, which is ignored.

    Returns:
        float32 per token, dimensionless.
    """
    target = jax.lax.stop_gradient(teacher)
    if embed.dtype.kind == "f":
        target = target.astype(jnp.float32) @ embed
    elif not np.array_equal(embed, np.arange(teacher.shape[-1])):
        target = target[..., embed]
    channels = jnp.broadcast_to(jnp.asarray(embed_gates, jnp.float32), (embed.shape[-1],))
    target = target.astype(jnp.float32)
    error = jnp.square(student.astype(jnp.float32) - target) @ channels
    return error / jnp.maximum(jnp.square(target) @ channels, _TINY)


def _block_weights(gates: Float[Array, " L"]) -> Float[Array, " L"]:
    """Weights of the states after each block, with sum 1.

    The state after block l counts if block l + 1 is open (else the next open block reads it) and if a block up to l is
    open (else it is the input of the stack). The final state always counts.
    """
    started = 1.0 - jnp.cumprod(1.0 - gates)
    weights = started * jnp.append(gates[1:], 1.0)
    return weights / jnp.maximum(jnp.sum(weights), _TINY)
