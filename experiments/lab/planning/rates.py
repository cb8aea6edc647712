"""Predicted milliseconds of a request: the analytic cost at this machine's rates, which small models are timed for.

A phase (vision, prefill, decode) takes a fixed time, so much for each attention and FFN that it runs one after another,
and over all phases so much for a FLOP and for a byte. These eight rates are fitted, none below 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import abstract
from experiments.report.latency import PHASES, Latency, Request, jax_request, measure
from experiments.run.host.console import bar
from experiments.run.random_batches import random_batch
from pruning.cost import total_parameters

ROUNDS = 200
DEPTHS, NARROW = (5, 1), 4
LARGEST = 20_000_000
"""Calibration models: every stack this deep or this, at full widths and at that part of them, with at most so many
parameters. Time grows evenly with depth, so deep models, which compile long, are not needed."""


class Asked(NamedTuple):
    """A request at batch 1.

    Attributes:
        length: prompt tokens, the image's included.
        answer: answer tokens.
    """

    length: int
    answer: int


class Rates(NamedTuple):
    """What a machine takes, in milliseconds.

    Attributes:
        phase: for each phase once, [3].
        sublayer: for an attention or an FFN of each phase, [3].
        flop: for a FLOP.
        byte: for a byte of parameters and cache, float32.
    """

    phase: np.ndarray
    sublayer: np.ndarray
    flop: float
    byte: float


def predict(rates: Rates, config: LMMConfig, asked: Asked) -> float:
    """Milliseconds of a request.

    Args:
        rates: of the machine.
        config: the model.
        asked: the request.

    Returns:
        Milliseconds of all phases together.
    """
    return float((amounts(config, asked) @ np.concatenate([rates.phase, rates.sublayer, rates[2:]])).sum())


def named(rates: Rates) -> dict[str, Any]:
    """Rates as JSON types: milliseconds of a phase, of a sublayer, of 1e9 FLOPs and of 1e9 bytes."""
    by_phase = {
        name: dict(zip(PHASES, map(float, values), strict=True))
        for name, values in (("phase_ms", rates.phase), ("sublayer_ms", rates.sublayer))
    }
    return {**by_phase, "gflop_ms": 1e9 * rates.flop, "gigabyte_ms": 1e9 * rates.byte}


def amounts(config: LMMConfig, asked: Asked) -> np.ndarray:
    """How much of each rate's unit a request takes.

    Args:
        config: the model.
        asked: the request.

    Returns:
        [phase, rate] of 3 phases and 8 rates, in the order of `Rates`.
    """
    found = pruning.cost(config, 1, asked.length, asked.answer, itemsize=4)
    rows = [[sum(each[phase].values()) for each in (found.sublayers, found.flops, found.bytes)] for phase in PHASES]
    sublayers, flops, read = np.array(rows, float).T
    return np.column_stack([np.eye(3), np.diag(sublayers), flops, read])


def fit(measured: Sequence[tuple[np.ndarray, Latency]]) -> Rates:
    """The rates that explain measurements best, by the squares of relative errors.

    Args:
        measured: `amounts` and latency of models of different depth and width.

    Returns:
        The rates.
    """
    # On a busy machine the median of the whole is above the sum of the phases' medians: the whole counts.
    times = [np.array([getattr(found, phase) for phase in PHASES]) for _, found in measured]
    times = [phases * found.p50 / phases.sum() for phases, (_, found) in zip(times, measured, strict=True)]
    rows = np.concatenate([amount / phases[:, None] for (amount, _), phases in zip(measured, times, strict=True)])
    found = non_negative(rows, np.ones(len(rows)))
    return Rates(found[:3], found[3:6], float(found[6]), float(found[7]))


def non_negative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients.

    Args:
        rows: [n, k], a handful of columns.
        values: [n].

    Returns:
        Coefficients [k].
    """
    # Imported here: every command that predicts would wait for it.
    from scipy.optimize import nnls

    # The scale of a column must not decide what is taken for zero: FLOPs are counted in millions, phases in ones.
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1
    return nnls(rows / scale, values)[0] / scale


def calibrate(config: LMMConfig, asked: Asked) -> Rates:
    """Measures small models of a family on this machine.

    Args:
        config: the model whose students are to be predicted.
        asked: the request.

    Returns:
        The machine's rates.

    Raises:
        AntgmmError: a prompt without room for the image.
    """
    if asked.length <= config.image_tokens:
        raise AntgmmError(
            f"a prompt of {asked.length} tokens has no word beside the image's {config.image_tokens}:"
            f" give --length {config.image_tokens + 32}"
        )
    models = calibration_models(config)
    requests = {}
    with bar("calibration", len(models)) as update:
        for number, model in enumerate(models, 1):
            requests[model] = random_request(model, asked)
            requests[model]()
            update(number, "models compiled")
    times: Mapping[LMMConfig, Latency] = measure(requests, repeats=ROUNDS)
    return fit([(amounts(model, asked), times[model]) for model in models])


def calibration_models(config: LMMConfig) -> list[LMMConfig]:
    """Legal models of two depths by two widths; fewer where a small model has no two.

    Args:
        config: the model that they are parts of.

    Returns:
        Configs.
    """
    found = []
    for depth in DEPTHS:
        part = 1
        while total_parameters(_scaled(config, depth, part)) > LARGEST:
            part *= 2
        found += [_scaled(config, depth, part), _scaled(config, depth, NARROW * part)]
    return list(dict.fromkeys(found))


def _scaled(config: LMMConfig, depth: int, part: int) -> LMMConfig:
    present = sizes(config)
    wanted = {
        axis: min(depth, present[axis]) if axis.endswith("layers") else -(-present[axis] // part)
        for axis in pruning.free_axes(config)
    }
    return pruning.planned_config(config, pruning.legal_above(config, wanted))


def random_request(config: LMMConfig, asked: Asked) -> Request:
    """A request to a model of random parameters: speed does not depend on what they are.

    Args:
        config: the model.
        asked: the request.

    Returns:
        The request; its first call compiles.
    """
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), abstract(config))
    batch = random_batch(config, 1, words=asked.length - config.image_tokens, answer=1)
    prompt = {name: batch[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}
    return jax_request(config, params, {"images": batch["images"], **prompt}, asked.answer)
