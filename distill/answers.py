"""Losses of a student's logits at the answer positions, with those of its teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.rows import by_columns, sum_over_rows
from antgmm_jax.pure import is_axes
from distill.chunked import answer_sums
from distill.heads import reads
from distill.losses import LossConfig
from distill.teacher import Teacher, to_dtype

Params = Any
Batch = Mapping[str, Any]
Gates = Mapping[str, Any]

_VOCAB = "vocab"


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
        kernels, axes = jax.tree.leaves(teacher_params), jax.tree.leaves(teacher.axes, is_leaf=is_axes)
        frozen = [jnp.asarray(kernels[i]) for i in read]
        names += [axes[i] for i in read]
    apart = _VOCAB if _stay_split(names, rows["hidden"]) else ""
    size = weights[0].shape[names[0].index(apart)] if apart else 0

    def sums(weights: list[Array], rows: Mapping[str, Array], gates: Gates) -> dict[str, Array]:
        mine, theirs = weights[: len(chosen)], weights[len(chosen) :]

        # Cast in every chunk, so that the head's gradients are summed over chunks in float32.
        heads: list[Callable[[Array], Any]] = [
            lambda hidden: logits(to_dtype(mine, dtype), hidden, gates),
            lambda hidden: teacher_logits(theirs, hidden),
        ]
        if apart:  # cached top tokens of a teacher are read without a head
            heads = [by_columns(head, size) if read else head for head, read in zip(heads, (mine, theirs), strict=True)]
        student_head, teacher_head = heads
        hidden, answers = rows["hidden"], rows["targets"]
        return answer_sums(config, student_head, hidden, answers, teacher_head, rows["teacher"], chunk=chunk)

    padding = {"hidden": 0, "targets": IGNORE, "teacher": 0}
    dtypes = [dtype] * len(chosen) + [leaf.dtype for leaf in frozen]
    return sum_over_rows(sums, weights + frozen, names, rows, gates, dtypes=dtypes, padding=padding, apart=apart)


def _stay_split(names: Sequence[Sequence[str]], hidden: Float[Array, "T D"]) -> bool:
    """Whether the heads stay split over `fsdp`: devices then send logits, else the heads, whichever is less.

    A token's logits are sent up to five times in float32, V values each (the student's forward, backward and in the
    forward pass that a chunk repeats; the teacher's forward and repeated); a head of D x V once, as its gradient.
    """
    if not sharding.splits_widths() or jax.sharding.get_abstract_mesh().shape["tensor"] > 1:
        return False
    tokens = hidden.shape[0] / sharding.padded_batch_size(1)
    # Each device has all columns of an adapter.
    return 4 * tokens <= hidden.shape[1] and all(_VOCAB in each for each in names)


def _teacher_hidden(targets: Mapping[str, Array], tokens: int) -> Shaped[Array, "T Dt"]:
    """What the teacher's head reads of each token; [T, 0] if no term reads it."""
    if "final" not in targets:
        return jnp.zeros((tokens, 0))
    return targets["final"].reshape(tokens, -1)
