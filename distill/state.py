"""State of training: parameters, moments and the number of steps."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from antgmm_jax.parallel import sharding
from antgmm_jax.pure import Params
from distill.optimizer import Optimizer
from distill.trainable import by_path, combine, is_masked, trainable, under


class State(NamedTuple):
    """State of training: parameters, optimizer state, and the number of completed steps.

    Trained parameters are float32; frozen ones may be narrower (`state_dtypes`).
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


def init_state(params: Params, optimizer: Optimizer, *, own: bool = False) -> State:
    """Creates the initial state.

    Args:
        params: parameters; those that are trained are cast to float32, frozen ones keep their dtypes.
        optimizer: from `make_optimizer`.
        own: whether nothing else uses the arrays. The training step donates its state, so other arrays are copied.

    Returns:
        The `State`.
    """
    # In bfloat16, a step would be lost in rounding, and the mean of squares would never decay.
    params = combine(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable(params, optimizer.frozen)), params)
    if not own:
        params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    opt_state = optimizer.transform.init(trainable(params, optimizer.frozen))
    return State(params, opt_state, jnp.zeros((), jnp.int32))


def state_dtypes(params: Params, frozen: Sequence[str], changed: Collection[str] = ()) -> Params:
    """Returns the dtype of each parameter in a state: that of its file if it is frozen and has two bytes, else float32.

    A step that computes in bfloat16 reads the same numbers from either, and needs no copy of a bfloat16 file's.

    Args:
        params: parameters as they are stored, or their shapes.
        frozen: path prefixes of parameters that are not trained.
        changed: paths of parameters that are float32 although they are frozen, as new numbers take their place.

    Returns:
        The tree of NumPy dtypes.
    """

    def dtype_of(path: str, dtype: np.dtype) -> np.dtype:
        half = dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating)
        constant = path not in changed and any(under(path, prefix) for prefix in frozen)
        return dtype if half and constant else np.dtype(np.float32)

    leaves, treedef = by_path(params)
    return treedef.unflatten([dtype_of(path, np.dtype(leaf.dtype)) for path, leaf in leaves.items()])


def map_moments(
    opt_state: optax.OptState, params: Params, optimizer: Optimizer, change: Callable[[Params], Params]
) -> optax.OptState:
    """Applies a tree -> tree function to each parameter-shaped tree of an optimizer state (the moments).

    For example, pruning (`pruning.take`) applies to moments as to parameters. Step counts are unchanged.

    Args:
        opt_state: optimizer state.
        params: parameters with the shapes of the moments.
        optimizer: from `make_optimizer`.
        change: function from a tree with the parameters' structure to a tree with the same structure. Frozen leaves
            have no moments: `change` receives the parameter instead, and its result is ignored.

    Returns:
        The new optimizer state.
    """
    # `optax.tree.map_params` maps single leaves, but pruning by axis needs the whole tree.
    structure = jax.tree.structure(trainable(params, optimizer.frozen))

    def like_params(tree: Any) -> bool:
        return jax.tree.structure(tree, is_leaf=is_masked) == structure

    def changed(tree: Any) -> Any:
        if not like_params(tree):
            return tree
        whole = trainable(change(combine(tree, params)), optimizer.frozen)
        # Muon has separate trees of moments for linear maps and the rest: masked leaves stay masked. By path, as a
        # change may leave parameters out.
        masked = {path for path, leaf in by_path(tree, is_masked)[0].items() if is_masked(leaf)}
        leaves, treedef = by_path(whole)
        return treedef.unflatten([optax.MaskedNode() if path in masked else leaf for path, leaf in leaves.items()])

    return jax.tree.map(changed, opt_state, is_leaf=like_params)


def shard_state(state: State, axes: Params, optimizer: Optimizer) -> State:
    """Shards parameters and moments by the rules of the mesh.

    Args:
        state: arrays (also traced), or `jax.ShapeDtypeStruct`s.
        axes: names of the parameters' axes, from `Functional.axes`.
        optimizer: from `make_optimizer`.

    Returns:
        The sharded state; unchanged without a mesh.
    """
    if not sharding.active():
        return state
    moments = map_moments(state.opt_state, state.params, optimizer, lambda tree: sharding.place_tree(tree, axes))
    return State(sharding.place_tree(state.params, axes), moments, state.step)
