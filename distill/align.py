"""Alignment of student and teacher states: which states are compared, and on which tokens."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from antgmm_jax.blocks.pictures import valid_slots
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.blocks.tokens import compared_tokens
from antgmm_jax.config import LMMConfig, towers
from antgmm_jax.errors import AntgmmError
from distill import losses
from distill.losses import LossConfig

Batch = Mapping[str, Any]


class Part(NamedTuple):
    """One comparison of student and teacher states.

    Attributes:
        term: loss term: "hidden" (text tokens) for the blocks of the language model, "vision" for those of the image
            side, or "bridge" for the bridge's output.
        tower: name of the tower.
        states: name of the collected states.
        layers: teacher layer of each student layer [Ls]; None for a single state.
        embed: teacher channel of each student channel [Ds], or a basis [Dt, Ds].
        layers_axis: axis of the student's gates that weight the layers.
        embed_axis: axis of the student's gates that weight the channels.
        mask: batch -> bool [B, N], the tokens to compare; [B, 1] for all tokens of a sample.
        weights: weights of a sample's tokens [N] with mean 1; None for equal weights.
    """

    term: str
    tower: str
    states: str
    layers: Int[np.ndarray, " Ls"] | None
    embed: Shaped[np.ndarray, "*Dt Ds"]
    layers_axis: str
    embed_axis: str
    mask: Callable[[Batch], Bool[Array | np.ndarray, "B N"]]
    weights: Float[np.ndarray, " N"] | None = None


def parts(
    config: LMMConfig, keep: Mapping[str, np.ndarray], *, bridge_weights: Float[np.ndarray, " N"] | None = None
) -> tuple[Part, ...]:
    """Returns all possible comparisons between student and teacher states.

    Args:
        config: config of the teacher or the student.
        keep: units of the teacher that the student keeps: `<tower>/layers` [Ls] and `*/embed` [Ds] (or a basis
            [Dt, Ds]) of every tower.
        bridge_weights: weights of the bridge's output tokens with mean 1, from `distill.bridge_weights`; None for equal
            weights.

    Returns:
        One `Part` per tower, and one for the bridge's output.

    Raises:
        AntgmmError: `keep` lacks an axis of a tower.
    """
    result = []
    for name, tower in towers(config).items():
        axes = (tower.axis("layers"), tower.embed)
        absent = [axis for axis in axes if axis not in keep]
        if absent:
            raise AntgmmError(f"cannot align {name} with the teacher: keep lacks {', '.join(absent)}")
        layers, embed = (np.asarray(keep[axis]) for axis in axes)
        # Image tokens in the language model belong to no term: `vision` would run it where the image side is enough.
        term = "vision" if tower.tokens == "images" else "hidden"
        mask = partial(compared_tokens, tower, config.image_token)
        result.append(Part(term, name, tower.axis("states"), layers, embed, *axes, mask))
    embed = np.asarray(keep["text/embed"])
    return (*result, Part("bridge", "bridge", OUT, None, embed, "", "text/embed", valid_slots, bridge_weights))


def selected(config: LossConfig, available: tuple[Part, ...]) -> tuple[Part, ...]:
    """Returns the comparisons that a loss config uses.

    Raises:
        AntgmmError: a loss compares states, but there is no comparison for it.
    """
    terms = [term for term in ("hidden", "vision", "bridge") if term in config.terms()]
    lacking = [term for term in terms if term not in {part.term for part in available}]
    if lacking:
        raise AntgmmError(f"loss {', '.join(lacking)} compares states, but there are no aligned states: pass parts=")
    return tuple(part for part in available if part.term in terms)


def counts(batch: Batch, chosen: tuple[Part, ...]) -> tuple[Float[Array, ""], ...]:
    """Number of tokens of each comparison in a batch, at least 1."""
    return tuple(jnp.maximum(jnp.sum(part.mask(batch).astype(jnp.float32)), 1.0) for part in chosen)


def state_sum(
    part: Part,
    student: Float[Array, "Ks B N Ds"],
    teacher: Float[Array, "Kt B N Dt"],
    batch: Batch,
    gates: Mapping[str, Any],
) -> Float[Array, ""]:
    """Sums the loss of a comparison over its tokens.

    Args:
        part: the comparison.
        student, teacher: states to compare; [1, B, N, D] for a single state.
        batch: batch of the states.
        gates: gates of the student; a missing gate is open.

    Returns:
        A float32 scalar; divide by `counts` for the mean.
    """
    embed = {"embed": part.embed, "embed_gates": gates.get(part.embed_axis, 1.0)}
    if part.layers is None:
        values = losses.relative_error(student[0], teacher[0], **embed)
    else:
        layer_gates = gates.get(part.layers_axis, 1.0)
        values = losses.hidden(student, teacher, layers=part.layers, layer_gates=layer_gates, **embed)
    if part.weights is not None:
        values = values * part.weights[None, :]
    mask = part.mask(batch)
    if mask.shape[1] == 1:
        values = jnp.mean(values, axis=1, keepdims=True)
    return jnp.sum(jnp.where(mask, values, 0.0))
