"""The warning about a run that is slower than its forecast, by hand."""

import pytest

from experiments.auto.goal import Goal
from experiments.auto.schedule import base
from experiments.run.progress.forecast import COMPILE
from experiments.run.progress.pace import INTERVALS, Pace, slower
from experiments.run.schema.recipe import recipe_of

DATA = {"kind": "jsonl", "path": "a.jsonl", "samples": 9}, {"kind": "jsonl", "path": "b.jsonl", "samples": 9}
STEPS = 1000


@pytest.fixture(scope="module")
def work():
    stage = {"name": "image", "recover_steps": STEPS}
    return recipe_of({**base(Goal("m", *DATA), *DATA), "stage": [stage]}, "plan").work[0]


FORECAST = {"reading": 100.0, "stage 'image'": 2 * COMPILE + 0.2 * STEPS, "report": 90.0}
"""400 s in all, of which a step should take 0.2 s."""


def test_a_run_may_take_a_quarter_longer(work):
    assert slower(work, 0.2, FORECAST) == slower(work, 0.29, FORECAST) == ""
    line = slower(work, 0.5, FORECAST)
    assert line.startswith(
        "stage 'image': a step takes 0.5 s, 2.5 times as long as expected: the run takes about 11:40 instead of 6:40."
    )
    assert "fewer --minutes, or fewer recover_steps, in another --run" in line
    # A minute more is never worth a word.
    assert slower(work, 0.055, {"stage 'image'": 2 * COMPILE + 0.005 * STEPS}) == ""


def test_the_speed_is_the_median_of_the_first_intervals_without_the_first_step(work):
    pace = Pace(work, FORECAST)
    # 30 s of compilation before the first report, and a second program in the third interval.
    times = [30.0, 35.0, 40.0, 60.0, 65.0, 70.0, 75.0]
    said = [pace.at(10 * (place + 1), now) for place, now in enumerate(times)]
    assert [bool(line) for line in said] == [place == INTERVALS for place in range(7)]
    assert "a step takes 0.5 s" in said[INTERVALS]


def test_without_a_forecast_nothing_is_said(work):
    pace = Pace(work, {})
    assert not any(pace.at(10 * step, 100.0 * step) for step in range(1, 9))
