"""What a cut goes by: every axis scored by its own method, on calibration batches."""

from collections.abc import Mapping

import jax
import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, towers
from antgmm_jax.parallel.sharding import rows
from antgmm_jax.pure import Params, functional, local_axes
from distill import LossConfig, make_loss
from experiments.run.samples import Samples


def importance(
    config: LMMConfig,
    params: Params,
    methods: Mapping[str, str],
    targets: Mapping[str, int],
    samples: Samples,
    *,
    batch_size: int,
    batches: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What each axis is cut by, each by its own method.

    Args:
        config: the model.
        params: its parameters.
        methods: axis -> taylor, magnitude, activation, block_influence, random, last or principal.
        targets: axis -> size that it is cut to.
        samples: calibration records.
        batch_size: rows a calibration batch.
        batches: calibration batches to average over.
        seed: of the batches and of random scores.

    Returns:
        axis -> float32 scores, absent where its method cannot score it, and axis -> basis of those that are cut to
        principal components, whose channels score alike.
    """
    pure, local, used = functional(config), local_axes(config), set(methods.values())
    calibration: list[dict[str, jax.Array]] = []
    if used - {"magnitude", "random", "last"}:
        calibration = calibration_batches(samples, batch_size=batch_size, batches=batches, seed=seed)
    scores: dict[str, dict[str, np.ndarray]] = {}
    if "taylor" in used:
        loss = make_loss(pure, LossConfig(hard=1.0))
        # No gradient of gates that nothing reads: where a language model is cut, none goes back through the image side.
        gates = {axis: gate for axis, gate in pruning.ones(config).items() if methods.get(axis) == "taylor"}
        scores["taylor"] = pruning.taylor(lambda p, g, b: loss(p, g, b, {})[0], params, gates, calibration)
    if "magnitude" in used:
        scores["magnitude"] = pruning.magnitude(params, config)
    if "activation" in used:
        axes = [axis for axis in methods if not axis.endswith("/layers")]
        scores["activation"] = pruning.activation(pure.apply, params, calibration, axes, local)
    if "block_influence" in used:
        deep = [tower for tower in towers(config).values() if tower.axis("layers") in methods]
        scores["block_influence"] = pruning.block_influence(pure.apply, params, calibration, deep)
    if "random" in used:
        scores["random"] = pruning.random(jax.random.key(seed), sizes(config), local)
    if "last" in used:
        scores["last"] = pruning.last(sizes(config))
    bases: dict[str, np.ndarray] = {}
    if "principal" in used:
        present = sizes(config)
        widths = {a: targets[a] for a, method in methods.items() if method == "principal" and targets[a] < present[a]}
        bases = pruning.principal(pure.apply, params, config, calibration, widths)
        scores["principal"] = {axis: np.ones(len(basis), np.float32) for axis, basis in bases.items()}
    found = {axis: scores[method][axis] for axis, method in methods.items() if axis in scores[method]}
    return found, bases


def calibration_batches(samples: Samples, *, batch_size: int, batches: int, seed: int) -> list[dict[str, jax.Array]]:
    """Batches on the devices, one sample a row, for what is measured before anything is trained.

    Args:
        samples: the records.
        batch_size: rows a batch.
        batches: how many.
        seed: of their order.

    Returns:
        The batches, without `index`.
    """
    source = samples.shuffled(min(batch_size, len(samples)), seed + 500, full=True)
    found = (next(source) for _ in range(batches))
    return [rows({name: value for name, value in batch.items() if name != "index"}) for batch in found]
