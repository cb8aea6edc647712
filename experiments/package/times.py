"""Times of requests to a package, beside those to others."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.report.latency import Request, timed

ROUNDS = 30
"""Measured rounds of requests."""


def milliseconds(requests: Mapping[str, Request]) -> dict[str, float]:
    """Returns the median milliseconds of requests that are measured in turn.

    Args:
        requests: name -> request.
    """
    seconds = timed(requests, repeats=ROUNDS, warmup=2)
    return {name: 1e3 * float(np.median(rounds.sum(axis=1))) for name, rounds in seconds.items()}


def whole(work: Callable[[], Any]) -> Request:
    """Returns a request of a single phase.

    Args:
        work: answers the request; the answer is ready when it returns.
    """

    def request() -> tuple[float, float, float]:
        begin = time.perf_counter()
        work()
        return 0.0, 0.0, time.perf_counter() - begin

    return request
