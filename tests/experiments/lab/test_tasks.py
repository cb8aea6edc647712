"""Tasks of other people's pictures: answers are read off the pictures or the facts again, and splits share nothing."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
from PIL import Image

from data.readers import read_records
from experiments.lab.tasks import charts, digits, photos, study, tables
from experiments.lab.tasks.study import control_phases, markdown
from experiments.lab.tasks.writing import Drawn, write
from experiments.run.schema import Stage
from experiments.run.schema.recipe import recipe_of

ROWS = 200


def rows(task, split="train"):
    drawn = Drawn(task.record, split, ROWS)
    return [drawn[row] for row in range(ROWS)]


def places(question, names):
    """The names in a question, in its order."""
    return sorted((name for name in names if name in question), key=question.index)


def answer_on_digits(row):
    facts = row.latents
    shown = [facts[name.replace(" ", "_")] for name in places(row.question, digits.PLACES)]
    if row.type == "count":
        digit = int(next(word for word in row.question.split() if word.isdecimal()))
        return str([*facts.values()].count(digit))
    if row.type == "compare":
        return "yes" if shown[0] > shown[1] else "no"
    return str(sum(shown))


def answer_on_charts(row):
    """From the pixels: the highest row of each colour."""
    picture, height = row.images[0].astype(int), {}
    for colour, rgb in charts.COLOURS.items():
        lines = np.flatnonzero((picture == rgb).all(axis=2).any(axis=1))
        height[colour] = (charts.GROUND - 1 - lines.min()) // charts.STEP
    named = places(row.question, charts.COLOURS)
    match row.type:
        case "height":
            return str(height[named[0]])
        case "compare":
            return "yes" if height[named[0]] > height[named[1]] else "no"
        case "above":
            return str(sum(each > height[named[0]] for each in height.values()))
    return max(height, key=lambda colour: height[colour])


def answer_on_photos(row):
    shown = {name: [*photos.PHOTOS][row.latents[name.replace(" ", "_")]] for name in photos.PLACES}
    named = places(row.question, photos.PLACES)
    match row.type:
        case "name":
            return shown[named[0]]
        case "same":
            return "yes" if shown[named[0]] == shown[named[1]] else "no"
        case "count":
            return str([*shown.values()].count(row.question.removesuffix("?").split()[-1]))
    return (*photos.PLACES, "none")[row.latents["turned"]]


def answer_on_tables(row):
    (name,) = places(row.question, tables.MEASURES)
    shown = [row.latents[f"{name.replace(' ', '_')}_{line}"] for line in (1, 2, 3)]
    numbers = [int(word) for word in re.findall(r"\d+", row.question)]
    match row.type:
        case "read":
            return str(shown[numbers[0] - 1])
        case "compare":
            return "yes" if shown[numbers[0] - 1] > shown[numbers[1] - 1] else "no"
        case "count":
            return str(sum(each > numbers[0] for each in shown))
    return str(shown.index(max(shown)) + 1)


@pytest.mark.parametrize(
    ("task", "answer"),
    [(digits, answer_on_digits), (charts, answer_on_charts), (photos, answer_on_photos), (tables, answer_on_tables)],
)
def test_answers_are_right(task, answer):
    drawn = rows(task)
    assert [row.answer for row in drawn] == [answer(row) for row in drawn]
    assert len({row.type for row in drawn}) == 4


def test_a_digit_in_a_picture_is_the_one_of_its_facts():
    """By correlation with the mean images of the ten digits, at every place in the cell."""
    images, labels = digits._digits("test")
    side, high, wide = 27, digits.SIDE // digits.ROWS, digits.SIDE // digits.COLUMNS
    means = np.stack([images[labels == digit].mean(axis=0) for digit in range(10)])
    means = np.stack([np.asarray(Image.fromarray(mean.astype(np.float32)).resize((side, side))) for mean in means])
    right = []
    for row in rows(digits)[:40]:
        grey = -row.images[0].astype(float).mean(axis=2)
        for place, digit in enumerate(row.latents.values()):
            top, left = high * (place // digits.COLUMNS), wide * (place % digits.COLUMNS)
            windows = np.lib.stride_tricks.sliding_window_view(grey[top : top + high, left : left + wide], (side, side))
            like = normed(windows.reshape(-1, side * side)) @ normed(means.reshape(10, -1)).T
            right.append(like.max(axis=0).argmax() == digit)
    assert np.mean(right) > 0.7  # one in ten by chance


@pytest.mark.parametrize(("line", "column"), [(0, 0), (1, 1), (2, 0)])
def test_a_number_of_a_table_is_in_its_cell(line, column):
    """Two tables that differ in one number differ in the pixels of its cell, and nowhere else."""
    one = np.array([[19, 28], [21, 30], [13, 34]])
    other = one.copy()
    other[line, column] = 35
    shown = [tables._picture(np.random.default_rng(3), values).astype(int) for values in (one, other)]
    down, across = np.nonzero((shown[0] != shown[1]).any(axis=2))
    assert down.size > 10
    assert (across // (tables.SIDE // 2) == column).all()
    assert ((down - tables.HEAD) // ((tables.SIDE - tables.HEAD) // tables.LINES) == line).all()


def normed(values):
    centred = values - values.mean(axis=1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("shown", "total"),
    [
        (lambda split: len(digits._digits(split)[1]), 1797),
        (lambda split: sum(map(len, charts._levels(split))), 178 + 569),
        (lambda split: len(tables._flowers(split)), 150),
    ],
    ids=["digits", "charts", "tables"],
)
def test_splits_show_different_things(shown, total):
    """Every fifth digit, wine, tumour and iris is for tests."""
    train, test = shown("train"), shown("test")
    assert train == pytest.approx(4 * test, rel=0.01)
    assert train + test == total


def test_records_are_a_sequence_that_ends():
    """Iteration over a sequence stops at its IndexError: without one it would draw for ever."""
    drawn = Drawn(tables.record, "test", 3)
    assert [row.question for row in drawn] == [drawn[row].question for row in range(3)]
    assert drawn[-1].question == drawn[2].question


def test_rows_are_read_as_a_users_own(tmp_path):
    write(charts.record, tmp_path, {"train": 5, "test": 3}, lambda *_: None)
    before = (tmp_path / "train.jsonl").stat().st_mtime_ns
    write(charts.record, tmp_path, {"train": 5, "test": 3}, lambda *_: None)
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == before
    read, drawn = read_records("jsonl", tmp_path / "train.jsonl"), Drawn(charts.record, "train", 5)
    for row in range(5):
        np.testing.assert_array_equal(read[row].images[0], drawn[row].images[0])
        assert (read[row].question, read[row].answer) == (drawn[row].question, drawn[row].answer)
        assert read[row].latents == drawn[row].latents


def test_the_control_has_the_steps_and_optimizers_of_the_stages(tmp_path):
    recipe = {
        "seed": 0,
        "teacher": {"path": "teacher"},
        "data": {"kind": "jsonl", "path": "rows.jsonl", "samples": 9},
        "evaluate": {"data": {"path": "test.jsonl", "samples": 9}},
        "optimizer": {"kind": "muon", "learning_rate": 3e-3, "warmup": 2, "batch_size": 16},
        "loss": {"hard": 1.0},
        "stage": [
            {"name": "image", "recover_steps": 30, "optimizer": {"learning_rate": 1e-2, "batch_size": 64}},
            {"name": "language", "recover_steps": 20},
            {"name": "settle", "recover_steps": 15},
        ],
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    phases = control_phases(tmp_path)
    assert [(phase["name"], phase["kind"], phase["steps"]) for phase in phases] == [
        ("image", "answers", 30),
        ("language", "answers", 20),
        ("settle", "answers", 15),
    ]
    assert phases[0]["optimizer"]["batch_size"] == 64
    stages: tuple[Stage, ...] = recipe_of(recipe, "test").stages
    assert [phase["optimizer"]["learning_rate"] for phase in phases] == [
        stage.optimizer.learning_rate for stage in stages
    ]


def test_runs_and_figures_name_the_minutes(monkeypatch, tmp_path):
    """A compression of another duration in the same folder is another run."""
    ran, config = [], SimpleNamespace(family="a family")
    monkeypatch.setattr(study, "write", lambda *_: None)
    monkeypatch.setattr(study, "_train", lambda task, rows, run, model, phases: ran.append(run.name))
    monkeypatch.setattr(study, "_antgmm", lambda *words: ran.append(words[-1].rpartition("/")[2]))
    monkeypatch.setattr(study, "open_hf", lambda directory: (config, {}))
    monkeypatch.setattr(study, "sizes", lambda config: {})
    monkeypatch.setattr(study, "total_parameters", lambda config: 7)
    monkeypatch.setattr(study, "load_recipe", lambda path: SimpleNamespace(stages=()))
    monkeypatch.setattr(study, "_chance", lambda rows: 0.25)
    score = {"exact_match": 0.5}
    report = {"scores": score, "teacher": {"scores": score}, "student": {"scores": score}}
    monkeypatch.setattr(study, "_report", lambda run: report)
    for minutes in (10.0, 2.5):
        study.run("charts", tmp_path, tmp_path / "out.json", smaller="8x", minutes=minutes)
        assert json.loads((tmp_path / "out.json").read_text())["charts"]["minutes"] == minutes
    assert ran == ["teacher", "student-8x-10m", "scratch-8x-10m", "teacher", "student-8x-2.5m", "scratch-8x-2.5m"]


def test_the_table_has_a_row_per_task():
    score = {"exact_match": 0.5}
    figures = {
        "charts": {
            "family": "llava",
            "parameters": [3_000_000, 400_000],
            **dict.fromkeys(("teacher", "student", "scratch"), score),
            "chance": 0.25,
        }
    }
    lines = markdown(figures).splitlines()
    assert lines[2] == "| charts | llava | 3 M | 400 k | 0.500 | 0.500 | 0.500 | 0.250 |"
