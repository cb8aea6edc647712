"""Losses of a student's logits at the answer positions, with those of its teacher."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.parallel.rows import sum_over_rows
from antgmm_jax.pure import is_axes
from distill.chunked import answer_sums
from distill.heads import reads
from distill.losses import LossConfig
from distill.teacher import Teacher, to_dtype

Params = Any
Batch = Mapping[str, Any]
Gates = Mapping[str, Any]


def model_answer_sums(
    config: LossConfig,
    functional: Any,
    teacher: Teacher,
    held: tuple[Params, Params, Gates],
    final: Float[Array, "B A D"],
    batch: Batch,
    targets: Mapping[str, Array],
    *,
    chunk: int,
    dtype: DTypeLike,
) -> dict[str, Float[Array, ""]]:
    """Computes the sums of the losses of answer tokens; on a mesh, each device computes those of its own rows.

    Args:
        config: loss terms and their settings.
        functional: `Functional` of the student.
        teacher: source of the targets.
        held: parameters of the student's state, those of the teacher, and the student's gates.
        final: the student's final hidden states at the answer positions.
        batch: batch of the states.
        targets: targets from the teacher.
        chunk: maximum number of tokens per device with logits in memory.
        dtype: dtype of computation.

    Returns:
        term -> unweighted float32 sum, as `answer_sums`.
    """
    master, teacher_params, gates = held
    rows = {
        "hidden": final.reshape(-1, final.shape[-1]),
        "targets": batch["targets"].reshape(-1),
        "teacher": _teacher_hidden(targets, batch["targets"].size),
    }
    chosen, logits = reads(functional.head, master, rows["hidden"], gates)
    kernels, axes = jax.tree.leaves(master), jax.tree.leaves(functional.axes, is_leaf=is_axes)
    weights, names = [jnp.asarray(kernels[i]) for i in chosen], [axes[i] for i in chosen]
    frozen, teacher_logits = [], teacher.head
    if config.reads_logits:
        read, teacher_logits = reads(teacher.head, teacher_params, rows["teacher"])
        frozen = [jnp.asarray(jax.tree.leaves(teacher_params)[i]) for i in read]

    def sums(weights: list[Array], rows: Mapping[str, Array], whole: tuple[list[Array], Gates]) -> dict[str, Array]:
        return answer_sums(
            config,
            # Cast in every chunk, so that the head's gradients are summed over chunks in float32.
            lambda hidden: logits(to_dtype(weights, dtype), hidden, whole[1]),
            rows["hidden"],
            rows["targets"],
            lambda hidden: teacher_logits(whole[0], hidden),
            rows["teacher"],
            chunk=chunk,
        )

    padding = {"hidden": 0, "targets": IGNORE, "teacher": 0}
    return sum_over_rows(sums, weights, names, rows, (frozen, gates), dtype=dtype, padding=padding)


def _teacher_hidden(targets: Mapping[str, Array], tokens: int) -> Shaped[Array, "T Dt"]:
    """What the teacher's head reads of each token; [T, 0] if no term reads it."""
    if "final" not in targets:
        return jnp.zeros((tokens, 0))
    return targets["final"].reshape(tokens, -1)
