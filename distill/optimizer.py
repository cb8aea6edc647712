"""AdamW or Muon with clipping and a schedule, over the trainable part of the parameters."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, muon
from pydantic import Field

from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import Params
from distill.schema import settings
from distill.trainable import by_path, key_name, longest_prefix

Schedule = Literal["cosine", "constant"]
B1, EPS = 0.9, 1e-8
"""Adam's decay rate of first moments, and epsilon."""

_SPLIT = {"q": 1, "k": 1, "v": 1, "up": -1, "gate": -1, "o": -1, "down": -1, "out": -1, "patch": -1}
"""Name of a linear map -> number of its input dimensions, -1 for all but the last: a merger reads several patches."""
_CONNECTOR = "kernel"
"""Name of the only map of some bridges, which Muon leaves to Adam, as it does with tables and heads."""
_STACKED = {"blocks", "cross", "deepstack"}
"""Names of modules with a leading axis of maps."""
_HEAD = ["language", "out"]
_STEPS = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's own five iterations, one row each: it then loops over them, where it would write each out for every array,
which takes longer on a CPU, to run and to compile."""


class Optimizer(NamedTuple):
    """A gradient transformation without its learning rate, with a schedule and frozen parameters.

    Attributes:
        transform: gradients -> updates at learning rate 1 (clipping, moments, weight decay).
        schedule: step -> learning rate.
        frozen: path prefixes of parameters that are not trained.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    frozen: tuple[str, ...]


@settings
class OptimizerConfig:
    """AdamW or Muon with clipping and a learning rate schedule over a stage.

    Attributes:
        kind: "adamw", or "muon", which orthogonalizes the updates of linear maps and uses AdamW for the rest: fewer
            steps to the same loss, with slightly slower steps.
        learning_rate: peak learning rate.
        schedule: "cosine" decay to zero, or "constant".
        warmup: steps of linear warm-up.
        weight_decay: weight decay, multiplied by the learning rate; not applied to norms and biases.
        clip: maximum global norm of the gradient; inf disables clipping.
        b2: decay rate of Adam's second moments; lower values adapt faster when the loss jumps.
        rates: path prefix of parameters ("vision", "vision/patch") -> factor of their learning rate; the longest
            matching prefix applies.
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
    """Creates AdamW (arXiv 1711.05101) or Muon, with clipping of the gradient by global norm.

    Muon orthogonalizes the momentum of linear maps (https://kellerjordan.github.io/posts/muon) and scales it to the
    root mean square of AdamW's updates (arXiv 2502.16982), so that learning rates of AdamW can be used. Embeddings,
    norms and biases use AdamW with Nesterov momentum.

    Args:
        config: settings.
        steps: step at which the cosine decay reaches zero; the rate stays zero afterwards. 0 for a stage without
            training, which has no warm-up either.
        frozen: path prefixes ("vision", "language/encoder") of parameters that are not trained. One that matches no
            parameter has no effect; `distill.trainable.check_paths` finds it.

    Returns:
        The `Optimizer`.

    Raises:
        AntgmmError: the warm-up is not shorter than `steps`.
    """
    warmup, steps = (config.warmup, steps) if steps else (0, 1)
    if warmup >= steps:
        raise AntgmmError(f"warmup = {warmup} with steps = {steps}: use fewer warm-up steps than steps")
    moments = optax.scale_by_adam(B1, config.b2, EPS) if config.kind == "adamw" else _muon(config.b2)
    rates = [_rates(config.rates)] if config.rates else []
    transform = _with_decay([_clip(config.clip), moments], config.weight_decay, rates, muon=config.kind == "muon")
    return Optimizer(transform, _schedule(config.schedule, config.learning_rate, warmup, steps), tuple(frozen))


def _clip(most: float) -> optax.GradientTransformation:
    """Clips by global norm with one factor for all gradients."""

    # `optax.clip_by_global_norm` divides each number by the norm. XLA on a CPU does not repeat a division for both
    # moments, so it stored all clipped gradients: 0.7 of 2.35 GB of a step's buffers (215 M parameters, jax 0.10.2).
    def clipped(grads: Params, _: Any) -> Params:
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(clipped)


def _with_decay(
    before: Sequence[optax.GradientTransformation],
    rate: float,
    after: Sequence[optax.GradientTransformation],
    *,
    muon: bool,
) -> optax.GradientTransformation:
    """Chains transformations, and adds decayed weights (arXiv 1711.05101) of what a loss trains in between.

    Decay alone would shrink parameters that the loss does not depend on: a language model, if the bridge's output is
    compared, or the image side on rows without images. Muon would move them: momentum that is left from other batches
    is orthogonalized to an update of full size, however small it is. The moments go on.
    """
    # Their gradients are zeros. To look at the updates instead, XLA on a CPU stores them all, and takes 2.5 times as
    # long for the update of 50 M parameters.
    first, last = optax.chain(*before), optax.chain(optax.identity(), *after)  # a chain needs one

    def init(params: Params) -> tuple[Any, ...]:
        moments: Any = first.init(params)
        rest: Any = last.init(params)
        return (*moments, *rest)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, tuple[Any, ...]]:
        def decayed(update: Array, grad: Array, param: Array, decays: bool, maps: bool) -> Array:
            # The same sums as of the clip, which XLA computes once.
            trained = optax.tree.norm(grad, squared=True) > 0
            update = jnp.where(trained, update, 0.0) if maps else update
            return update + jnp.where(trained, rate, 0.0).astype(param.dtype) * param if decays else update

        grads = updates
        moments: Any = state[: len(before)]
        rest: Any = state[len(before) :]
        updates, moments = first.update(grads, moments, params)
        by_muon = _mapped(params) if muon else jax.tree.map(lambda _: False, params)
        updates = jax.tree.map(decayed, updates, grads, params, _decayed(params), by_muon)
        updates, rest = last.update(updates, rest, params)
        return updates, moments + rest

    return optax.GradientTransformation(init, update)


def _rates(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Scales updates by the factor of their longest matching prefix.

    One that matches no parameter has no effect: a cut may have removed the parameters.
    """

    def prefixes(params: Params) -> Params:
        leaves, treedef = by_path(params)
        return jax.tree.unflatten(treedef, [longest_prefix(path, rates) for path in leaves])

    scales = {prefix: optax.scale(factor) for prefix, factor in rates.items()}
    return optax.partition({**scales, "": optax.identity()}, prefixes)


def _muon(b2: float) -> optax.GradientTransformation:
    rule = muon(
        1.0,
        ns_coeffs=_STEPS,
        adam_b1=B1,
        adam_b2=b2,
        eps=EPS,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=linear_maps,
    )
    # optax's Muon returns updates to add; here, the step multiplies by minus the learning rate.
    return optax.chain(rule, optax.scale(-1.0))


def linear_maps(params: Params, *, connector: bool = False) -> Params:
    """Returns the input and output dimensions of linear maps, which Muon and adapters train; None for other leaves.

    Args:
        params: model parameters. The output head is no such map, as the embedding table is none
            (https://kellerjordan.github.io/posts/muon/).
        connector: whether the only map of a bridge is one.

    Returns:
        The tree of dimensions.
    """
    known = _SPLIT | ({_CONNECTOR: -1} if connector else {})

    def map_of(path: tuple, leaf: Array | jax.ShapeDtypeStruct) -> MuonDimensionNumbers | None:
        keys = [key_name(entry) for entry in path]
        dims, split = tuple(range(not _STACKED.isdisjoint(keys), leaf.ndim)), known.get(keys[-1])
        if len(dims) < 2 or split is None or keys == _HEAD:
            return None
        return MuonDimensionNumbers(dims[:split], dims[split:])

    return jax.tree_util.tree_map_with_path(map_of, params)


def _mapped(params: Params) -> Params:
    """Returns True for linear maps."""
    treedef = jax.tree.structure(params)
    return treedef.unflatten([map_ is not None for map_ in treedef.flatten_up_to(linear_maps(params))])


def muon_flops(params: Params) -> int:
    """Returns the FLOPs with which Muon orthogonalizes the updates of a step.

    Each of five iterations multiplies a map of m x n numbers, m <= n, by its transpose, squares the result, and
    multiplies the map by it: 4 m^2 n + 2 m^3.

    Args:
        params: trained parameters or their shapes; None for frozen ones.
    """
    leaves, treedef = jax.tree.flatten(params)
    total = 0
    for leaf, map_ in zip(leaves, treedef.flatten_up_to(linear_maps(params)), strict=True):
        if map_ is not None:
            ends = (math.prod(leaf.shape[axis] for axis in axes) for axes in map_)
            small, large = sorted(ends)
            total += leaf.size // (small * large) * (4 * small**2 * large + 2 * small**3)
    return len(_STEPS) * total


def _schedule(name: Schedule, peak: float, warmup: int, steps: int) -> optax.Schedule:
    first = peak / (warmup + 1)  # not 0, so that the first step has an effect
    if name == "constant":
        return optax.warmup_constant_schedule(first, peak, warmup)
    return optax.warmup_cosine_decay_schedule(first, peak, warmup, steps)


def _decayed(params: Params) -> Params:
    """Returns True for leaves with weight decay: all but scales of norms and biases."""

    def decays(path: tuple, _: Array) -> bool:
        return not any(word in key_name(path[-1]) for word in ("bias", "scale"))

    return jax.tree_util.tree_map_with_path(decays, params)
