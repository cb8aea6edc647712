"""Energy per year of serving, and the number of requests after which a run has paid off."""

import math

from experiments.run.host.energy import JOULES_A_KWH

SECONDS_A_DAY = 86_400
DAYS_A_YEAR = 365


def kwh_a_year(joules: float, rate: float) -> float:
    """Returns the energy of a year of requests in kWh.

    Args:
        joules: energy per request.
        rate: requests per second, day and night.

    Returns:
        Energy in kWh.
    """
    return joules * rate * SECONDS_A_DAY * DAYS_A_YEAR / JOULES_A_KWH


def payback(kwh: float, joules: float) -> int | None:
    """Returns the number of requests after which their savings equal an energy spent once.

    Args:
        kwh: energy spent.
        joules: energy saved per request.

    Returns:
        Number of requests; None if a request saves nothing.
    """
    return math.ceil(kwh * JOULES_A_KWH / joules) if joules > 0 else None
