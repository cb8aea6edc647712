"""Prediction of request latency from the analytic cost, with rates fitted to measurements of small models.

The time of a phase (vision, prefill, decode) is a constant per phase, plus a time per sublayer (attention or MLP) of
the phase, plus a time per FLOP and per byte, equal for all phases. These eight non-negative rates are fitted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.io.stored import Stored
from antgmm_jax.pure import abstract, functional
from data.record import Arrays
from experiments.report.latency import PHASES, Latency, Request, jax_request, measure
from experiments.run.host.console import bar
from experiments.run.rows.random_batches import random_batch, usual_length
from pruning.costs import TOKENS, parameters

ROUNDS = 200
DEPTHS, NARROW = (5, 1), 4
LARGEST = 20_000_000
"""Calibration models have stacks of these `DEPTHS`, full widths or 1/`NARROW` of them, and at most `LARGEST`
parameters beside those of tokens, or the fewest that are legal. Latency is linear in depth, so deep models, which
compile slowly, are not needed."""


class RequestSize(NamedTuple):
    """Size of a request at batch 1.

    Attributes:
        length: prompt tokens, including image tokens.
        answer: answer tokens.
        slots: image slots; None for those of one image of the usual size.
    """

    length: int
    answer: int
    slots: int | None = None


class Rates(NamedTuple):
    """Fitted rates of a machine in milliseconds.

    Attributes:
        phase: constant of each phase, [3].
        sublayer: per attention or MLP of each phase, [3].
        flop: per FLOP.
        byte: per byte that parameters and cache have in float32, whatever the dtype of the measured models.
    """

    phase: np.ndarray
    sublayer: np.ndarray
    flop: float
    byte: float


def predict(rates: Rates, config: LMMConfig, request: RequestSize) -> float:
    """Predicts the latency of a request.

    Args:
        rates: rates of the machine.
        config: model config.
        request: the request.

    Returns:
        Milliseconds of all phases together.
    """
    return float((amounts(config, request) @ np.concatenate([rates.phase, rates.sublayer, rates[2:]])).sum())


def named(rates: Rates) -> dict[str, Any]:
    """Converts rates to JSON types: milliseconds per phase, sublayer, 1e9 FLOPs and 1e9 bytes."""
    by_phase = {
        name: dict(zip(PHASES, map(float, values), strict=True))
        for name, values in (("phase_ms", rates.phase), ("sublayer_ms", rates.sublayer))
    }
    return {**by_phase, "gflop_ms": 1e9 * rates.flop, "gigabyte_ms": 1e9 * rates.byte}


def amounts(config: LMMConfig, request: RequestSize) -> np.ndarray:
    """Returns the coefficients of the rates for a request.

    Args:
        config: model config.
        request: the request.

    Returns:
        Array [3 phases, 8 rates], in the order of `Rates`.
    """
    cost = pruning.cost(config, 1, request.length, request.answer, itemsize=4, slots=request.slots)
    rows = [[sum(each[phase].values()) for each in (cost.sublayers, cost.flops, cost.bytes)] for phase in PHASES]
    sublayers, flops, read = np.array(rows, float).T
    return np.column_stack([np.eye(3), np.diag(sublayers), flops, read])


def fit(measured: Sequence[tuple[np.ndarray, Latency]]) -> Rates:
    """Fits the rates to measurements, minimising the squares of relative errors.

    Args:
        measured: `amounts` and latency of models with different depths and widths.

    Returns:
        The rates.
    """
    # On a busy machine, the median of the request exceeds the sum of the phases' medians: scale these up to it.
    times = [np.array([getattr(latency, phase) for phase in PHASES]) for _, latency in measured]
    times = [phases * latency.p50 / phases.sum() for phases, (_, latency) in zip(times, measured, strict=True)]
    rows = np.concatenate([amount / phases[:, None] for (amount, _), phases in zip(measured, times, strict=True)])
    fitted = non_negative(rows, np.ones(len(rows)))
    return Rates(fitted[:3], fitted[3:6], float(fitted[6]), float(fitted[7]))


def non_negative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Solves least squares with non-negative coefficients.

    Args:
        rows: [n, k], with few columns.
        values: [n].

    Returns:
        Coefficients [k].
    """
    # Imported on use: scipy is slow to import.
    from scipy.optimize import nnls

    # Normalise columns, so that the solver's tolerance suits all: FLOPs are in millions, phases are 1.
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1
    return nnls(rows / scale, values)[0] / scale


def calibrate(config: LMMConfig, request: RequestSize, prompt: Arrays, dtype: str = "float32") -> Rates:
    """Fits the rates of this machine to measurements of small models.

    Args:
        config: config of the model whose students are to be predicted.
        request: the request.
        prompt: `images`, `input_ids` and `attention_mask` of a request of this size.
        dtype: dtype of computation.

    Returns:
        Rates of this machine.
    """
    models = calibration_models(config)
    requests = {}
    with bar("calibration", len(models)) as update:
        for number, model in enumerate(models, 1):
            requests[model] = with_random_parameters(model, prompt, request.answer, dtype)
            requests[model]()
            update(number, "models compiled")
    times: Mapping[LMMConfig, Latency] = measure(requests, repeats=ROUNDS)
    return fit([(amounts(model, request), times[model]) for model in models])


def calibration_models(config: LMMConfig) -> list[LMMConfig]:
    """Returns legal configs of two depths and two widths (fewer for a small model).

    Args:
        config: config of the model to scale down.

    Returns:
        Configs.
    """
    models = []
    for depth in DEPTHS:
        part = 1
        scaled = _scaled(config, depth, part)
        # A table of 150 000 tokens alone is larger: layers of one unit would say nothing of products.
        while _without_tokens(scaled) > LARGEST and (smaller := _scaled(config, depth, 2 * part)) != scaled:
            part, scaled = 2 * part, smaller
        models += [scaled, _scaled(config, depth, NARROW * part)]
    return list(dict.fromkeys(models))


def _without_tokens(config: LMMConfig) -> int:
    return sum(n for part, n in parameters(config).items() if part != TOKENS)


def _scaled(config: LMMConfig, depth: int, part: int) -> LMMConfig:
    present = sizes(config)
    wanted = {
        axis: min(depth, present[axis]) if axis.endswith("layers") else -(-present[axis] // part)
        for axis in pruning.free_axes(config)
    }
    return pruning.planned_config(config, pruning.legal_above(config, wanted))


def random_prompt(config: LMMConfig, length: int) -> Arrays:
    """Returns a prompt of one random image of the usual size and random tokens.

    Args:
        config: model config.
        length: prompt tokens, including image tokens.

    Returns:
        `images`, and `input_ids` and `attention_mask` [1, length].

    Raises:
        AntgmmError: the prompt is too short for the image tokens.
    """
    batch = random_batch(config, 1, words=usual_length(config, length) - config.usual_tokens, answer=1)
    return {"images": batch["images"], **{name: batch[f"prompt/{name}"] for name in ("input_ids", "attention_mask")}}


def with_random_parameters(config: LMMConfig, prompt: Arrays, answer: int, dtype: str = "float32") -> Request:
    """Returns a request to a model with random parameters.

    Args:
        config: model config.
        prompt: `images`, `input_ids` and `attention_mask`.
        answer: answer tokens.
        dtype: dtype of computation.

    Returns:
        The request; its first call compiles.
    """
    rng = np.random.default_rng(0)

    def drawn(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> Stored:
        stacked = names[0].endswith("layers")
        shape = leaf.shape[1:] if stacked else leaf.shape

        def read(layer: int) -> np.ndarray:
            return 0.02 * np.asarray(rng.standard_normal(shape, np.float32))

        return Stored(leaf.shape, np.dtype(np.float32), read, stacked)

    # Drawn on the way to the device: the host does not hold a model of billions of parameters.
    params = jax.tree.map(drawn, abstract(config), functional(config).axes)
    return jax_request(config, params, prompt, answer, dtype)
