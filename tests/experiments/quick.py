"""Fewer timed requests in whole runs, because no test asserts a time."""

from collections.abc import Callable
from typing import Any

from experiments.lab.planning import rates
from experiments.lab.study import curve
from experiments.report import model_times


def time_few_requests(assign: Callable[[Any, str, int], None]) -> None:
    """Sets the number of timed rounds to 3 (otherwise 30 in a report, 200 in a plan).

    Args:
        assign: `setattr`, or a version of it that is undone later.
    """
    assign(model_times, "LATENCY_REPEATS", 3)
    for module in (rates, curve):
        assign(module, "ROUNDS", 3)
