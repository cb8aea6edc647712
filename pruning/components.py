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

from antgmm_jax.axes import sizes
from antgmm_jax.blocks.tokens import valid_tokens
from antgmm_jax.config import LMMConfig, Tower, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.io.stored import Stored
from antgmm_jax.parallel.sharding import place
from antgmm_jax.pure import functional
from pruning.importance import Batch, mean_of

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
        axis -> float32 [n, k]: the student's channels in the model's. The columns are k orthogonal components; under a
        LayerNorm, which takes the mean off, they span k - 1, and columns and rows sum to 0. They have the length by
        which a norm over k channels divides more than one over n, so that what is read keeps its scale; a head that
        is scaled by its width (T5's, tied) changes its own, as after any cut.

    Raises:
        AntgmmError: an axis without such bases, fewer or more components than there are, or no batch.
    """
    present = sizes(config)
    for axis, count in targets.items():
        check_basis(config, axis)
        least = 1 + _centred(config, axis)
        if not least <= count <= present[axis]:
            raise AntgmmError(f"{axis} = {count}: give {least} to {present[axis]} components")
    users = {axis: _towers(config, axis) for axis in targets}
    names = tuple(tower.axis("states") for axis in targets for tower in users[axis])

    @jax.jit
    def moments(params, batch):
        out = apply(params, batch, collect=names)
        return {
            name: _second_moments(out[name], valid_tokens(tower, batch), centred=_centred(config, axis))
            for axis in targets
            for tower in users[axis]
            for name in (tower.axis("states"),)
        }

    found = mean_of(lambda batch: moments(params, batch), batches)
    return {
        axis: _basis(
            np.stack([found[tower.axis("states")] for tower in users[axis]]).astype(np.float64).sum(axis=0),
            count,
            centred=_centred(config, axis),
        )
        for axis, count in targets.items()
    }


def _second_moments(states: jax.Array, valid: jax.Array, *, centred: bool) -> jax.Array:
    """Mean outer product of tokens' states as a norm leaves them, at unit mean square, [D, D]."""
    states = states.astype(jnp.float32)
    if centred:
        states = states - jnp.mean(states, axis=-1, keepdims=True)
    unit = states * jax.lax.rsqrt(jnp.mean(jnp.square(states), axis=-1, keepdims=True) + 1e-12)
    weights = jnp.broadcast_to(valid, states.shape[1:3]).astype(jnp.float32)
    total = states.shape[0] * jnp.maximum(weights.sum(), 1.0)
    return jnp.einsum("lbnd,lbne,bn->de", unit, unit, weights) / total


def _basis(moments: np.ndarray, count: int, *, centred: bool) -> np.ndarray:
    # Imported here: every command would wait for it, and only a cut to components needs it.
    from scipy.linalg import helmert

    size = len(moments)
    # Orthonormal bases of what sums to 0, in the model's channels and in the student's. The largest components stay in
    # few channels: spread evenly over all of them, the student learns more slowly (docs/calibration.md).
    inside, outside = (helmert(size).T, helmert(count)) if centred else (np.eye(size), np.eye(count))
    spread, components = np.linalg.eigh(inside.T @ moments @ inside)
    best = (inside @ components)[:, ::-1][:, : len(outside)]
    share = spread[::-1][: len(outside)].sum() / spread.sum()
    return (np.sqrt(share * size / count) * best @ outside).astype(np.float32)


def _towers(config: LMMConfig, axis: str) -> list[Tower]:
    return [tower for tower in towers(config).values() if tower.embed == axis]


def check_basis(config: LMMConfig, axis: str) -> None:
    """Refuses an axis that cannot be cut to a basis.

    Args:
        config: the model.
        axis: the axis.

    Raises:
        AntgmmError: it is no tower's width, or a norm stands on its stream itself.
    """
    users = _towers(config, axis)
    if not users:
        raise AntgmmError(f"{axis} has no principal components: only widths do, */embed; score it another way")
    vision = axis == "vision/embed" and (config.vision.first_norm or not config.vision.final_norm)
    if vision or any(tower.stack.post_norm for tower in users):
        raise AntgmmError(f"{axis} has no principal components: a norm writes to its stream; score it another way")
    names = _flat(functional(config).axes)
    for norm, readers in _readers(config, frozenset([axis])).items():
        bare = [path for path in readers if _bias(path) not in names]
        if (*norm, "bias") in names and bare:
            raise AntgmmError(
                f"{axis} has no principal components: {'/'.join(bare[0])} has no bias to take its norm's; "
                "score it another way"
            )


def _centred(config: LMMConfig, axis: str) -> bool:
    """Whether the norms that stand on a width take the mean off."""
    return any(tower.stack.norm == "layer" for tower in _towers(config, axis))


def _bias(kernel: Path) -> Path:
    return (*kernel[:-1], f"{kernel[-1]}_bias")


def folded(config: LMMConfig, params: Any, axes: Iterable[str]) -> Any:
    """Parameters whose norms along some widths have no scales of their own: those are in what reads them.

    The function stays the same, but where the table of tokens is the head as well: there the last norm's scales become
    their mean.

    Args:
        config: the model.
        params: its parameters.
        axes: width axes that `check_basis` allows.

    Returns:
        Parameters of the same shapes, those that changed in float32.

    Raises:
        AntgmmError: parameters that lie on disk.
    """
    if any(isinstance(leaf, Stored) for leaf in jax.tree.leaves(params)):
        raise AntgmmError("a cut to principal components reads whole arrays: load the model with load_hf")
    names, found = _flat(functional(config).axes), _flat(params)
    for norm, readers in _readers(config, frozenset(axes)).items():
        scale = jnp.asarray(found[(*norm, "scale")], jnp.float32)
        bias = found.get((*norm, "bias"))
        bias = None if bias is None else jnp.asarray(bias, jnp.float32)
        axis = names[(*norm, "scale")][-1]
        for path in readers:
            kernel, dim = found[path], names[path].index(axis)
            along = [1] * kernel.ndim
            along[dim] = scale.shape[-1]
            if scale.ndim == 2:  # a row for each layer
                along[0] = len(scale)
            if bias is not None:
                found[_bias(path)] = found[_bias(path)] + jnp.sum(kernel * bias.reshape(along), axis=dim)
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
        Parameters with k in the place of n; a tied head loses what `folded` says.

    Raises:
        AntgmmError: as `check_basis` and `folded`.
    """
    for axis in bases:
        check_basis(config, axis)
    names = _flat(functional(config).axes)
    norms, dtypes, found = set(_readers(config, frozenset(bases))), _flat(params), {}
    for path, leaf in _flat(folded(config, params, bases)).items():
        for dim, axis in enumerate(names[path]):
            if axis not in bases:
                continue
            if path[:-1] in norms:  # all alike
                leaf = leaf[..., : bases[axis].shape[1]]
            else:
                turned = jnp.tensordot(leaf.astype(jnp.float32), jnp.asarray(bases[axis]), (dim, 0))
                leaf = jnp.moveaxis(turned, -1, dim)
        found[path] = jax.block_until_ready(place(leaf.astype(dtypes[path].dtype), names[path]))
    return unflatten_dict(found)


def _flat(tree: Any) -> dict[Path, Any]:
    return {tuple(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


def _readers(config: LMMConfig, axes: frozenset[str]) -> dict[Path, tuple[Path, ...]]:
    """Norm -> the linear maps that read it, for the norms along some widths; none: the table of tokens alone."""
    found: dict[Path, tuple[Path, ...]] = {}
    for tower in towers(config).values():
        if tower.embed not in axes:
            continue
        root, stack = tuple(tower.root.split("/")), tower.stack
        blocks, cross = (*root, "blocks"), (*root, "cross")
        found[*blocks, "norm1"] = tuple((*blocks, "attention", name) for name in "qkv")
        found[*blocks, "norm2"] = tuple((*blocks, "mlp", name) for name in ("up", "gate")[: 1 + stack.gated])
        if stack.cross_heads:
            found[*cross, "norm"] = ((*cross, "attention", "q"),)
    if "vision/embed" in axes:
        found["vision", "final_norm"] = tuple(tuple(path.split("/")) for path in family(config).image_readers(config))
    if "text/embed" in axes:
        if config.encoder_decoder:
            found["language", "encoder_norm"] = tuple(
                ("language", "decoder", "cross", "attention", name) for name in "kv"
            )
        found["language", "norm"] = () if config.language.tied else (("language", "out"),)
    return found
