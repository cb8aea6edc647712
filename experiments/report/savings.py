"""What the energy of a request comes to over a year of serving, and when what a run used is saved again."""

import math

from experiments.run.host.energy import JOULES_A_KWH

SECONDS_A_DAY = 86_400
DAYS_A_YEAR = 365


def kwh_a_year(joules: float, rate: float) -> float:
    """Energy of a year of requests.

    Args:
        joules: of a request.
        rate: requests a second, day and night.

    Returns:
        kWh.
    """
    return joules * rate * SECONDS_A_DAY * DAYS_A_YEAR / JOULES_A_KWH


def payback(kwh: float, joules: float) -> int | None:
    """After how many requests what was spent once has been saved.

    Args:
        kwh: spent.
        joules: saved by a request.

    Returns:
        Requests; None where a request saves nothing.
    """
    return math.ceil(kwh * JOULES_A_KWH / joules) if joules > 0 else None
