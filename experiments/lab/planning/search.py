"""Search for legal sizes within a budget of parameters, or of latency measured on this machine."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from data.record import Arrays
from experiments.lab.planning.rates import (
    ROUNDS,
    RequestSize,
    calibrate,
    named,
    predict,
    random_prompt,
    with_random_parameters,
)
from experiments.report.latency import measure
from experiments.run.batch_size import compute_dtype
from experiments.run.host.console import say
from experiments.run.host.facts import machine
from experiments.run.schema.recipe import change
from experiments.run.schema.tables import Export
from pruning.costs import TOKENS, parameters, total_parameters
from pruning.sizing import Sized

TRIES = 6
NEAR = 0.9
"""The search stops at a latency between this fraction of the budget and the budget."""


class NoLegalModel(AntgmmError):
    """No legal model is within the budget, or the model itself is."""


MANY = 0.5
"""Share of the tokens' parameters from which a smaller vocabulary is recommended."""


class Tried(NamedTuple):
    """A student and its measured latency in milliseconds."""

    sized: Sized
    measured: float


Search = Callable[..., Sized]
"""`pruning.search` as a function of price and budget."""


def by_parameters(config: LMMConfig, budget: int, search: Search) -> Sized:
    """Searches the sizes for a number of parameters.

    Args:
        config: model config.
        budget: maximum number of parameters.
        search: search function of the model.

    Returns:
        The sizes.

    Raises:
        AntgmmError: no legal model is within the budget, or the model itself is.
    """
    result = search(total_parameters, budget)
    if result.price > budget:
        times, tokens = total_parameters(config) / result.price, parameters(result.config)[TOKENS] / result.price
        cut = f" ({tokens:.0%} are of tokens: antgmm vocabulary removes those that your rows never use)"
        raise NoLegalModel(
            f"no legal model has at most {budget:,} parameters: the smallest has {result.price:,}, {times:.1f} times"
            f" fewer than the model{cut if tokens > MANY else ''}; choose at least that"
        )
    _check_smaller(config, result, f"{result.price:,} parameters, the budget is {budget:,}")
    return result


def by_latency(
    config: LMMConfig,
    budget: float,
    search: Search,
    price: Callable[[LMMConfig], float],
    timed: Callable[[LMMConfig], float],
) -> tuple[Tried, list[Tried]]:
    """Searches the sizes for a latency, by repeated prediction and measurement.

    Args:
        config: model config.
        budget: milliseconds of a request.
        search: search function of the model.
        price: config -> predicted milliseconds.
        timed: config -> measured milliseconds.

    Returns:
        The largest student measured within the budget, and all measured students in order.

    Raises:
        AntgmmError: no measured student is within the budget, or the model itself is.
    """
    tried: dict[LMMConfig, Tried] = {}
    target, low, high = budget, 0.0, float("inf")
    for _ in range(TRIES):
        result = search(price, target)
        if result.config in tried:
            break
        measured = timed(result.config)
        say(f"search: predicted {result.price:.2f} ms, measured {measured:.2f} ms")
        tried[result.config] = Tried(result, measured)
        if NEAR * budget <= measured <= budget:
            break
        low, high = (result.price, high) if measured <= budget else (low, result.price)
        # Correct the target by the error of the prediction, and aim at the middle of the accepted range.
        target = result.price * budget / measured * (1 + NEAR) / 2
        if not low < target < high:
            target = (low + high) / 2
    within = [each for each in tried.values() if each.measured <= budget]
    if not within:
        fastest = min(tried.values(), key=lambda each: each.measured)
        host = machine()
        shape = ", ".join(f"{axis} {n}" for axis, n in fastest.sized.sizes.items())
        raise NoLegalModel(
            f"no legal model answers within {budget:g} ms: the fastest of {len(tried)} measured takes"
            f" {fastest.measured:.2f} ms, at load {host['load']} on {host['cores']} cores ({shape});"
            " choose at least that, or shorter prompts and smaller pictures"
        )
    best = max(within, key=lambda each: each.sized.price)
    _check_smaller(config, best.sized, f"{best.measured:.2f} ms, the budget is {budget:g} ms")
    return best, [*tried.values()]


def _check_smaller(config: LMMConfig, result: Sized, why: str) -> None:
    if sizes(result.config) == sizes(config):
        raise NoLegalModel(f"no pruning is necessary: the model is within the budget ({why}); choose a smaller one")


def run(
    config: LMMConfig,
    *,
    parameters: int | None,
    latency: float | None,
    pins: Mapping[str, int | float],
    weights: Mapping[str, float],
    request: RequestSize,
) -> dict[str, Any]:
    """Searches sizes and returns them with their costs.

    Args:
        config: model config.
        parameters: maximum number of parameters, or None.
        latency: maximum latency in milliseconds, or None; exactly one of the two must be given.
        pins: fixed sizes.
        weights: tower -> factor on the weights of its axes.
        request: request for FLOPs and latency.

    Returns:
        Figures as JSON types.

    Raises:
        AntgmmError: as in `by_parameters` and `by_latency`.
    """
    search = partial(pruning.search, config, pins=pins, weights=weights)
    figures: dict[str, Any] = {"family": config.family, "request": request._asdict()}
    if latency is None:
        assert parameters is not None
        result, teacher, student = by_parameters(config, parameters, search), {}, {}
        figures["budget"] = {"params": parameters}
    else:
        search(total_parameters, float("inf"))  # checks pins and weights before anything is compiled
        prompt, dtype = random_prompt(config, request.length), export_dtype()
        rates = calibrate(config, request, prompt, dtype)
        price = lru_cache(maxsize=None)(partial(predict, rates, request=request))
        timed = partial(time_request, prompt=prompt, answer=request.answer, dtype=dtype)
        best, tried = by_latency(config, latency, search, price, timed)
        result, teacher = best.sized, {"predicted_ms": price(config)}
        student = {"predicted_ms": result.price, "measured_ms": best.measured}
        figures |= {"budget": {"latency_ms": latency}, "machine": machine(), "dtype": dtype, "rates": named(rates)}
        figures["tried"] = [{"predicted_ms": each.sized.price, "measured_ms": each.measured} for each in tried]
    figures["teacher"] = {**_model(config, request), **teacher}
    figures["student"] = {**_model(result.config, request), **student}
    return {**figures, "stages": pruning.by_stage(config, result.sizes)}


def export_dtype(changes: Sequence[str] = ()) -> str:
    """Returns the dtype in which a report times the models of a recipe.

    Args:
        changes: `key=value` changes of a recipe that has no other setting of its export.
    """
    tables: dict[str, Any] = {}
    for each in changes:
        change(tables, each)
    return compute_dtype(tables.get("export", {}).get("dtype", Export().dtype))


def time_request(config: LMMConfig, *, prompt: Arrays, answer: int, dtype: str = "float32") -> float:
    """Measures the latency of a request to a model with random parameters.

    Args:
        config: model config.
        prompt: `images`, `input_ids` and `attention_mask` of the request.
        answer: answer tokens.
        dtype: dtype of computation.

    Returns:
        Median in milliseconds.
    """
    return measure({0: with_random_parameters(config, prompt, answer, dtype)}, repeats=ROUNDS)[0].p50


def _model(config: LMMConfig, request: RequestSize) -> dict[str, Any]:
    cost = pruning.cost(config, 1, request.length, request.answer)
    return {
        "sizes": sizes(config),
        "params": sum(cost.parameters.values()),
        "parameters": cost.parameters,
        "flops": sum(sum(towers.values()) for towers in cost.flops.values()),
    }
