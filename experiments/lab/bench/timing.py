"""Timing: several things in turn, so that what else the machine does falls on all alike, or one in a full queue."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Seconds = dict[str, np.ndarray]


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> Seconds:
    """Seconds of each side in each round, the sides one after the other.

    Args:
        sides: name -> what is timed; it returns when its work is done.
        rounds: rounds that are timed.
        warmup: rounds before, which compile.

    Returns:
        name -> seconds [rounds].
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(found) for name, found in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def told(value: Mapping[str, float], form: str, scale: float = 1.0) -> str:
    """A spread as text: "median (low to high)".

    Args:
        value: `median`, `low` and `high`.
        form: format of each number, as in ".2f".
        scale: factor of each.

    Returns:
        The text.
    """
    median, low, high = (f"{value[key] * scale:{form}}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def milliseconds(seconds: Seconds) -> dict[str, Any]:
    """Median and quartiles of each side, in milliseconds, under `<side>_ms`."""
    return {f"{name}_ms": spread(1e3 * values) for name, values in seconds.items()}


def dispatched(work: Callable[[], Any], rounds: int, least: float = 0.2) -> np.ndarray:
    """Seconds of a call, several of them sent to the device one after the other before the host waits for the last.

    So the host's own time for a call is hidden behind the device's, as in a training loop.

    Args:
        work: sends work to the device and returns its results without waiting; the first two calls are not timed.
        rounds: rounds that are timed.
        least: seconds that a round takes at least; decides how many calls it has.

    Returns:
        Seconds a call, [rounds].
    """
    jax.block_until_ready(work())
    begin = time.perf_counter()
    jax.block_until_ready(work())
    calls = max(1, math.ceil(least / (time.perf_counter() - begin)))
    seconds = []
    for _ in range(rounds):
        begin, last = time.perf_counter(), None
        for _ in range(calls):
            last = work()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - begin) / calls)
    return np.array(seconds)
