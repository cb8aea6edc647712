"""Teachers: sources of distillation targets, either a forward pass inside the step or a cache."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from antgmm_jax.blocks.pictures import has_pixels
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.placed import placed
from antgmm_jax.io.stored import Stored
from antgmm_jax.pure import is_axes
from distill import top
from distill.cache import TeacherCache
from distill.chunked import at_positions
from distill.heads import reads
from distill.packed import layers_first, packed_rows
from distill.records import at_answers

Params = Any
Batch = Mapping[str, Any]
PREFIX = "teacher/"


class Teacher(NamedTuple):
    """A frozen teacher, as the step and the training loop use it.

    Attributes:
        params: arrays that are passed to the step; never trained or donated.
        head: (params, hidden [..., Dt]) -> logits [..., V] or, from a cache of the most probable tokens, `top.Top`.
        select: names -> (params, device batch) -> {name: targets}, with `final` [B, A, Dt] (what `head` reads) at the
            answer positions, `<tower>/states` [layers + 1, B, N, D] and `bridge/out` [1, B, N, D]. Raises AntgmmError
            for a name that is not available.
        attach: host batch -> host batch with cached targets added; `names` selects them.
        axes: axis names of `params`, a tree of tuples.
        reads_images: whether `select` needs the images of a batch, even if the student reads cached image features.
    """

    params: Params
    head: Callable[[Params, Array], Any]
    select: Callable[[tuple[str, ...]], Callable[[Params, Batch], dict[str, Array]]]
    attach: Callable[..., dict]
    axes: Any = ()
    reads_images: bool = False

    def only(self, names: Sequence[str]) -> "Teacher":
        """Returns the teacher for losses that read some of its states, by name in the cache: it attaches no others."""
        return self._replace(attach=partial(self.attach, names=names))


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Removes cached teacher targets from a batch padded on the right, and adds the lengths of its rows."""
    inputs = {name: value for name, value in batch.items() if not name.startswith(PREFIX)}
    if "attention_mask" in inputs and "segment_ids" not in inputs:
        inputs["lengths"] = jnp.maximum(jnp.sum(inputs["attention_mask"] != 0, axis=1, dtype=jnp.int32), 1)
    return inputs


def collected(out: Mapping[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
    """Selects outputs of a model by name.

    Raises:
        AntgmmError: an output is missing: with `vision_features` in the batch, the image encoder does not run.
    """
    if missing := [name for name in names if name not in out]:
        raise AntgmmError(
            f"a batch without images has no {', '.join(missing)}: add images, or set the vision weight to 0"
        )
    return {name: out[name] for name in names}


def to_dtype(tree: Any, dtype: DTypeLike) -> Any:
    """Casts the floating-point leaves of a tree to `dtype`."""

    def cast(leaf: Array | np.ndarray) -> Array | np.ndarray:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def params_dtype(params: Params) -> jnp.dtype:
    """Returns the dtype of the first floating-point leaf, in which the teacher computes."""
    return next(leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating))


def _no_head(params: Params, hidden: Array) -> Array:
    raise AntgmmError("a loss reads teacher logits, but there is no teacher: pass teacher=")


def _no_targets(names: tuple[str, ...]) -> Callable[[Params, Batch], dict[str, Array]]:
    if names:
        raise AntgmmError(f"losses read the teacher's {', '.join(names)}, but there is no teacher: pass teacher=")
    return lambda params, batch: {}


def _nothing_attached(batch: dict, names: Sequence[str] = ()) -> dict:
    return batch


NO_TEACHER = Teacher({}, _no_head, _no_targets, _nothing_attached)
"""For supervised training: losses that need a teacher raise AntgmmError."""


def online(functional: Any, params: Params) -> Teacher:
    """Creates a teacher that runs inside the train step; it provides every target.

    Args:
        functional: `Functional` of the teacher.
        params: parameters of the teacher, in the dtype to compute in.

    Returns:
        The teacher.
    """

    def select(names: tuple[str, ...]) -> Callable[[Params, Batch], dict[str, Array]]:
        def targets(params: Params, batch: Batch) -> dict[str, Array]:
            if not names:
                return {}
            inputs = model_inputs(batch)
            if has_pixels(inputs):
                # These features are the student's.
                inputs.pop("vision_features", None)
            out = functional.apply(params, inputs, collect=names)
            targets_by_name = collected(out, names)
            if "final" in targets_by_name:
                targets_by_name["final"] = at_positions(targets_by_name["final"], batch["positions"])
            return jax.lax.stop_gradient(targets_by_name)

        return targets

    return Teacher(params, functional.head, select, _nothing_attached, functional.axes, reads_images=True)


def cached(functional: Any, params: Params, cache: TeacherCache, *, dtype: DTypeLike | None = None) -> Teacher:
    """Creates a teacher that reads its targets from a cache and computes logits with its frozen head.

    The result holds only the parameters of the head (none if the cache has no `final`), so the others can be freed.

    Args:
        functional: `Functional` of the teacher.
        params: parameters of the teacher; of `Stored` ones, only those of the head are loaded.
        cache: from `open_cache`.
        dtype: dtype of the head; None for that of `params`.

    Returns:
        The teacher; it raises AntgmmError for states that the cache lacks.
    """

    answers = next((name for name in cache.shapes if at_answers(name)), "")

    def select(names: tuple[str, ...]) -> Callable[[Params, Batch], dict[str, Array]]:
        missing = [name for name in names if name not in cache.shapes and not (name == "final" and answers)]
        if missing:
            raise AntgmmError(
                f"teacher cache {cache.directory} lacks {', '.join(missing)}: it holds {', '.join(cache.shapes)}; "
                f"build it with names={names} or run the teacher online"
            )

        def targets(params: Params, batch: Batch) -> dict[str, Any]:
            states = {name: batch[PREFIX + (answers if name == "final" else name)] for name in names}
            # Cached states have samples first, so that they split into micro-batches like other inputs.
            return {name: layers_first(name, x) for name, x in states.items()}

        return targets

    def attach(batch: dict, names: Sequence[str] = tuple(cache.shapes)) -> dict:
        read = cache.only(names)
        states = packed_rows(read, batch) if "segment_ids" in batch else read.rows(batch)
        return batch | {PREFIX + name: rows for name, rows in states.items()}

    if not answers:  # `select` rejects losses that need it
        return Teacher({}, _no_head, select, attach)
    if top.is_top(answers):
        settings = top.settings_of(answers)
        return Teacher({}, lambda params, units: top.unpacked(units, *settings), select, attach)
    used, head, axes = _frozen_head(functional, params, cache.shapes[answers][-1], dtype)
    return Teacher(used, head, select, attach, axes)


def _frozen_head(
    functional: Any, params: Params, width: int, dtype: DTypeLike | None
) -> tuple[list[Array], Callable[[list[Array], Array], Array], list[tuple[str, ...]]]:
    """Returns the parameters that the head reads, the head as a function of only these, and their axis names."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), params)
    probe = jax.ShapeDtypeStruct((1, width), params_dtype(shapes))
    chosen, logits = reads(functional.head, shapes, probe)
    leaves = jax.tree.leaves(params)

    def head(used: list[Array], hidden: Array) -> Array:
        return logits(used, hidden.astype(probe.dtype))

    names = jax.tree.leaves(functional.axes, is_leaf=is_axes)
    axes = [names[i] for i in chosen]
    if not any(isinstance(leaf, Stored) for leaf in leaves):
        return [jnp.asarray(leaves[i], dtype) for i in chosen], head, axes
    return [placed(leaves[i], names[i], dtype=dtype) for i in chosen], head, axes
