"""A width cut to the principal components of its stream: a basis in the place of kept channels.

Where norms stand before each block, what blocks read and write can be turned into another orthogonal basis (SliceGPT,
arXiv 2401.15024). Of the components of largest variance a third hold what of the channels nearly all hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.linalg import helmert

from antgmm_jax.config import LMMConfig, QFormerConfig, StackConfig, embed_axis, stacks
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import functional
from antgmm_jax.sharding import place
from antgmm_jax.stored import Stored
from pruning.importance import Batch, mean_of, valid_tokens

Path = tuple[str, ...]


def principal(
    apply: Callable[..., Mapping[str, jax.Array]],
    params: Any,
    config: LMMConfig,
    batches: Iterable[Batch],
    targets: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """The bases that keep most of what blocks read, one for each width.

    Args:
        apply: (params, batch, collect=names) -> dict that holds `<tower>/states` [L + 1, B, N, D].
        params: parameters.
        config: their config.
        batches: calibration batches.
        targets: width axis -> components to keep.

    Returns:
        axis -> float32 [n, k]: the student's channels in the model's. Columns are orthogonal, and sum to 0 where a
        LayerNorm takes the mean off. Each has the length by which a norm over k channels divides more than one over n,
        so that what is read keeps its scale.

    Raises:
        AntgmmError: an axis without such bases, or no batch.
    """
    for axis in targets:
        check_basis(config, axis)
    states = {axis: [f"{tower}/states" for tower in _towers(config, axis)] for axis in targets}
    names = tuple(name for axis in targets for name in states[axis])

    @jax.jit
    def moments(params, batch):
        out = apply(params, batch, collect=names)
        return {name: _second_moments(out[name], valid_tokens(batch, name)) for name in names}

    found = mean_of(lambda batch: moments(params, batch), batches)
    return {
        axis: _basis(
            np.stack([found[name] for name in states[axis]]).astype(np.float64).sum(axis=0),
            count,
            centred=any(stack.norm == "layer" for stack in _towers(config, axis).values()),
        )
        for axis, count in targets.items()
    }


def _second_moments(states: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Mean outer product of tokens' states, each at unit mean square as a norm leaves it, [D, D]."""
    states = states.astype(jnp.float32)
    unit = states * jax.lax.rsqrt(jnp.mean(jnp.square(states), axis=-1, keepdims=True) + 1e-12)
    weights = jnp.ones(states.shape[1:3]) if valid is None else valid.astype(jnp.float32)
    total = states.shape[0] * jnp.maximum(weights.sum(), 1.0)
    return jnp.einsum("lbnd,lbne,bn->de", unit, unit, weights) / total


def _basis(moments: np.ndarray, count: int, *, centred: bool) -> np.ndarray:
    size = len(moments)
    # Orthonormal bases of what sums to 0, in the model's channels and in the student's. A component stays in few
    # channels: spread evenly over all of them, the student learns more slowly (docs/calibration.md).
    inside, outside = (helmert(size).T, helmert(count)) if centred else (np.eye(size), np.eye(count))
    spread, components = np.linalg.eigh(inside.T @ moments @ inside)
    best = (inside @ components)[:, ::-1][:, : len(outside)]
    share = spread[::-1][: len(outside)].sum() / spread.sum()
    return (np.sqrt(share * size / count) * best @ outside).astype(np.float32)


def _towers(config: LMMConfig, axis: str) -> dict[str, StackConfig]:
    return {tower: stack for tower, stack in stacks(config).items() if embed_axis(tower) == axis}


def check_basis(config: LMMConfig, axis: str) -> None:
    """Refuses an axis that cannot be cut to a basis.

    Args:
        config: the model.
        axis: the axis.

    Raises:
        AntgmmError: it is no tower's width, or a norm stands on its stream itself.
    """
    users = list(_towers(config, axis).values())
    if not users:
        raise AntgmmError(f"{axis} has no principal components: only widths do, */embed of a tower with blocks")
    vision = axis == "vision/embed" and (config.vision.first_norm or not config.vision.final_norm)
    if vision or any(stack.post_norm for stack in users):
        raise AntgmmError(f"{axis} has no principal components: a norm writes to its stream, score it another way")
    if any(stack.norm == "layer" and not (stack.qkv_bias and stack.mlp_bias) for stack in users):
        raise AntgmmError(f"{axis} has no principal components: its norms have biases, what reads them has none")


def folded(config: LMMConfig, params: Any, axes: Iterable[str]) -> Any:
    """Parameters whose norms along some widths have no scales of their own: those are in what reads them.

    The function stays the same, but where the table of tokens is the head as well: there the last norm's scales become
    their mean.

    Args:
        config: the model.
        params: its parameters.
        axes: width axes that `check_basis` allows.

    Returns:
        Parameters of the same shapes.

    Raises:
        AntgmmError: parameters that lie on disk.
    """
    if any(isinstance(leaf, Stored) for leaf in jax.tree.leaves(params)):
        raise AntgmmError("a cut to principal components reads whole arrays: load the model with load_hf")
    names, found = _flat(functional(config).axes), _flat(params)
    for norm, readers in _readers(config, frozenset(axes)).items():
        scale, bias = found[(*norm, "scale")], found.get((*norm, "bias"))
        axis = names[(*norm, "scale")][-1]
        for path in readers:
            kernel, dim = found[path], names[path].index(axis)
            along = [1] * kernel.ndim
            along[dim] = scale.shape[-1]
            along[0] *= scale.shape[0] if scale.ndim == 2 else 1  # a row for each layer
            if bias is not None:
                beside = (*path[:-1], f"{path[-1]}_bias")
                found[beside] = found[beside] + jnp.sum(kernel * bias.reshape(along), axis=dim)
            found[path] = kernel * scale.reshape(along)
        found[(*norm, "scale")] = jnp.ones_like(scale) if readers else jnp.full_like(scale, jnp.mean(scale))
        if bias is not None:
            found[(*norm, "bias")] = jnp.zeros_like(bias)
    return unflatten_dict(found)


def projected(config: LMMConfig, params: Any, bases: Mapping[str, np.ndarray]) -> Any:
    """Parameters in other bases of their widths.

    Args:
        config: the model.
        params: its parameters.
        bases: width axis -> float [n, k], from `principal`.

    Returns:
        Parameters with k in the place of n.

    Raises:
        AntgmmError: as `check_basis` and `folded`.
    """
    for axis in bases:
        check_basis(config, axis)
    names = _flat(functional(config).axes)
    norms, found = set(_readers(config, frozenset(bases))), {}
    for path, leaf in _flat(folded(config, params, bases)).items():
        for dim, axis in enumerate(names[path]):
            if axis not in bases:
                continue
            if path[:-1] in norms:  # all alike
                leaf = leaf[..., : bases[axis].shape[1]]
            else:
                turned = jnp.tensordot(leaf.astype(jnp.float32), jnp.asarray(bases[axis]), (dim, 0))
                leaf = jnp.moveaxis(turned, -1, dim).astype(leaf.dtype)
        found[path] = jax.block_until_ready(place(leaf, names[path]))
    if config.language.scaled_head and "text/embed" in bases:
        size, count = bases["text/embed"].shape
        # The head divides by the root of its width.
        found["language", "norm", "scale"] = found["language", "norm", "scale"] * (count / size) ** 0.5
    return unflatten_dict(found)


def _flat(tree: Any) -> dict[Path, Any]:
    return {tuple(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


def _readers(config: LMMConfig, axes: frozenset[str]) -> dict[Path, tuple[Path, ...]]:
    """Norm -> the linear maps that read it, for the norms along some widths; none: the table of tokens alone."""
    found: dict[Path, tuple[Path, ...]] = {}
    roots = {"vision": ("vision", "stack"), "bridge": ("bridge", "stack"), "encoder": ("language", "encoder")}
    for tower, stack in stacks(config).items():
        if embed_axis(tower) not in axes:
            continue
        root = roots.get(tower, ("language", "decoder"))
        blocks, cross = (*root, "blocks"), (*root, "cross")
        found[*blocks, "norm1"] = tuple((*blocks, "attention", name) for name in "qkv")
        found[*blocks, "norm2"] = tuple((*blocks, "mlp", name) for name in ("up", "gate")[: 1 + stack.gated])
        if stack.cross_heads:
            found[*cross, "norm"] = ((*cross, "attention", "q"),)
    if "vision/embed" in axes:
        found["vision", "final_norm"] = (
            tuple(("bridge", "stack", "cross", "attention", name) for name in "kv")
            if isinstance(config.bridge, QFormerConfig)
            else (("bridge", "up"),)
        )
    if "text/embed" in axes:
        if config.language.encoder is not None:
            found["language", "encoder_norm"] = tuple(
                ("language", "decoder", "cross", "attention", name) for name in "kv"
            )
        found["language", "norm"] = () if config.language.tied else (("language", "out"),)
    return found
