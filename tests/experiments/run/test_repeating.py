"""Numbers of visits of `repeat = "auto"`: by hand, and only from what is stored."""

import numpy as np
import pytest

from antgmm_jax.io import checkpoint
from experiments.auto.schedule import base
from experiments.run.repeating import visits, with_visits
from experiments.run.schema.recipe import recipe_of
from tests.experiments.auto.test_parts import GOAL

TEACHER = {"price": 0.96, "match": 0.95, "brand": 0.95, "verdict": 0.94}
SCORES = {"price": 0.94, "match": 0.25, "brand": 0.75, "verdict": 0.52}


def test_visits_follow_the_gaps_to_the_teacher():
    # Gaps 0.02, 0.70, 0.20, 0.42 with a mean of 0.335: 0.06, 2.09, 0.6, 1.25.
    assert visits(SCORES, TEACHER) == {"match": 2}
    # One slow type of six: its gap is six times the mean, four visits are the most.
    assert visits({kind: 0.5 if kind == "a" else 0.9 for kind in "abcdef"}, dict.fromkeys("abcdef", 0.9)) == {"a": 4}


def test_small_gaps_and_types_that_are_better_than_the_teacher_change_nothing():
    assert visits({"a": 0.93, "b": 0.9}, {"a": 0.95, "b": 0.9}) == {}
    assert visits({"a": 0.99, "b": 0.9}, {"a": 0.5, "b": 0.9}) == {}
    assert visits({}, {}) == {}
    # The parent of a run may have been scored on rows with other types.
    assert visits({"a": 0.1, "b": 0.9, "c": 0.0}, {"a": 0.9, "b": 0.9, "d": 0.5}) == {"a": 2}


def work(repeat):
    raw = base(GOAL, {**GOAL.data, "samples": 9}, {**GOAL.test, "samples": 9})
    stages = [{"name": name, "recover_steps": 9, "repeat": repeat} for name in ("one", "two")]
    return recipe_of({**raw, "stage": stages}, "plan").work[1]


def stored(place, record):
    checkpoint.save_stage(place, {"a": np.zeros(1)}, record)
    return place


def test_a_stage_gets_numbers_from_the_record_of_the_stage_before(tmp_path):
    before = stored(tmp_path / "one", {"metrics": {"scores": {"by_type": SCORES}}})
    resolved = [with_visits(work("auto"), before, lambda: {"by_type": TEACHER}, [*TEACHER]) for _ in range(2)]
    assert resolved[0] == resolved[1]
    assert resolved[0].stage.visits == {"match": 2}
    assert with_visits(work("auto"), before, lambda: {"by_type": TEACHER}, ["price"]).stage.visits == {}
    assert work("auto").stage.visits == {}
    assert with_visits(work({"a": 3}), before, dict, []).stage.visits == {"a": 3}


@pytest.mark.parametrize("record", [{}, {"metrics": {}}, {"metrics": {"scores": {"by_type": {"": 0.2}}}}])
def test_without_scores_of_several_types_the_teacher_is_not_evaluated(tmp_path, record):
    before = stored(tmp_path / "one", record)
    assert with_visits(work("auto"), before, lambda: pytest.fail("evaluated"), ["a"]).stage.visits == {}
    assert with_visits(work("auto"), None, lambda: pytest.fail("evaluated"), ["a"]).stage.visits == {}
