"""Where a teacher's targets come from: its own forward pass inside the step, or a cache. One small interface."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from antgmm_jax.blocks.pictures import has_pixels
from antgmm_jax.errors import AntgmmError
from distill.cache import TeacherCache
from distill.chunked import at_positions
from distill.packed import layers_first, packed_rows

Params = Any
Batch = Mapping[str, Any]
PREFIX = "teacher/"


class Teacher(NamedTuple):
    """A frozen teacher as the step and the loop see it.

    Attributes:
        params: the arrays that the step is given; never trained, never donated.
        head: (params, hidden [..., Dt]) -> logits [..., V].
        select: names -> (params, device batch) -> {name: targets}, with `final` [B, A, Dt] at the answer positions,
            `<tower>/states` [layers + 1, B, N, D] and `bridge/out` [1, B, N, D]. Raises AntgmmError for a name that it
            cannot give.
        attach: host batch -> host batch with the cached targets in it.
        reads_pictures: whether `select` needs a batch's pictures, also where the student reads image features.
    """

    params: Params
    head: Callable[[Params, Array], Array]
    select: Callable[[tuple[str, ...]], Callable[[Params, Batch], dict[str, Array]]]
    attach: Callable[[dict], dict]
    reads_pictures: bool = False


def without_targets(batch: Batch) -> dict[str, Any]:
    """The batch without cached teacher targets: what a model reads."""
    return {name: value for name, value in batch.items() if not name.startswith(PREFIX)}


def collected(out: Mapping[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
    """The named outputs of a model.

    Raises:
        AntgmmError: one that the batch does not give: with `vision_features` the image encoder never runs.
    """
    if absent := [name for name in names if name not in out]:
        raise AntgmmError(f"the batch gives no {', '.join(absent)}: give it pictures, or set the vision weight to 0")
    return {name: out[name] for name in names}


def to_dtype(tree: Any, dtype: jnp.dtype) -> Any:
    """The floating leaves of a tree in `dtype`, the others as they are."""

    def cast(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def params_dtype(params: Params) -> jnp.dtype:
    """The dtype of the first floating leaf, in which the teacher computes."""
    return next(leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating))


def _no_head(params: Params, hidden: Array) -> Array:
    raise AntgmmError("a loss reads teacher logits, but the run has no teacher: give teacher=")


def _no_targets(names: tuple[str, ...]) -> Callable[[Params, Batch], dict[str, Array]]:
    if names:
        raise AntgmmError(f"losses need the teacher's {', '.join(names)}, but the run has no teacher: give teacher=")
    return lambda params, batch: {}


NO_TEACHER = Teacher({}, _no_head, _no_targets, lambda batch: batch)
"""Plain supervised training: nothing to attach, an error for a loss that needs a teacher."""


def online(functional: Any, params: Params) -> Teacher:
    """A teacher that runs inside the step, in the dtype of its parameters; it can give every target.

    Args:
        functional: the teacher's `Functional`.
        params: its parameters, in the dtype they are to be computed in.

    Returns:
        The `Teacher`.
    """

    def select(names: tuple[str, ...]) -> Callable[[Params, Batch], dict[str, Array]]:
        def targets(params: Params, batch: Batch) -> dict[str, Array]:
            if not names:
                return {}
            inputs = without_targets(batch)
            if has_pixels(inputs):
                # What else stands for the pictures is the student's.
                inputs.pop("vision_features", None)
            out = functional.apply(params, inputs, collect=names)
            found = collected(out, names)
            if "final" in found:
                found["final"] = at_positions(found["final"], batch["positions"])
            return jax.lax.stop_gradient(found)

        return targets

    return Teacher(params, functional.head, select, lambda batch: batch, reads_pictures=True)


def cached(functional: Any, params: Params, cache: TeacherCache) -> Teacher:
    """A teacher that is never run: targets come from a cache, logits from its frozen head.

    Only the parameters that the head reads are kept in the result, so the rest may be freed; without `final` in the
    cache there are no logits, and no parameters are kept.

    Args:
        functional: the teacher's `Functional`.
        params: its parameters.
        cache: from `open_cache`.

    Returns:
        The `Teacher`; asking it for states that the cache lacks is an AntgmmError.
    """

    def select(names: tuple[str, ...]) -> Callable[[Params, Batch], dict[str, Array]]:
        lacking = [name for name in names if name not in cache.shapes]
        if lacking:
            raise AntgmmError(
                f"teacher cache {cache.directory} lacks {', '.join(lacking)}: it holds {', '.join(cache.shapes)}; "
                f"build it with names={names} or run the teacher online"
            )

        def targets(params: Params, batch: Batch) -> dict[str, Array]:
            found = {name: batch[PREFIX + name] for name in names}
            # States are stored sample first, so that they split into micro-batches like any input.
            return {name: layers_first(name, x) for name, x in found.items()}

        return targets

    def attach(batch: dict) -> dict:
        found = packed_rows(cache, batch) if "segment_ids" in batch else cache.rows(batch)
        return batch | {PREFIX + name: rows for name, rows in found.items()}

    if "final" not in cache.shapes:  # `select` refuses a loss that needs it
        return Teacher({}, _no_head, select, attach)
    used, head = _frozen_head(functional.head, params, cache.shapes["final"][-1])
    return Teacher(used, head, select, attach)


def _frozen_head(
    head: Callable[..., Array], params: Params, width: int
) -> tuple[list[Array], Callable[[list[Array], Array], Array]]:
    """The leaves that the head reads, and the head as a function of these alone."""
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    probe = jax.ShapeDtypeStruct((1, width), params_dtype(params))
    traced = jax.make_jaxpr(lambda leaves, hidden: head(jax.tree.unflatten(treedef, leaves), hidden))(shapes, probe)
    read = {id(v) for eqn in traced.jaxpr.eqns for v in eqn.invars} | {id(v) for v in traced.jaxpr.outvars}
    chosen = [i for i, v in enumerate(traced.jaxpr.invars[: len(leaves)]) if id(v) in read]

    def frozen(used: list[Array], hidden: Array) -> Array:
        # The others are never read; as zeros they only complete the tree, and the compiler drops them.
        full = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
        for i, leaf in zip(chosen, used, strict=True):
            full[i] = leaf
        return head(jax.tree.unflatten(treedef, full), hidden)

    return [jnp.asarray(leaves[i]) for i in chosen], frozen
