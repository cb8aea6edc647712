"""Which student state is compared with which teacher state, and on which tokens."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from antgmm_jax.blocks.pictures import valid_slots
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.blocks.tokens import KINDS, token_masks
from antgmm_jax.config import LMMConfig, Tower, towers
from antgmm_jax.errors import AntgmmError
from distill import losses
from distill.losses import LossConfig

Batch = Mapping[str, Any]


class Part(NamedTuple):
    """One comparison of states.

    Attributes:
        term: "hidden" (text tokens) or "vision" (image tokens) of a tower's blocks, or "bridge" (what it hands on).
        tower: name of the tower.
        states: name under which the model collects what is compared.
        layers: teacher layer of each student layer [Ls]; None: one state, not one of each block.
        embed: teacher channel of each student channel [Ds], or a basis [Dt, Ds] of the student's in the teacher's.
        layers_axis: axis of the gates that weigh the layers.
        embed_axis: axis of the gates that weigh the channels.
        mask: batch -> bool [B, N], the tokens that count; [B, 1] where all of a sample's tokens count.
        weights: of a sample's tokens [N], mean 1; None: all alike.
    """

    term: str
    tower: str
    states: str
    layers: Int[np.ndarray, " Ls"] | None
    embed: Shaped[np.ndarray, "*Dt Ds"]
    layers_axis: str
    embed_axis: str
    mask: Callable[[Batch], Bool[Array, "B N"]]
    weights: Float[np.ndarray, " N"] | None = None


def parts(
    config: LMMConfig, keep: Mapping[str, np.ndarray], *, bridge_weights: Float[np.ndarray, " N"] | None = None
) -> tuple[Part, ...]:
    """Every state comparison that a student allows: text tokens of its language towers, image tokens of all towers and
    what the bridge hands to the language model.

    Args:
        config: the teacher's or the student's config; only its family's shape and image token are read.
        keep: teacher coordinates of the student: `<tower>/layers` [Ls] and `*/embed` [Ds], or a basis
            [Dt, Ds], of every tower.
        bridge_weights: of the tokens that the bridge hands on, mean 1, from `distill.bridge_weights`; None: all alike.

    Returns:
        One `Part` per tower and kind of token, and one of the bridge's output.

    Raises:
        AntgmmError: when `keep` lacks an axis of a tower.
    """
    found = []
    for name, tower in towers(config).items():
        axes = (tower.axis("layers"), tower.embed)
        absent = [axis for axis in axes if axis not in keep]
        if absent:
            raise AntgmmError(f"cannot align {name} with the teacher: keep lacks {', '.join(absent)}")
        layers, embed = (np.asarray(keep[axis]) for axis in axes)
        for term in KINDS[tower.tokens]:
            mask = partial(_mask, tower, config.image_token, term)
            found.append(Part(term, name, tower.axis("states"), layers, embed, *axes, mask))
    embed = np.asarray(keep["text/embed"])
    return (*found, Part("bridge", "bridge", OUT, None, embed, "", "text/embed", valid_slots, bridge_weights))


def _mask(tower: Tower, image_token: int, term: str, batch: Batch) -> Bool[Array, "B N"]:
    return token_masks(tower, image_token, batch)[term]


def selected(config: LossConfig, available: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts that a loss config asks for.

    Raises:
        AntgmmError: when it weighs a state loss for which there is no part.
    """
    asked = [term for term in ("hidden", "vision", "bridge") if term in config.terms()]
    lacking = [term for term in asked if term not in {part.term for part in available}]
    if lacking:
        raise AntgmmError(f"loss {', '.join(lacking)} compares states, but no towers were aligned: give parts=")
    return tuple(part for part in available if part.term in asked)


def counts(batch: Batch, chosen: tuple[Part, ...]) -> tuple[Float[Array, ""], ...]:
    """Number of tokens of each part in a batch, at least 1."""
    return tuple(jnp.maximum(jnp.sum(part.mask(batch).astype(jnp.float32)), 1.0) for part in chosen)


def state_sum(
    part: Part,
    student: Float[Array, "Ls+1 B N Ds"],
    teacher: Float[Array, "Lt+1 B N Dt"],
    batch: Batch,
    gates: Mapping[str, Any],
) -> Float[Array, ""]:
    """Sum of a part's loss over its tokens.

    Args:
        part: what is compared.
        student, teacher: its states; [1, B, N, D] where there is one.
        batch: the batch they came from.
        gates: the student's gates; an absent one is open.

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
        values = values * part.weights
    mask = part.mask(batch)
    if mask.shape[1] == 1:
        values = jnp.mean(values, axis=1, keepdims=True)
    return jnp.sum(jnp.where(mask, values, 0.0))
