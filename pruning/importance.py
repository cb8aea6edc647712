"""How much each prunable unit matters: scores axis -> float32, shared [n] or local [L, n], larger is more important."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.axes import sizes
from antgmm_jax.blocks.tokens import valid_tokens
from antgmm_jax.config import LMMConfig, Tower
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.io.stored import Stored, in_memory_order
from antgmm_jax.parallel.processes import gather
from antgmm_jax.pure import functional, is_axes, local_axes
from pruning.keep import gate_shape

CACHED = 2**18  # elements that are squared at a time: in float32 they fit a processor's cache

Scores = dict[str, np.ndarray]
Batch = Mapping[str, Any]


def scores_for(axis: str, scores: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """One axis's scores, known to be usable.

    Args:
        axis: the axis.
        scores: axis -> scores.
        shape: what they must have.

    Returns:
        Float32 scores of that shape.

    Raises:
        AntgmmError: where they are absent, of another shape, or not finite.
    """
    if axis not in scores:
        raise AntgmmError(f"{axis}: it is to be cut but has no scores; known are {', '.join(sorted(scores)) or 'none'}")
    score = np.asarray(scores[axis], np.float32)
    if score.shape != shape:
        raise AntgmmError(f"{axis}: scores have shape {score.shape}, expected {shape}; score the model that is cut")
    if not np.isfinite(score).all():
        raise AntgmmError(f"{axis}: {int((~np.isfinite(score)).sum())} scores are not finite; check the model and data")
    return score


def mean_of(score: Callable[[Batch], Mapping[str, jax.Array]], batches: Iterable[Batch]) -> Scores:
    """Averages what is measured of each batch, in float32.

    Args:
        score: batch -> name -> array.
        batches: at least one.

    Returns:
        name -> mean.

    Raises:
        AntgmmError: if there is no batch.
    """
    total, count = {}, 0
    for batch in batches:
        new = jax.block_until_ready(score(batch))  # one batch at a time, in memory and on the wire
        total, count = {axis: total.get(axis, 0.0) + new[axis].astype(jnp.float32) for axis in new}, count + 1
    if count == 0:
        raise AntgmmError("importance needs at least one calibration batch; there was none")
    return {axis: value / count for axis, value in gather(total).items()}


@partial(jax.jit, static_argnums=0)
def _gate_gradient(loss, params, gates, batch):
    return jax.tree.map(jnp.abs, jax.grad(loss, argnums=1)(params, gates, batch))


def taylor(
    loss: Callable[[Any, Any, Batch], jax.Array], params: Any, gates: Mapping[str, Any], batches: Iterable[Batch]
) -> Scores:
    """First-order importance: |d loss / d gate|, averaged over batches (the paper, arXiv 2312.05795).

    A gate multiplies its unit's output, so at 1 its gradient is sum(w * dL/dw) over the weights that carry the output
    on. Only gates are differentiated: no parameter gradient is formed.

    Args:
        loss: (params, gates, batch) -> scalar. Pass the same function again to reuse its compilation.
        params: parameters.
        gates: axis -> gates, where the gradient is taken: `ones(config)`.
        batches: calibration batches; each shape compiles once.

    Returns:
        axis -> float32 scores with the shapes of `gates`.

    Raises:
        AntgmmError: if there is no batch.
    """
    gates = {axis: jnp.asarray(gate, jnp.float32) for axis, gate in gates.items()}
    return mean_of(lambda batch: _gate_gradient(loss, params, gates, batch), batches)


def magnitude(params: Any, config: LMMConfig) -> Scores:
    """L2 norm of all weights that belong to a unit; for a layer, of all its weights.

    Args:
        params: parameters; `Stored` ones are read one layer at a time.
        config: their config.

    Returns:
        axis -> float32 scores for every axis. Rows of units that a layer lacks (cross-attention) are 0.
    """
    depth, local = family(config).depth, local_axes(config)
    prunable = frozenset({*sizes(config), *depth.sizes(config)})
    names = jax.tree.leaves(functional(config).axes, is_leaf=is_axes)
    found: dict[str, Any] = {}
    for dims, leaf in zip(names, jax.tree.leaves(params), strict=True):
        squares = (_stored_squares if isinstance(leaf, Stored) else _squares)(leaf, dims, prunable, local)
        for axis, square in gather(squares).items():
            found[axis] = found.get(axis, np.float32(0)) + square
    return {axis: np.sqrt(square) for axis, square in depth.by_layer(config, found).items()}


@partial(jax.jit, static_argnums=(1, 2, 3))
def _squares(leaf: Any, dims: tuple[str, ...], prunable: frozenset[str], local: frozenset[str]) -> dict[str, jax.Array]:
    """Sum of squares of one array by unit of each axis that it names, in the array's own rows."""
    square = jnp.square(jnp.asarray(leaf, jnp.float32))

    def total(axis: str) -> jax.Array:
        own = {dims.index(axis), 0} if axis in local else {dims.index(axis)}
        return square.sum(tuple(set(range(square.ndim)) - own))

    return {axis: total(axis) for axis in dims if axis in prunable}


def _stored_squares(
    leaf: Stored, dims: tuple[str, ...], prunable: frozenset[str], local: frozenset[str]
) -> dict[str, Any]:
    """`_squares` of an array that stays on disk, layer by layer."""
    layers, units = (dims[:1], dims[1:]) if leaf.stacked else ((), dims)

    found: dict[str, list[np.ndarray]] = {axis: [] for axis in dims if axis in prunable}
    for values in leaf.parts():
        part, lying, _ = in_memory_order(values, units)
        totals = dict(zip(lying, _totals(part), strict=True))
        totals |= {axis: totals[lying[0]].sum(keepdims=True) for axis in layers}
        for axis, parts in found.items():
            parts.append(totals[axis][None] if leaf.stacked and axis in local else totals[axis])
    joined = {*layers, *local}
    return {axis: np.concatenate(parts) if axis in joined else sum(parts) for axis, parts in found.items()}


def _totals(part: np.ndarray) -> list[np.ndarray]:
    """Sums of squares along each axis of a layer's array, in NumPy: XLA takes ten times as long to be handed it."""
    found = [np.zeros(size, np.float32) for size in part.shape]
    rows = max(1, CACHED * len(part) // part.size)
    for first in range(0, len(part), rows):
        block = np.square(part[first : first + rows].astype(np.float32)).reshape(-1, part[0].size)
        found[0][first : first + rows] = block @ np.ones(block.shape[1], np.float32)
        rest = (np.ones(len(block), np.float32) @ block).reshape(part.shape[1:])
        for axis in range(rest.ndim):
            found[1 + axis] += rest.sum(axis=tuple(other for other in range(rest.ndim) if other != axis))
    return found


def activation(
    apply: Callable[..., Mapping[str, jax.Array]],
    params: Any,
    batches: Iterable[Batch],
    axes: Collection[str],
    local: Collection[str],
) -> Scores:
    """Activation norm: L2 over a sample's tokens, mean over samples (as in Minitron, arXiv 2407.14679).

    Args:
        apply: (params, batch, collect=names) -> dict that holds each name's norms, [layers, B, n] for `*/heads` and
            `*/mlp`, [B, n] for `*/embed` and a bridge's `bridge/mlp`.
        params: parameters.
        batches: calibration batches.
        axes: which axes to score.
        local: the axes with one row a layer; the norms of a shared one are averaged over layers.

    Returns:
        axis -> float32 scores, shared [n] or local [L, n].

    Raises:
        AntgmmError: if there is no batch.
    """
    names = tuple(sorted(axes))

    @jax.jit
    def score(params, batch):
        norms = apply(params, batch, collect=names)
        return {n: norms[n].mean(1) if n in local else norms[n].mean(tuple(range(norms[n].ndim - 1))) for n in names}

    return mean_of(lambda batch: score(params, batch), batches)


def block_influence(
    apply: Callable[..., Mapping[str, jax.Array]], params: Any, batches: Iterable[Batch], towers: Collection[Tower]
) -> Scores:
    """Block influence: 1 - cosine of a block's input and output, mean over valid tokens (ShortGPT, arXiv 2403.03853).

    Args:
        apply: (params, batch, collect=names) -> dict that holds `<tower>/states` [L + 1, B, N, D].
        params: parameters.
        batches: calibration batches.
        towers: which towers to score, of `antgmm_jax.config.towers`.

    Returns:
        `<tower>/layers` -> float32 scores [L].

    Raises:
        AntgmmError: if there is no batch.
    """
    names = tuple(tower.axis("states") for tower in towers)

    @jax.jit
    def score(params, batch):
        out = apply(params, batch, collect=names)
        return {t.axis("layers"): _influence(out[t.axis("states")], valid_tokens(t, batch)) for t in towers}

    return mean_of(lambda batch: score(params, batch), batches)


def _influence(states: jax.Array, valid: jax.Array) -> jax.Array:
    states = states.astype(jnp.float32)
    before, after = states[:-1], states[1:]
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    change = 1.0 - (before * after).sum(-1) / jnp.maximum(norms, 1e-12)
    return change.mean((1, 2), where=jnp.broadcast_to(valid, change.shape[1:])[None])


def random(key: jax.Array, sizes: Mapping[str, int], local: Collection[str]) -> Scores:
    """Scores without information, the control that every other score must beat.

    Args:
        key: a JAX random key.
        sizes: axis -> size.
        local: the axes with one row a layer.

    Returns:
        axis -> float32 scores uniform in [0, 1).
    """
    shapes = {axis: gate_shape(axis, sizes, local) for axis in sorted(sizes)}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(np.asarray(jax.random.uniform(key, (int(ends[-1]),))), ends[:-1])
    return {axis: part.reshape(shape) for (axis, shape), part in zip(shapes.items(), parts, strict=True)}


def last(sizes: Mapping[str, int]) -> Scores:
    """The paper's rule for depth: the last blocks go first.

    Args:
        sizes: axis -> size.

    Returns:
        axis -> float32 scores [L], L for the first block down to 1 for the last, for every `*/layers` axis.
    """
    return {a: np.arange(n, 0, -1, dtype=np.float32) for a, n in sizes.items() if a.endswith("/layers")}
