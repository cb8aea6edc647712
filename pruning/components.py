"""Pruning of a width to principal components of the residual stream, instead of to a subset of channels.

In a pre-norm transformer, an orthogonal change of basis of the residual stream can be absorbed into the weights
(SliceGPT, arXiv 2401.15024). A third of the principal components hold as much variance as nearly all channels.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
from pruning.keep import untied

Path = tuple[str, ...]


def principal(
    apply: Callable[..., Mapping[str, jax.Array]],
    params: Any,
    config: LMMConfig,
    batches: Iterable[Batch],
    targets: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """Computes the principal components of the normed residual stream, for each width to be pruned.

    Args:
        apply: (params, batch, collect=names) -> dict with `<tower>/states` [L + 1, B, N, D].
        params: model parameters.
        config: model config.
        batches: calibration batches.
        targets: width axis -> number of components to keep.

    Returns:
        axis -> float32 basis [n, k] that maps the model's n channels to the student's k. Its columns are orthogonal
        under an RMSNorm; under a LayerNorm, which subtracts the mean, they span k - 1 dimensions, and rows and columns
        sum to 0. They are scaled so that a norm over k channels gives blocks inputs of the same scale as one over n.

    Raises:
        AntgmmError: an axis that has no such basis, too few or too many components, or no batch.
    """
    present = sizes(config)
    for axis, count in targets.items():
        check_basis(config, axis)
        least = 1 + _centred(config, axis)
        if not least <= count <= present[axis]:
            raise AntgmmError(f"{axis} = {count}: choose {least} to {present[axis]} components")
    score = jax.jit(partial(second_moments, apply, config, tuple(targets)))
    sums = mean_of(lambda batch: score(params, batch), batches)

    def moments(tower: Tower) -> np.ndarray:
        tokens = max(float(sums[tower.axis("tokens")]), 1e-12)
        return sums[tower.axis("states")].astype(np.float64) / tokens

    return {
        axis: _basis(np.sum([moments(t) for t in _towers(config, axis)], axis=0), count, centred=_centred(config, axis))
        for axis, count in targets.items()
    }


def second_moments(
    apply: Callable[..., Mapping[str, jax.Array]], config: LMMConfig, axes: tuple[str, ...], params: Any, batch: Batch
) -> dict[str, jax.Array]:
    """Sums of second moments of one batch's states, and numbers of tokens, for `principal`.

    Args:
        apply: as in `principal`.
        config: model config.
        axes: width axes.
        params: model parameters.
        batch: the batch.

    Returns:
        `<tower>/states` of each tower of these widths -> float32 [D, D], sum over tokens; `<tower>/tokens` -> float32
        scalar, number of tokens.
    """
    users = [(tower.axis("states"), tower, _centred(config, axis)) for axis in axes for tower in _towers(config, axis)]
    out = apply(params, batch, collect=tuple(name for name, _, _ in users))
    sums = {}
    for name, tower, centred in users:
        sums[name], sums[tower.axis("tokens")] = _second_moments(out[name], valid_tokens(tower, batch), centred=centred)
    return sums


def _second_moments(states: jax.Array, valid: jax.Array | np.ndarray, *, centred: bool) -> tuple[jax.Array, jax.Array]:
    """Sum of outer products [D, D] of the tokens' normed states (unit mean square), and number of these tokens."""
    states = states.astype(jnp.float32)
    if centred:
        states = states - jnp.mean(states, axis=-1, keepdims=True)
    unit = states * jax.lax.rsqrt(jnp.mean(jnp.square(states), axis=-1, keepdims=True) + 1e-12)
    weights = jnp.broadcast_to(valid, states.shape[1:3]).astype(jnp.float32)
    return jnp.einsum("lbnd,lbne,bn->de", unit, unit, weights, precision="highest"), len(states) * weights.sum()


def _basis(moments: np.ndarray, count: int, *, centred: bool) -> np.ndarray:
    # Imported on use: scipy is slow to import, and nothing else needs it.
    from scipy.linalg import helmert

    size = len(moments)
    # Orthonormal bases of the zero-sum vectors in the model's and the student's channels. Large components stay in few
    # channels: if spread evenly over all channels, the student learns more slowly (docs/lab/calibration.md).
    inside, outside = (helmert(size).T, helmert(count)) if centred else (np.eye(size), np.eye(count))
    spread, components = np.linalg.eigh(inside.T @ moments @ inside)
    if not spread.sum() > 0:
        raise AntgmmError(
            "there are no principal components of states that no calibration row has: give rows with images"
        )
    best = (inside @ components)[:, ::-1][:, : len(outside)]
    share = spread[::-1][: len(outside)].sum() / spread.sum()
    return (np.sqrt(share * size / count) * best @ outside).astype(np.float32)


def _towers(config: LMMConfig, axis: str) -> list[Tower]:
    return [tower for tower in towers(config).values() if tower.embed == axis]


def check_basis(config: LMMConfig, axis: str) -> None:
    """Checks that an axis can be pruned to principal components.

    Args:
        config: model config.
        axis: axis name.

    Raises:
        AntgmmError: the axis is not a width, a norm writes to its residual stream (post-norm), or no linear map absorbs
            the bias of a norm.
    """
    users = _towers(config, axis)
    if not users:
        raise AntgmmError(f"{axis} has no principal components: only widths (*/embed) do; use another score")
    vision = axis == "vision/embed" and (config.vision.first_norm or not config.vision.final_norm)
    if vision or any(tower.stack.post_norm or tower.stack.sandwich for tower in users):
        raise AntgmmError(
            f"{axis} has no principal components: a norm writes to its residual stream; use another score"
        )
    names = _flat(functional(config).axes)
    for norm, readers in _readers(config, frozenset([axis])).items():
        bare = [path for path in readers if _bias(path) not in names]
        if (*norm, "bias") in names and bare:
            raise AntgmmError(
                f"{axis} has no principal components: {'/'.join(bare[0])} has no bias to absorb the bias of its norm; "
                "use another score"
            )
        if (*norm, "bias") in names and not readers:
            raise AntgmmError(
                f"{axis} has no principal components: no linear map absorbs the bias of {'/'.join(norm)}; use another"
                " score"
            )


def _centred(config: LMMConfig, axis: str) -> bool:
    """Whether the norms of a width subtract the mean."""
    return any(tower.stack.norm == "layer" for tower in _towers(config, axis))


def _bias(kernel: Path) -> Path:
    return (*kernel[:-1], f"{kernel[-1]}_bias")


def untie(config: LMMConfig, params: Any) -> tuple[LMMConfig, Any]:
    """Gives the head weights of its own, which contain its factor width ** -0.5 if it has one.

    Args:
        config: model config.
        params: model parameters.

    Returns:
        Config and parameters that compute the same logits.
    """
    language = params["language"]
    head = language["tokens"].T if config.language.tied else language["out"]
    if config.language.scaled_head:
        head = (head.astype(jnp.float32) * config.language.decoder.embed**-0.5).astype(head.dtype)
    return untied(config), {**params, "language": {**language, "out": head}}


def fold_norms(config: LMMConfig, params: Any, axes: Iterable[str]) -> Any:
    """Moves scales and biases of norms into the linear maps that read them, so that all scales are 1.

    Args:
        config: model config; for the text width, of a model with a head of its own (`untie`).
        params: model parameters.
        axes: widths of the norms; `check_basis` must allow them.

    Returns:
        Parameters of the same shapes that compute the same; changed ones are float32.
    """
    names, leaves = _flat(functional(config).axes), _flat(params)
    for norm, readers in _readers(config, frozenset(axes)).items():
        scale = jnp.asarray(leaves[(*norm, "scale")], jnp.float32)
        bias = leaves.get((*norm, "bias"))
        bias = None if bias is None else jnp.asarray(bias, jnp.float32)
        axis = names[(*norm, "scale")][-1]
        for path in readers:
            kernel, dim = leaves[path], names[path].index(axis)
            along = [1] * kernel.ndim
            along[dim] = scale.shape[-1]
            if scale.ndim == 2:  # one row per layer
                along[0] = len(scale)
            if bias is not None:
                leaves[_bias(path)] = leaves[_bias(path)] + jnp.sum(kernel * bias.reshape(along), axis=dim)
            leaves[path] = kernel * scale.reshape(along)
        leaves[(*norm, "scale")] = jnp.ones_like(scale)
        if bias is not None:
            leaves[(*norm, "bias")] = jnp.zeros_like(bias)
    return unflatten_dict(leaves)


def project(config: LMMConfig, params: Any, bases: Mapping[str, np.ndarray]) -> tuple[LMMConfig, Any]:
    """Projects parameters to new bases of their widths; for the text width, it unties the head first.

    Args:
        config: model config.
        params: model parameters.
        bases: width axis -> float [n, k], from `principal`.

    Returns:
        Config with the old sizes, and parameters with k instead of n channels.

    Raises:
        AntgmmError: as in `check_basis`, or the parameters are on disk (`Stored`).
    """
    if any(isinstance(leaf, Stored) for leaf in jax.tree.leaves(params)):
        raise AntgmmError("pruning to principal components needs whole arrays: load the model with load_hf")
    for axis in bases:
        check_basis(config, axis)
    if "text/embed" in bases:
        config, params = untie(config, params)
    names = _flat(functional(config).axes)
    norms, originals, out = set(_readers(config, frozenset(bases))), _flat(params), {}
    for path, leaf in _flat(fold_norms(config, params, bases)).items():
        for dim, axis in enumerate(names[path]):
            if axis not in bases:
                continue
            if path[:-1] in norms:  # all scales are 1
                leaf = leaf[..., : bases[axis].shape[1]]
            else:
                # Accelerators would round the factors of a float32 product to TF32 or bfloat16.
                basis = jnp.asarray(bases[axis])
                projection = jnp.tensordot(leaf.astype(jnp.float32), basis, (dim, 0), precision="highest")
                leaf = jnp.moveaxis(projection, -1, dim)
        out[path] = jax.block_until_ready(place(leaf.astype(originals[path].dtype), names[path]))
    return config, unflatten_dict(out)


def projected(config: LMMConfig, axes: Iterable[str]) -> set[str]:
    """Returns the parameters that a projection of widths changes: those with a width, and the readers of its norms.

    Args:
        config: model config.
        axes: widths.

    Returns:
        Paths, parts joined by "/".
    """
    widths = frozenset(axes)
    changed = {path for path, names in _flat(functional(config).axes).items() if widths & {*names}}
    for readers in _readers(config, widths).values():
        changed |= {*readers, *map(_bias, readers)}
    return {"/".join(path) for path in changed}


def _flat(tree: Any) -> dict[Path, Any]:
    return {tuple(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


def _readers(config: LMMConfig, axes: frozenset[str]) -> dict[Path, tuple[Path, ...]]:
    """Norm -> linear maps that read it, for the norms of some widths; the head counts as untied."""
    readers: dict[Path, tuple[Path, ...]] = {}
    for tower in towers(config).values():
        if tower.embed not in axes:
            continue
        root, stack = tuple(tower.root.split("/")), tower.stack
        blocks, cross = (*root, "blocks"), (*root, "cross")
        readers[*blocks, "norm1"] = tuple((*blocks, "attention", name) for name in "qkv")
        readers[*blocks, "norm2"] = tuple((*blocks, "mlp", name) for name in ("up", "gate")[: 1 + stack.gated])
        if stack.cross_heads:
            readers[*cross, "norm"] = ((*cross, "attention", "q"),)
    if "vision/embed" in axes:
        readers["vision", "final_norm"] = tuple(tuple(path.split("/")) for path in family(config).image_readers(config))
    if "text/embed" in axes:
        if config.encoder_decoder:
            readers["language", "encoder_norm"] = tuple(
                ("language", "decoder", "cross", "attention", name) for name in "kv"
            )
        readers["language", "norm"] = (("language", "out"),)
    return readers
