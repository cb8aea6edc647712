"""The search for the smallest student: order of sizes, time, resuming. Runs are replaced by their scores."""

import json
from types import SimpleNamespace

import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.books import read_book, write_book
from distill import Diverged
from experiments.auto import keeping
from experiments.auto.bisection import Tried, next_ratio, smallest_kept
from experiments.auto.goal import Goal, share
from experiments.auto.keeping import Search
from experiments.auto.plan import Plan
from experiments.auto.schedule import Tuned, base
from experiments.lab.planning.search import NoLegalModel
from experiments.run.folder import RunFolder
from experiments.run.progress.watching import NOTHING
from experiments.run.schema.recipe import load_recipe
from pruning.costs import total_parameters
from tests.pruning.models import CONFIGS

DATA = {"kind": "jsonl", "path": "a.jsonl"}, {"kind": "jsonl", "path": "b.jsonl"}
GOAL = Goal("teacher", *DATA, keep=0.9, minutes=10)
WHOLE = total_parameters(CONFIGS["llava"])
TEACHER = 0.8


def tried(ratio, kept):
    return Tried(ratio, 100, 0.5, 60.0, kept)


@pytest.mark.parametrize(
    ("tries", "largest", "expected"),
    [
        ([], 100, 4),
        ([], 9, 3),
        ([tried(4, True)], 100, 8),
        ([tried(4, True)], 6, 6),
        ([tried(4, True)], 4.5, 0),
        ([tried(4, False)], 100, 2),
        ([tried(4, True), tried(9, False)], 100, 6),
        ([tried(4, True), tried(9, False), tried(6, True)], 100, 54**0.5),
        ([tried(4, True), tried(9, False), tried(6, False), tried(5, False)], 100, 20**0.5),
        ([tried(4, True), tried(4.7, False)], 100, 0),
        ([tried(4, False), tried(1.19, False)], 100, 0),
    ],
)
def test_ratios_double_and_are_then_bisected(tries, largest, expected):
    assert next_ratio(tries, largest) == pytest.approx(expected)


def test_the_smallest_student_that_keeps_the_quality():
    assert smallest_kept([tried(4, True), tried(9, False), tried(6, True), tried(7, False)]) == 3
    assert smallest_kept([tried(4, False)]) == 0


def test_shares_are_below_one():
    assert share("98%") == share("0.98") == 0.98
    for text in ("", "98", "100%", "0", "much", "1"):
        with pytest.raises(AntgmmError, match=f"--keep-quality {text}: write the share of the teacher's score"):
            share(text)


class Fake:
    """Runs by size: a student keeps the quality up to 10 times fewer parameters; a run takes two minutes."""

    def __init__(self, monkeypatch, seconds=120.0, most=10.0, lost=0.5):
        self.parents, self.ran, self._seconds, self._most, self._lost = [], [], seconds, most, lost
        monkeypatch.setattr(keeping, "whole", lambda path: SimpleNamespace(config=CONFIGS["llava"]))
        monkeypatch.setattr(keeping, "measured", lambda goal, place: self._plan(goal))
        monkeypatch.setattr(keeping, "further", self._further)
        monkeypatch.setattr(keeping, "Run", self._run)
        monkeypatch.setattr(Search, "_largest", lambda search: 100.0)

    def _further(self, goal, first, tuned, parent, place):
        assert tuned == Tuned("adamw", 3.0)
        self.parents.append(parent)
        return self._plan(goal, parent)

    def _plan(self, goal, parent=""):
        raw = base(goal, {**goal.data, "samples": 9}, {**goal.test, "samples": 9})
        stage = {"name": f"to-{goal.params}", "recover_steps": 1}
        return Plan({**raw, "parent": parent, "stage": [stage]}, [], goal.params, Tuned("adamw", 3.0))

    def _run(self, recipe, path, *, cache, watch, alike):
        # Every student has the teacher and the rows of the first.
        assert alike == (None if path.name == "1" else path.with_name("1"))
        params = int(recipe.stages[0].name.removeprefix("to-"))
        score = TEACHER if self._most * params >= WHOLE else self._lost

        def scores():
            self.ran.append(round(WHOLE / params, 1))
            return {"exact_match": score, "params": params, "seconds": self._seconds}

        folder = SimpleNamespace(path=path, cache=path / "cache", stage=lambda n, name: path / f"{n}-{name}")
        teacher = lambda: ({"exact_match": TEACHER}, [])  # noqa: E731
        return SimpleNamespace(recipe=recipe, folder=folder, scores=scores, teacher_scored=teacher)


def test_students_start_from_the_smallest_one_that_keeps_the_quality(monkeypatch, tmp_path, capsys):
    fake = Fake(monkeypatch)
    run = tmp_path / "search"
    best = Search(GOAL, run, (), NOTHING).run()
    # Five runs of two minutes would fill the ten minutes, but planning took some of them.
    assert fake.ran == [4, 8, 16, 11.3]
    assert best.folder.path == run / "2"
    size = [json.loads((run / "search.json").read_text())["tries"][number]["params"] for number in (0, 1)]
    assert fake.parents == [str(run / "1" / f"1-to-{size[0]}")] + 2 * [str(run / "2" / f"1-to-{size[1]}")]
    shown = capsys.readouterr().err
    assert "8.0x" in shown and "smallest" in shown and shown.count("lost") == 2
    # Given again, it only continues, with more time.
    assert Search(GOAL, run, (), NOTHING).run().folder.path == run / "2"
    assert len(fake.ran) == 4
    assert Search(GOAL._replace(minutes=60), run, (), NOTHING).run().folder.path == run / "5"
    assert fake.ran[4:] == [9.5]
    with pytest.raises(AntgmmError, match="is the search of other options: choose another --run"):
        Search(GOAL._replace(keep=0.5), run, (), NOTHING)


def scored(best, student=0.5, teacher=0.5):
    """Writes the figures of a student's report."""
    figures = {"teacher": {"exact_match": teacher}, "student": {"exact_match": student}}
    write_book(best.folder.report / "report.json", figures)


def test_a_report_of_another_student_is_not_left_beside_the_export(monkeypatch, tmp_path):
    Fake(monkeypatch)
    search, folder = Search(GOAL, tmp_path / "search", (), NOTHING), tmp_path / "search" / "report"
    first, second = (SimpleNamespace(folder=RunFolder(tmp_path / "search" / name)) for name in "12")
    for best in (first, second):
        for part in (best.folder.export, best.folder.report):
            part.mkdir(parents=True)
        (best.folder.gate).write_text(best.folder.path.name)
    (first.folder.report / "ads").mkdir()
    for name in ("report.md", "report.html", "ads/01.png"):
        (first.folder.report / name).write_text("1")
    scored(first)
    search.publish(first)
    (folder / "mine.md").write_text("mine")
    (folder / "ads" / "mine.png").write_text("mine")
    search.publish(second)  # without a report
    left = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert left == {"mine.md": "mine", "ads/mine.png": "mine", "gate.json": "2"}


def test_exported_files_that_lose_the_quality_are_named(monkeypatch, tmp_path, capsys):
    Fake(monkeypatch)
    search = Search(GOAL, tmp_path / "search", (), NOTHING)
    best = SimpleNamespace(folder=RunFolder(tmp_path / "search" / "1"))
    best.folder.export.mkdir(parents=True)
    for student, lost in ((0.72, False), (0.71, True)):
        scored(best, student, TEACHER)
        search.publish(best)
        shown = capsys.readouterr().err
        assert ("the exported files score" in shown) == lost
        assert ("the exported files score 0.710, less than 0.9 of the teacher's 0.800" in shown) == lost


def test_files_of_others_beside_the_smallest_student_are_kept(monkeypatch, tmp_path):
    Fake(monkeypatch)
    search = Search(GOAL, tmp_path / "search", (), NOTHING)
    best = SimpleNamespace(folder=RunFolder(tmp_path / "search" / "2"))
    for folder in (best.folder.export, best.folder.report):
        folder.mkdir(parents=True, exist_ok=True)
    (best.folder.export / "config.json").write_text("1")
    (best.folder.report / "report.md").write_text("1")
    scored(best)
    search.publish(best)
    (tmp_path / "search" / "report" / "mine.md").write_text("mine")
    (best.folder.report / "report.md").write_text("2")
    search.publish(best)
    assert {path.name: path.read_text() for path in (tmp_path / "search" / "report").iterdir()} == {
        "mine.md": "mine",
        "report.md": "2",
        "report.json": (best.folder.report / "report.json").read_text(),
    }
    (tmp_path / "search" / "export" / "notes.txt").write_text("mine")
    with pytest.raises(AntgmmError, match=r"notes\.txt is no file of an export"):
        search.publish(best)
    assert (tmp_path / "search" / "export" / "config.json").read_text() == "1"
    (tmp_path / "search" / "export" / "notes.txt").unlink()
    search.publish(best)


def test_a_search_that_was_stopped_runs_the_planned_student(monkeypatch, tmp_path):
    fake, run = Fake(monkeypatch), tmp_path / "search"
    (run / "tuning" / "1").mkdir(parents=True)
    assert Search(GOAL, run, (), NOTHING).plan() == run / "1.toml"
    plan = (run / "1.toml").read_text()
    assert fake.ran == [] and sorted(one.name for one in run.iterdir()) == ["1.toml", "search.json"]
    (run / "1.toml").write_text(plan.replace("recover_steps = 1", "recover_steps = 7"))
    assert [stage.recover_steps for stage in Search(GOAL, run, (), NOTHING).run().recipe.stages] == [1]
    assert "recover_steps = 7" in (run / "1.toml").read_text()
    assert fake.ran[0] == 4


def test_if_no_student_keeps_the_quality_one_line_says_what_to_do(monkeypatch, tmp_path):
    fake = Fake(monkeypatch, seconds=400.0, most=1.0)
    with pytest.raises(AntgmmError) as error:
        Search(GOAL, tmp_path / "search", (), NOTHING).run()
    assert fake.ran == [4]
    assert str(error.value) == (
        "no student keeps 0.9 of the teacher's score 0.800: the best of 1 has 0.500 (62.5%) at 4.0x; give more"
        " --minutes than 10 (the same command continues) or more rows, or a lower --keep-quality in another --run"
    )


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_if_no_size_is_left_more_minutes_need_another_run(monkeypatch, tmp_path):
    fake = Fake(monkeypatch, seconds=1.0, most=1.0)
    with pytest.raises(AntgmmError) as error:
        Search(GOAL, tmp_path / "search", (), NOTHING).run()
    assert fake.ran == [4, 2, 1.4, 1.2]
    assert str(error.value).endswith(
        "; in another --run, give more --minutes than 10, more rows or a lower --keep-quality"
    )


def test_if_no_legal_size_is_left_more_minutes_need_another_run(monkeypatch, tmp_path):
    fake = Fake(monkeypatch, seconds=1.0, most=1.0)
    monkeypatch.setattr(keeping, "further", failing(NoLegalModel("the smallest has 5")))
    with pytest.raises(AntgmmError) as error:
        Search(GOAL, tmp_path / "search", (), NOTHING).run()
    assert fake.ran == [4]
    assert "the same command continues" not in str(error.value)


def test_only_a_size_that_is_not_legal_ends_the_search(monkeypatch, tmp_path):
    fake = Fake(monkeypatch)
    for error in (AntgmmError("the disk is full"), NoLegalModel("the smallest has 5")):
        monkeypatch.setattr(keeping, "further", failing(error))
        search = Search(GOAL, tmp_path / type(error).__name__, (), NOTHING)
        if isinstance(error, NoLegalModel):
            assert search.run().folder.path.name == "1"
        else:
            with pytest.raises(AntgmmError, match="the disk is full"):
                search.run()
    assert fake.ran == [4, 4]


def test_a_folder_with_other_files_is_refused(monkeypatch, tmp_path):
    Fake(monkeypatch)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(AntgmmError, match="is not empty and no search: choose another --run"):
        Search(GOAL, tmp_path, (), NOTHING)


def test_changes_of_a_stage_are_for_students_that_have_it(monkeypatch, tmp_path):
    """A student that is cut in the language model alone has no stage of the image side."""
    fake, seen = Fake(monkeypatch), []
    monkeypatch.setattr(
        keeping, "load_recipe", lambda path, changes: seen.append(changes) or load_recipe(path, changes)
    )
    first = f"stage.to-{round(WHOLE / 4)}.recover_steps=3"
    Search(GOAL, tmp_path / "search", (first, "stage.image.recover_steps=3", "seed=4"), NOTHING).run()
    assert len(fake.ran) == 4 and {*map(tuple, seen)} == {(), ("seed=4",), (first, "seed=4")}


def test_a_search_with_other_changes_of_a_stage_is_another_search(monkeypatch, tmp_path):
    fake, run = Fake(monkeypatch), tmp_path / "search"
    Search(GOAL, run, ("stage.language.loss.soft=1",), NOTHING).plan()
    with pytest.raises(AntgmmError, match="is the search of other options"):
        Search(GOAL, run, (), NOTHING)
    Search(GOAL, run, ("stage.language.loss.soft=1",), NOTHING)
    # A search that was begun before these were recorded goes on.
    book = dict(read_book(run / "search.json", ""))
    del book["goal"]["stages"]
    write_book(run / "search.json", book)
    Search(GOAL, run, (), NOTHING)
    assert fake.ran == []


def test_a_student_that_diverges_is_lost_and_the_search_goes_on(monkeypatch, tmp_path, capsys):
    class Diverging(Fake):
        def _run(self, recipe, path, **about):
            run = super()._run(recipe, path, **about)
            return run if path.name == "1" else SimpleNamespace(**{**vars(run), "scores": failing(Diverged("nan"))})

    Diverging(monkeypatch)
    best = Search(GOAL, tmp_path / "search", (), NOTHING).run()
    assert best.folder.path.name == "1"
    tries = json.loads((tmp_path / "search" / "search.json").read_text())["tries"]
    assert [one["kept"] for one in tries] == [True] + (len(tries) - 1) * [False] and len(tries) > 1
    assert "search: nan" in capsys.readouterr().err


def test_a_student_exactly_at_the_share_keeps_the_quality(monkeypatch, tmp_path):
    assert 0.72 < 0.9 * 0.8  # in floating-point numbers
    fake = Fake(monkeypatch, seconds=400.0, most=1.0, lost=0.72)
    assert Search(GOAL, tmp_path / "search", (), NOTHING).run().folder.path.name == "1"
    assert fake.ran == [4]


def test_a_mistake_in_an_edited_plan_is_one_line(monkeypatch, tmp_path):
    Fake(monkeypatch)
    path = Search(GOAL, tmp_path / "search", (), NOTHING).plan()
    text = path.read_text()
    for wrong in (text.replace("name = ", "nam = "), text[: text.index("stage = ")]):
        path.write_text(wrong)
        with pytest.raises(AntgmmError, match="1.toml: .*stage"):
            Search(GOAL, tmp_path / "search", (), NOTHING).run()


def test_rows_that_no_size_can_train_are_said_with_the_option_that_takes_a_number(monkeypatch, tmp_path):
    Fake(monkeypatch)
    monkeypatch.setattr(keeping, "measured", failing(NoLegalModel("the smallest has 5; choose at least that")))
    with pytest.raises(AntgmmError, match="choose at least that, as --params without --keep-quality"):
        Search(GOAL, tmp_path / "search", (), NOTHING).run()


def test_a_folder_that_cannot_be_copied_is_one_line(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "b").touch()
    with pytest.raises(AntgmmError, match=r"a cannot be copied to .*: .*File exists"):
        keeping._copy(tmp_path / "a", tmp_path / "to")
