"""Messages, progress and figures on the console."""

import json

import pytest

from experiments.commands.output import emit
from experiments.run.host import console
from experiments.run.host.console import bar, clock, count, say, table

NAME = "runs/[red]a:m:b"


def test_names_are_neither_markup_nor_emoji(capsys):
    say(f"found complete in {NAME}")
    with bar(NAME, 1) as update:
        update(1, "done")
    emit({}, False, NAME, table(("folder", "score"), [(NAME, "1")]))
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"found complete in {NAME}", f"{NAME}: 0/1", f"{NAME}: 1/1, done"]
    assert printed.out.count(NAME) == 2


def test_json_output_holds_only_the_figures(capsys):
    emit({"score": 1}, True, NAME)
    assert json.loads(capsys.readouterr().out) == {"score": 1}


class Time:
    """A clock that the test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_ten_seconds_with_the_time_left(capsys, monkeypatch):
    time = Time()
    monkeypatch.setattr(console, "time", time)
    with bar("steps", 100) as update:
        for done, now in ((1, 120), (11, 130), (12, 131), (21, 140), (100, 219)):
            time.now = 100.0 + now
            update(done, f"loss {done}")
    # The first unit took 120 s to compile; the others take a second each.
    assert capsys.readouterr().err.splitlines() == [
        "steps: 0/100",
        "steps: 1/100, 2:00 passed, loss 1",
        "steps: 11/100, 2:10 passed, 1:29 left, loss 11",
        "steps: 21/100, 2:20 passed, 1:19 left, loss 21",
        "steps: 100/100, 3:39 passed, loss 100",
    ]


def test_resumed_work_begins_with_the_units_that_are_done(capsys, monkeypatch):
    time = Time()
    monkeypatch.setattr(console, "time", time)
    with bar("steps", 100, 40) as update:
        for done, now in ((41, 120), (51, 130)):
            time.now = 100.0 + now
            update(done)
    assert capsys.readouterr().err.splitlines() == [
        "steps: 40/100",
        "steps: 41/100, 2:00 passed",
        "steps: 51/100, 2:10 passed, 0:49 left",
    ]


def test_a_log_gets_lines_while_no_unit_finishes(capsys, monkeypatch):
    time, shown = Time(), []
    monkeypatch.setattr(console, "time", time)
    monkeypatch.setattr(console, "say", lambda line: shown.append(line) or seen.set())
    seen = console.threading.Event()
    with bar("compiling", 1):
        seen.clear()
        time.now += 31
        assert seen.wait(10)
    assert shown[:2] == ["compiling: 0/1", "compiling: 0/1, 0:31 passed"]


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_durations(seconds, shown):
    assert clock(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.6, "1 k"),
        (12_345, "12.3 k"),
        (999_500, "1 M"),
        (-999_999_999, "-1 G"),
        (2e15, "2e+03 T"),
    ],
)
def test_numbers_are_rounded_before_their_prefix_is_chosen(number, shown):
    assert count(number) == shown
