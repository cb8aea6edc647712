"""AdamW or Muon with clipping and a schedule, over the trainable part of the parameters."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from optax.contrib import MuonDimensionNumbers, muon
from pydantic import Field

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import sharding
from distill.schema import settings

Params = Any
Schedule = Literal["cosine", "constant"]
B1, EPS = 0.9, 1e-8
"""Adam's decay of first moments, and its denominator's smallest value."""

_READS = ("q", "k", "v", "up", "gate")
_WRITES = ("o", "down", "out", "patch")
_HEAD = ["language", "out"]


class Optimizer(NamedTuple):
    """A gradient transformation without its learning rate, the schedule of that rate, and what is not trained.

    Attributes:
        transform: gradients to unit-rate updates (clipping, moments, weight decay).
        schedule: step to learning rate, the sole place that knows it.
        frozen: path prefixes of parameters that stay as they are.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    frozen: tuple[str, ...]


class State(NamedTuple):
    """What a step reads and writes: float32 parameters, optimizer state, and the number of steps taken."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


@settings
class OptimizerConfig:
    """AdamW or Muon with clipping and a schedule that runs once over a stage.

    Attributes:
        kind: "adamw", or "muon", which orthogonalizes the updates of linear maps and leaves the rest to AdamW: fewer
            steps to the same loss, each a little dearer.
        learning_rate: the peak.
        schedule: "cosine" decay to zero, or "constant".
        warmup: steps of linear rise.
        weight_decay: per unit of learning rate; norms and biases are spared.
        clip: largest global norm of the gradient; inf clips nothing.
        b2: decay of Adam's second moments; lower follows a loss that changes in jumps.
        rates: path prefix of parameters ("vision", "vision/patch") -> factor of their learning rate; the longest prefix
            decides.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Schedule = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    b2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})


def make_optimizer(config: OptimizerConfig, steps: int, frozen: tuple[str, ...] = ()) -> Optimizer:
    """AdamW (arXiv 1711.05101) or Muon, after clipping the gradient to a global norm.

    Muon orthogonalizes the momentum of the model's linear maps (https://kellerjordan.github.io/posts/muon), scaled to
    the root mean square that AdamW's updates have (arXiv 2502.16982), so that rates carry over; tables, norms and
    biases take AdamW with Nesterov's momentum.

    Args:
        config: which one, its rate and schedule.
        steps: step at which the decay reaches zero; the rate stays there afterwards.
        frozen: path prefixes ("vision", "language/encoder") of parameters that are not trained.

    Returns:
        The `Optimizer`.

    Raises:
        AntgmmError: the warm-up is not shorter than the steps.
    """
    steps = max(steps, 1)  # of a stage that only cuts none is taken
    if config.warmup >= steps:
        raise AntgmmError(f"warmup = {config.warmup} with steps = {steps}: give fewer warm-up steps than steps")
    moments = optax.scale_by_adam(B1, config.b2, EPS) if config.kind == "adamw" else _muon(config.b2)
    transform = optax.chain(
        optax.clip_by_global_norm(config.clip),
        moments,
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        *([_rates(config.rates)] if config.rates else []),
    )
    return Optimizer(transform, _schedule(config.schedule, config.learning_rate, config.warmup, steps), tuple(frozen))


def _rates(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates times the factor of their longest prefix."""

    def prefixes(params: Params) -> Params:
        leaves, treedef = _by_path(params)
        _check_prefixes("rates of", [*rates], leaves)
        matching = ([prefix for prefix in rates if under(path, prefix)] for path in leaves)
        return jax.tree.unflatten(treedef, [max(some, key=len, default="") for some in matching])

    scales = {prefix: optax.scale(factor) for prefix, factor in rates.items()}
    return optax.partition({**scales, "": optax.identity()}, prefixes)


def _muon(b2: float) -> optax.GradientTransformation:
    # Its own five steps, one row each: it then loops over them, where it would write each out for every array, which
    # takes longer on a CPU, to run and to compile.
    steps = ((3.4445, -4.7750, 2.0315),) * 5
    rule = muon(
        1.0,
        ns_coeffs=steps,
        adam_b1=B1,
        adam_b2=b2,
        eps=EPS,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_linear_maps,
    )
    # optax's turns gradients into steps downhill; `Optimizer.schedule` has the sign and the rate.
    return optax.chain(rule, optax.scale(-1.0))


def _linear_maps(params: Params) -> Params:
    """How the linear maps of a model lie in their arrays; None for every other leaf, the head among them.

    A head's rows are tokens and not directions of a stream: as the table of tokens, it is AdamW's
    (https://kellerjordan.github.io/posts/muon/).
    """

    def map_of(path: tuple, leaf: Array) -> MuonDimensionNumbers | None:
        keys = [_key(entry) for entry in path]
        # The blocks of a stack lie stacked on a leading axis, and each is a map of its own.
        dims = tuple(range("blocks" in keys or "cross" in keys, leaf.ndim))
        if len(dims) < 2 or keys[-1] not in _READS + _WRITES or keys == _HEAD:
            return None
        split = 1 if keys[-1] in _READS else -1
        return MuonDimensionNumbers(dims[:split], dims[split:])

    return jax.tree_util.tree_map_with_path(map_of, params)


def _schedule(name: Schedule, peak: float, warmup: int, steps: int) -> optax.Schedule:
    first = peak / (warmup + 1)  # the first step already moves
    if name == "constant":
        return optax.warmup_constant_schedule(first, peak, warmup)
    return optax.warmup_cosine_decay_schedule(first, peak, warmup, steps)


def _decayed(params: Params) -> Params:
    """True for the leaves that weight decay applies to: neither a norm's scale nor a bias."""

    def decays(path: tuple, _: Array) -> bool:
        return not any(word in _key(path[-1]) for word in ("bias", "scale"))

    return jax.tree_util.tree_map_with_path(decays, params)


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


# Frozen leaves are holes in the tree. `optax.selective_transform` sums their gradients over micro-batches all the same,
# and they count in the norm: a step of antgmm-tiny (batch 8, 2 cores of an AMD EPYC, least of 4, optax 0.2.8, jax
# 0.10.2, 2026-11-28) takes 97 ms with vision frozen, by optax 112; in two micro-batches 114, by optax 182.
def trainable(params: Params, frozen: tuple[str, ...]) -> Params:
    """The parameters that are trained: the same tree with None in the place of every frozen leaf.

    Args:
        params: nested dict of arrays.
        frozen: path prefixes, parts joined by "/".

    Returns:
        The tree; optax and `jax.grad` pass over None.

    Raises:
        AntgmmError: a prefix that matches no parameter, or nothing left to train.
    """
    leaves, treedef = _by_path(params)
    _check_prefixes("frozen", frozen, leaves)
    kept = [None if any(under(path, prefix) for prefix in frozen) else leaf for path, leaf in leaves.items()]
    if all(leaf is None for leaf in kept):
        raise AntgmmError(f"frozen {', '.join(frozen)} leaves nothing to train")
    return jax.tree.unflatten(treedef, kept)


def check_paths(params: Params, frozen: tuple[str, ...], rates: Sequence[str]) -> None:
    """Refuses path prefixes that match no parameter.

    Args:
        params: the parameters, or their description.
        frozen: prefixes of those that are not trained.
        rates: prefixes of those with a rate of their own.

    Raises:
        AntgmmError: names the prefixes and what there is; or `frozen` leaves nothing to train.
    """
    trainable(params, frozen)
    _check_prefixes("rates of", rates, _by_path(params)[0])


def _by_path(tree: Params) -> tuple[dict[str, Array], Any]:
    """Leaves by path, parts joined by "/", in the tree's order; and what puts them together again."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(_key, path)): leaf for path, leaf in flat}, treedef


def under(path: str, prefix: str) -> bool:
    """Whether a path, parts joined by "/", is the prefix or lies under it."""
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")


def _check_prefixes(what: str, prefixes: Sequence[str], paths: Collection[str]) -> None:
    """Refuses a prefix that no path is under."""
    if unmatched := [prefix for prefix in prefixes if not any(under(path, prefix) for path in paths)]:
        tops = sorted({path.split("/")[0] for path in paths})
        raise AntgmmError(f"{what} {', '.join(unmatched)} matches no parameter: top-level names are {', '.join(tops)}")


def combine(trained: Params, params: Params) -> Params:
    """`trained` with what it lacks, None or masked out by optax, taken from `params`."""
    return jax.tree.map(lambda new, old: old if _hole(new) else new, trained, params, is_leaf=_hole)


def init_state(params: Params, optimizer: Optimizer) -> State:
    """A fresh state at step 0.

    The arrays are copied: the step donates its state, and the teacher may hold the same arrays.

    Args:
        params: float32 parameters.
        optimizer: from `make_optimizer`.

    Returns:
        The `State`.
    """
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    opt_state = optimizer.transform.init(trainable(params, optimizer.frozen))
    return State(params, opt_state, jnp.zeros((), jnp.int32))


def map_moments(
    opt_state: optax.OptState, params: Params, optimizer: Optimizer, change: Callable[[Params], Params]
) -> optax.OptState:
    """Applies a tree -> tree function to each parameter-shaped tree of an optimizer state (the moments).

    So a cut of the parameters (`pruning.take`) cuts their moments alike, and the rest (step counts) stays.

    Args:
        opt_state: the optimizer's state.
        params: the parameters it belongs to, of the same shapes.
        optimizer: from `make_optimizer`.
        change: tree of the parameters' structure -> tree of the same structure. Frozen leaves have no moments;
            `change` sees the parameter there and its answer is dropped.

    Returns:
        The new optimizer state.
    """
    # `optax.tree.map_params` goes leaf by leaf, and a cut needs the whole tree: which units stay is said by axis.
    structure = jax.tree.structure(trainable(params, optimizer.frozen))

    def like_params(tree: Any) -> bool:
        return jax.tree.structure(tree, is_leaf=_masked) == structure

    def changed(tree: Any) -> Any:
        if not like_params(tree):
            return tree
        whole = trainable(change(combine(tree, params)), optimizer.frozen)
        # Muon has one tree of moments for the linear maps and others for the rest: what is masked stays so.
        return jax.tree.map(lambda old, new: old if _masked(old) else new, tree, whole, is_leaf=_hole)

    return jax.tree.map(changed, opt_state, is_leaf=like_params)


def lay_out(state: State, axes: Params, optimizer: Optimizer) -> State:
    """A state whose parameters lie where the mesh's rules put them, and their moments beside them.

    Args:
        state: arrays, traced ones among them, or `jax.ShapeDtypeStruct`s.
        axes: names of the parameters' axes, `Functional.axes`.
        optimizer: from `make_optimizer`.

    Returns:
        The state; unchanged without a mesh.
    """
    if not sharding.active():
        return state
    moments = map_moments(state.opt_state, state.params, optimizer, lambda tree: sharding.lay(tree, axes))
    return State(sharding.lay(state.params, axes), moments, state.step)


def _masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _hole(leaf: Any) -> bool:
    return leaf is None or _masked(leaf)
