"""Whether the steps of a stage are so much slower than the forecast that the run takes far longer."""

from collections.abc import Mapping
from statistics import median

from experiments.run.host.console import clock
from experiments.run.progress.forecast import COMPILE
from experiments.run.schema import Work

INTERVALS = 5
"""Intervals between progress reports that are measured; the first one, with the compilation, is not."""
LATE, LEAST = 0.25, 60.0
"""A run is too slow if it takes longer by this part of its forecast, and by at least this many seconds."""


class Pace:
    """Measures the first steps of a stage.

    Args:
        work: the stage.
        forecast: title of each remaining part of the run -> expected seconds; empty if there is no forecast.
    """

    def __init__(self, work: Work, forecast: Mapping[str, float]):
        self._work, self._forecast = work, forecast
        self._marks: list[tuple[int, float]] = []

    def at(self, step: int, now: float) -> str:
        """Returns a warning if the run will take far longer than expected; "" if not, and after the first steps.

        Args:
            step: number of steps done.
            now: time in seconds.
        """
        if self._work.title not in self._forecast or len(self._marks) > INTERVALS:
            return ""
        self._marks.append((step, now))
        if len(self._marks) <= INTERVALS:
            return ""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return slower(self._work, median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs), self._forecast)


def slower(work: Work, seconds: float, forecast: Mapping[str, float]) -> str:
    """Returns a warning if the steps of a stage are too slow for the forecast of the run; "" if not.

    Args:
        work: the stage.
        seconds: duration of a step.
        forecast: title of each remaining part of the run -> expected seconds.
    """
    total, steps = sum(forecast.values()), work.stage.steps
    late = steps * seconds + 2 * COMPILE - forecast[work.title]
    if late < max(LEAST, LATE * total):
        return ""
    return (
        f"{work.title}: a step takes {seconds:.2g} s, {seconds / (seconds - late / steps):.1f} times as long as"
        f" expected: the run takes about {clock(total + late)} instead of {clock(total)}. If the machine is not just"
        " busy, stop it and plan fewer --minutes, or fewer recover_steps, in another --run"
    )
