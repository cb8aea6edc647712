"""What a report knows about choices that its test records took part in."""

from pathlib import Path

import pytest

from experiments.auto.goal import Goal, marked
from experiments.report.choices import SEARCH, choices
from experiments.run.schema.recipe import recipe_of

PLAN, SIZE, VISITS = ("prompt and optimizer", "the size of the student", "how often training shows each question type")


def recipe(*repeats, parent=""):
    data = {"kind": "jsonl", "path": "rows.jsonl", "samples": 9}
    tables = {
        "teacher": {"path": "teacher"},
        "parent": parent,
        "data": data,
        "evaluate": {"data": {**data, "path": "test.jsonl"}},
        "optimizer": {"learning_rate": 1e-3, "batch_size": 4},
        "loss": {"hard": 1.0},
        "stage": [{"name": f"s{n}", "recover_steps": 1, "repeat": each} for n, each in enumerate(repeats)],
    }
    return recipe_of(tables, "test")


def begin(phrases):
    return [next(one for one in (PLAN, SIZE, VISITS) if phrase.startswith(one)) for phrase in phrases]


@pytest.mark.parametrize(
    ("given", "types", "expected"),
    [
        (recipe({}, "auto"), 2, [VISITS]),
        (recipe({}, "auto"), 1, []),
        (recipe({}, {"price": 4}), 2, []),
        (recipe("auto"), 2, []),  # the teacher has no scores to follow
        (recipe("auto", parent="runs/a/stages/01-b"), 2, [VISITS]),
    ],
)
def test_visits_by_scores_are_a_choice(tmp_path, given, types, expected):
    assert begin(choices(tmp_path / "run", given, types)) == expected


def test_a_plan_beside_the_run_is_a_choice(tmp_path, monkeypatch):
    plan, goal = tmp_path / "run.toml", Goal("teacher", {}, {}, smaller=8.0)
    plan.write_text("seed = 0\n")
    assert choices(tmp_path / "run", recipe({}), 2) == []
    plan.write_text(f"{marked(goal)}\nseed = 0\n")
    assert begin(choices(tmp_path / "run", recipe({}), 2)) == [PLAN]
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert begin(choices(Path("."), recipe({}), 2)) == [PLAN]


def test_a_student_of_a_search_was_chosen(tmp_path):
    (tmp_path / SEARCH).touch()
    assert begin(choices(tmp_path / "2", recipe({}), 2)) == [SIZE]
    assert choices(tmp_path / "other", recipe({}), 2) == []
