"""Importance scores of units: axis -> float32 [n] (shared axis) or [L, n] (local axis); larger is more important."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.axes import sizes
from antgmm_jax.blocks.tokens import valid_tokens
from antgmm_jax.config import LMMConfig, Tower, on_image_side
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.io.stored import Stored, in_memory_order
from antgmm_jax.parallel.processes import gather
from antgmm_jax.pure import functional, is_axes, local_axes
from pruning.keep import gate_shape

CACHED = 2**18  # elements squared at a time: as float32 they fit into a CPU cache

Scores = dict[str, np.ndarray]
Batch = Mapping[str, Any]


def scores_for(axis: str, scores: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the scores of one axis after checking them.

    Args:
        axis: axis name.
        scores: axis -> scores.
        shape: expected shape.

    Returns:
        float32 scores of that shape.

    Raises:
        AntgmmError: the scores are missing, have another shape, or are not finite.
    """
    if axis not in scores:
        raise AntgmmError(
            f"{axis} has no scores to prune it by; there are scores for {', '.join(sorted(scores)) or 'no axis'}"
        )
    score = np.asarray(scores[axis], np.float32)
    if score.shape != shape:
        raise AntgmmError(
            f"{axis}: scores have shape {score.shape}, expected {shape}; compute them for the model to be pruned"
        )
    if not np.isfinite(score).all():
        raise AntgmmError(f"{axis}: {int((~np.isfinite(score)).sum())} scores are not finite; check the model and data")
    return score


def mean_of(score: Callable[[Batch], Mapping[str, jax.Array]], batches: Iterable[Batch]) -> Scores:
    """Averages measurements over batches, in float32.

    Args:
        score: batch -> {name: array}.
        batches: at least one batch.

    Returns:
        name -> mean over batches.

    Raises:
        AntgmmError: there is no batch.
    """
    total, count = {}, 0
    for batch in batches:
        new = jax.block_until_ready(score(batch))  # so that only one batch is in memory at a time
        total, count = {axis: total.get(axis, 0.0) + new[axis].astype(jnp.float32) for axis in new}, count + 1
    if count == 0:
        raise AntgmmError("importance scores need at least one calibration batch; there was none")
    return {axis: value / count for axis, value in gather(total).items()}


@partial(jax.jit, static_argnums=0)
def gate_gradient(
    loss: Callable[[Any, Any, Batch], jax.Array], params: Any, gates: Mapping[str, Any], batch: Batch
) -> dict[str, jax.Array]:
    """Absolute gradients of a loss with respect to the gates, for one batch; arguments as in `taylor`."""
    return jax.tree.map(jnp.abs, jax.grad(loss, argnums=1)(params, gates, batch))


def taylor(
    loss: Callable[[Any, Any, Batch], jax.Array], params: Any, gates: Mapping[str, Any], batches: Iterable[Batch]
) -> Scores:
    """Computes first-order importance |d loss / d gate|, averaged over batches (arXiv 2312.05795).

    A gate multiplies the output of its unit, so at 1 its gradient equals sum(w * dL/dw) over the weights that read the
    output. Only gates are differentiated, not parameters.

    Args:
        loss: (params, gates, batch) -> scalar. Pass the same function again to reuse its compilation.
        params: model parameters.
        gates: axis -> gates at which to take the gradient: `ones(config)`.
        batches: calibration batches; each shape is compiled once.

    Returns:
        axis -> float32 scores with the shapes of `gates`.

    Raises:
        AntgmmError: there is no batch.
    """
    gates = {axis: jnp.asarray(gate, jnp.float32) for axis, gate in gates.items()}
    return mean_of(lambda batch: gate_gradient(loss, params, gates, batch), batches)


def magnitude(params: Any, config: LMMConfig) -> Scores:
    """Computes the L2 norm of all weights of each unit (of each whole layer for layer axes).

    Args:
        params: model parameters; `Stored` ones are read one layer at a time.
        config: model config.

    Returns:
        axis -> float32 scores for every axis; 0 for layers without cross-attention on its axes.
    """
    depth, local = family(config).depth, local_axes(config)
    prunable = frozenset({*sizes(config), *depth.sizes(config)})
    names = jax.tree.leaves(functional(config).axes, is_leaf=is_axes)
    totals: dict[str, Any] = {}
    for dims, leaf in zip(names, jax.tree.leaves(params), strict=True):
        squares = (_stored_squares if isinstance(leaf, Stored) else _squares)(leaf, dims, prunable, local)
        for axis, square in gather(squares).items():
            totals[axis] = totals.get(axis, np.float32(0)) + square
    return {axis: np.sqrt(square) for axis, square in depth.by_layer(config, totals).items()}


@partial(jax.jit, static_argnums=(1, 2, 3))
def _squares(leaf: Any, dims: tuple[str, ...], prunable: frozenset[str], local: frozenset[str]) -> dict[str, jax.Array]:
    """Sums of squares of an array per unit of each of its prunable axes."""
    square = jnp.square(jnp.asarray(leaf, jnp.float32))

    def total(axis: str) -> jax.Array:
        own = {dims.index(axis), 0} if axis in local else {dims.index(axis)}
        return square.sum(tuple(set(range(square.ndim)) - own))

    return {axis: total(axis) for axis in dims if axis in prunable}


def _stored_squares(
    leaf: Stored, dims: tuple[str, ...], prunable: frozenset[str], local: frozenset[str]
) -> dict[str, Any]:
    """`_squares` of an array on disk, layer by layer."""
    layers, units = (dims[:1], dims[1:]) if leaf.stacked else ((), dims)

    parts_by_axis: dict[str, list[np.ndarray]] = {axis: [] for axis in dims if axis in prunable}
    for values in leaf.parts():
        part, ordered, _ = in_memory_order(values, units)
        totals = dict(zip(ordered, _totals(part), strict=True))
        totals |= {axis: totals[ordered[0]].sum(keepdims=True) for axis in layers}
        for axis, parts in parts_by_axis.items():
            parts.append(totals[axis][None] if leaf.stacked and axis in local else totals[axis])
    joined = {*layers, *local}
    return {axis: np.concatenate(parts) if axis in joined else sum(parts) for axis, parts in parts_by_axis.items()}


def _totals(part: np.ndarray) -> list[np.ndarray]:
    """Sums of squares per index of each axis, in NumPy: the copy to XLA would take ten times as long."""
    totals = [np.zeros(size, np.float32) for size in part.shape]
    rows = max(1, CACHED * len(part) // part.size)
    for first in range(0, len(part), rows):
        block = np.square(part[first : first + rows].astype(np.float32)).reshape(-1, part[0].size)
        totals[0][first : first + rows] = block @ np.ones(block.shape[1], np.float32)
        rest = (np.ones(len(block), np.float32) @ block).reshape(part.shape[1:])
        for axis in range(rest.ndim):
            totals[1 + axis] += rest.sum(axis=tuple(other for other in range(rest.ndim) if other != axis))
    return totals


def activation(
    apply: Callable[..., Mapping[str, jax.Array]],
    params: Any,
    batches: Iterable[Batch],
    axes: Collection[str],
    local: Collection[str],
) -> Scores:
    """Computes activation norms: L2 over the tokens of a sample, mean over samples.

    A sample is a row or, where each image slot passes alone, a used image slot. Minitron (arXiv 2407.14679) has the
    order reversed: the mean of absolute values over tokens, L2 over samples.

    Args:
        apply: (params, batch, collect=names) -> dict with the norms of each name, [layers, B, n] for `*/heads` and
            `*/mlp`, [B, n] for `*/embed` and for `bridge/mlp`.
        params: model parameters.
        batches: calibration batches.
        axes: axes to score.
        local: axes with one row per layer; norms of the other axes are averaged over layers.

    Returns:
        axis -> float32 scores, [n] for a shared axis or [L, n] for a local one.

    Raises:
        AntgmmError: there is no batch.
    """
    score = jax.jit(partial(activation_norms, apply, tuple(sorted(axes)), frozenset(local)))
    sums = mean_of(lambda batch: score(params, batch), batches)
    return {axis: sums[axis] / np.maximum(sums[_samples(axis)], 1e-12) for axis in axes}


def _samples(axis: str) -> str:
    return f"{axis} samples"


def activation_norms(
    apply: Callable[..., Mapping[str, jax.Array]],
    axes: tuple[str, ...],
    local: frozenset[str],
    params: Any,
    batch: Batch,
) -> dict[str, jax.Array]:
    """Sums of activation norms over the samples of one batch, and numbers of samples; arguments as in `activation`.

    Returns:
        axis -> float32 [n] or [L, n], sum over samples; for each axis also the number of its samples, float32 scalar.
    """
    norms, sums = apply(params, batch, collect=axes), {}
    for name in axes:
        samples = norms[name].astype(jnp.float32)
        count = jnp.float32(samples.shape[-2])
        if on_image_side(name) and samples.shape[-2] == batch["images"]["valid"].size:  # one for each slot
            used = jnp.asarray(batch["images"]["valid"]).reshape((1,) * (samples.ndim - 2) + (-1, 1))
            samples, count = samples * used, used.sum(dtype=jnp.float32)
        each = samples.sum(-2)
        sums[name] = each if name in local else each.mean(tuple(range(each.ndim - 1)))
        sums[_samples(name)] = count
    return sums


def block_influence(
    apply: Callable[..., Mapping[str, jax.Array]], params: Any, batches: Iterable[Batch], towers: Collection[Tower]
) -> Scores:
    """Computes 1 - cosine between input and output of each block, mean over tokens (ShortGPT, arXiv 2403.03853).

    A tower without a token in any batch, such as that of images in rows without images, has scores of 0.

    Args:
        apply: (params, batch, collect=names) -> dict with `<tower>/states` [L + 1, B, N, D].
        params: model parameters.
        batches: calibration batches.
        towers: towers to score, from `antgmm_jax.config.towers`.

    Returns:
        `<tower>/layers` -> float32 scores [L].

    Raises:
        AntgmmError: there is no batch.
    """
    score = jax.jit(partial(influences, apply, tuple(towers)))
    sums = mean_of(lambda batch: score(params, batch), batches)
    axes = [(tower.axis("layers"), tower.axis("tokens")) for tower in towers]
    return {layers: sums[layers] / np.maximum(sums[tokens], 1e-12) for layers, tokens in axes}


def influences(
    apply: Callable[..., Mapping[str, jax.Array]], towers: tuple[Tower, ...], params: Any, batch: Batch
) -> dict[str, jax.Array]:
    """Sums of block influences on one batch, and numbers of tokens; arguments as in `block_influence`.

    Returns:
        `<tower>/layers` -> float32 [L], sum over tokens; `<tower>/tokens` -> float32 scalar, number of tokens.
    """
    out, sums = apply(params, batch, collect=tuple(tower.axis("states") for tower in towers)), {}
    for t in towers:
        sums[t.axis("layers")], sums[t.axis("tokens")] = _influence(out[t.axis("states")], valid_tokens(t, batch))
    return sums


def _influence(states: jax.Array, valid: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    states = states.astype(jnp.float32)
    before, after = states[:-1], states[1:]
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    change = 1.0 - (before * after).sum(-1) / jnp.maximum(norms, 1e-12)
    valid = jnp.broadcast_to(valid, change.shape[1:])
    return change.sum((1, 2), where=valid[None]), valid.sum(dtype=jnp.float32)


def random(key: jax.Array, sizes: Mapping[str, int], local: Collection[str]) -> Scores:
    """Draws random scores, as a baseline for the other scores.

    Args:
        key: JAX random key.
        sizes: axis -> size.
        local: axes with one row per layer.

    Returns:
        axis -> float32 scores, uniform in [0, 1).
    """
    shapes = {axis: gate_shape(axis, sizes, local) for axis in sorted(sizes)}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(np.asarray(jax.random.uniform(key, (int(ends[-1]),))), ends[:-1])
    return {axis: part.reshape(shape) for (axis, shape), part in zip(shapes.items(), parts, strict=True)}


def last(sizes: Mapping[str, int]) -> Scores:
    """Scores layers by position, so that the last ones are removed first (the paper's rule, arXiv 2312.05795).

    Args:
        sizes: axis -> size.

    Returns:
        axis -> float32 scores [L], from L for the first layer down to 1 for the last, for every `*/layers` axis.
    """
    return {a: np.arange(n, 0, -1, dtype=np.float32) for a, n in sizes.items() if a.endswith("/layers")}
