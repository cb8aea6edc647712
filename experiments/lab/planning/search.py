"""Legal sizes for a budget: by parameters from the config alone, by latency with a check on this machine."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from experiments.lab.planning.rates import ROUNDS, Asked, calibrate, named, predict, random_request
from experiments.report.latency import measure
from experiments.run.host.console import say
from experiments.run.host.facts import machine
from pruning.costs import total_parameters
from pruning.sizing import Sized

TRIES = 6
NEAR = 0.9
"""A measured latency from this part of the budget up is good enough to stop at."""


class Tried(NamedTuple):
    """A student whose latency was measured, in milliseconds."""

    sized: Sized
    measured: float


Search = Callable[..., Sized]
"""`pruning.search` with all but the price and the budget given."""


def by_parameters(config: LMMConfig, budget: int, search: Search) -> Sized:
    """The sizes for a number of parameters.

    Args:
        config: the model that is cut.
        budget: the most that the student may have.
        search: of the model.

    Returns:
        The sizes.

    Raises:
        AntgmmError: no legal model is so small; or the model itself is.
    """
    found = search(total_parameters, budget)
    if found.price > budget:
        raise AntgmmError(f"no legal model has at most {budget:,} parameters: the smallest has {found.price:,}")
    _refuse_whole(config, found, f"{found.price:,} parameters, {budget:,} are asked for")
    return found


def by_latency(
    config: LMMConfig,
    budget: float,
    search: Search,
    price: Callable[[LMMConfig], float],
    timed: Callable[[LMMConfig], float],
) -> tuple[Tried, list[Tried]]:
    """The sizes for a latency, corrected until what is measured is within the budget and near it.

    Args:
        config: the model that is cut.
        budget: milliseconds of a request.
        search: of the model.
        price: predicted milliseconds.
        timed: measured milliseconds.

    Returns:
        The largest of the students measured within the budget, and all that were measured, in order.

    Raises:
        AntgmmError: none measured is within the budget, naming the fastest; or the model itself is.
    """
    tried: dict[LMMConfig, Tried] = {}
    target, low, high = budget, 0.0, float("inf")
    for _ in range(TRIES):
        found = search(price, target)
        if found.config in tried:
            break
        measured = timed(found.config)
        say(f"search: predicted {found.price:.2f} ms, measured {measured:.2f} ms")
        tried[found.config] = Tried(found, measured)
        if NEAR * budget <= measured <= budget:
            break
        low, high = (found.price, high) if measured <= budget else (low, found.price)
        # The machine is so much slower or faster than predicted; aimed at the middle of what is near enough.
        target = found.price * budget / measured * (1 + NEAR) / 2
        if not low < target < high:
            target = (low + high) / 2
    within = [each for each in tried.values() if each.measured <= budget]
    if not within:
        fastest = min(tried.values(), key=lambda each: each.measured)
        whose = machine()
        shape = ", ".join(f"{axis} {n}" for axis, n in fastest.sized.sizes.items())
        raise AntgmmError(
            f"no legal model was found that answers within {budget:g} ms: the fastest of {len(tried)} measured takes"
            f" {fastest.measured:.2f} ms, at load {whose['load']} on {whose['cores']} cores ({shape})"
        )
    best = max(within, key=lambda each: each.sized.price)
    _refuse_whole(config, best.sized, f"{best.measured:.2f} ms, {budget:g} ms are asked for")
    return best, [*tried.values()]


def _refuse_whole(config: LMMConfig, found: Sized, why: str) -> None:
    if sizes(found.config) == sizes(config):
        raise AntgmmError(f"nothing is to be cut: the model is within the budget as it is ({why})")


def run(
    config: LMMConfig,
    *,
    parameters: int | None,
    latency: float | None,
    pins: Mapping[str, int | float],
    weights: Mapping[str, float],
    asked: Asked,
) -> dict[str, Any]:
    """Searches and gathers what is told.

    Args:
        config: the model that is cut.
        parameters: budget of parameters, or None.
        latency: budget in milliseconds, or None; one of the two is given.
        pins: sizes that are not searched.
        weights: tower -> factor on its weights.
        asked: the request that FLOPs and latency are of.

    Returns:
        Figures as JSON types.

    Raises:
        AntgmmError: as in `by_parameters` and `by_latency`.
    """
    search = partial(pruning.search, config, pins=pins, weights=weights)
    figures: dict[str, Any] = {"family": config.family, "request": asked._asdict()}
    if latency is None:
        assert parameters is not None
        found, teacher, student = by_parameters(config, parameters, search), {}, {}
        figures["budget"] = {"params": parameters}
    else:
        search(total_parameters, float("inf"))  # a bad pin or weight is refused before anything is compiled
        rates = calibrate(config, asked)
        price = lru_cache(maxsize=None)(partial(predict, rates, asked=asked))
        best, tried = by_latency(config, latency, search, price, partial(time_request, asked=asked))
        found, teacher = best.sized, {"predicted_ms": price(config)}
        student = {"predicted_ms": found.price, "measured_ms": best.measured}
        figures |= {"budget": {"latency_ms": latency}, "machine": machine(), "rates": named(rates)}
        figures["tried"] = [{"predicted_ms": each.sized.price, "measured_ms": each.measured} for each in tried]
    figures["teacher"] = {**_model(config, asked), **teacher}
    figures["student"] = {**_model(found.config, asked), **student}
    return {**figures, "stages": pruning.by_stage(config, found.sizes)}


def time_request(config: LMMConfig, *, asked: Asked) -> float:
    """Milliseconds of a request to a model of random parameters, median.

    Args:
        config: the model.
        asked: the request.

    Returns:
        Milliseconds.
    """
    return measure({0: random_request(config, asked)}, repeats=ROUNDS)[0].p50


def _model(config: LMMConfig, asked: Asked) -> dict[str, Any]:
    found = pruning.cost(config, 1, asked.length, asked.answer)
    return {
        "sizes": sizes(config),
        "params": sum(found.parameters.values()),
        "parameters": found.parameters,
        "flops": sum(sum(towers.values()) for towers in found.flops.values()),
    }
