"""Timing of several functions in alternation, or of one function with a full device queue."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Seconds = dict[str, np.ndarray]


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> Seconds:
    """Measures several functions, alternating between them so that other load affects all equally.

    Args:
        sides: name -> function; it must wait until its work is done.
        rounds: measured rounds.
        warmup: earlier rounds, which compile.

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
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns median and quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def format_spread(value: Mapping[str, float], form: str, scale: float = 1.0) -> str:
    """Formats a spread as "median (low to high)".

    Args:
        value: `median`, `low` and `high`.
        form: format of the numbers, such as ".2f".
        scale: factor of the numbers.

    Returns:
        The text.
    """
    median, low, high = (f"{value[key] * scale:{form}}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def milliseconds(seconds: Seconds) -> dict[str, Any]:
    """Returns median and quartiles of each side in milliseconds, as `<side>_ms`."""
    return {f"{name}_ms": spread(1e3 * values) for name, values in seconds.items()}


def dispatched(work: Callable[[], Any], rounds: int, least: float = 0.2) -> np.ndarray:
    """Measures the time per call when several calls are dispatched before the host waits for the last one.

    This hides the host's time per call behind the device's, as in a training loop.

    Args:
        work: dispatches work and returns its results without waiting; the first two calls are not measured.
        rounds: measured rounds.
        least: minimum seconds per round, which determine the number of calls.

    Returns:
        Seconds per call, [rounds].
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
