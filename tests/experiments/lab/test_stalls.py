"""Stalls: clocks count the time in which a training loop waits, and no other time."""

import pytest

from experiments.lab.bench import stalls
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import save_teacher, write_recipe

pytestmark = pytest.mark.filterwarnings("default")  # warnings of PyTorch and transformers


def test_a_clock_counts_the_time_inside_its_calls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stalls.time, "perf_counter", lambda: now[0])

    def batches():
        for number in range(3):
            now[0] += 2
            yield number

    clock = stalls._Clock()
    clocked = clock.over(batches())
    for number in range(3):
        assert next(clocked) == number
        now[0] += 100  # the step
    assert clock.seconds == 6

    def failing():
        now[0] += 110
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        clock.around(failing)()
    assert clock.seconds == 116
    # During a wait from 416 to 426, one device is busy until 420, another one all the time.
    for since, idle in ((420, 6), (float("inf"), 0)):
        now[0] = 416.0
        other = stalls._Clock(lambda since=since: since)
        other.around(lambda: now.__setitem__(0, 426.0))()
        assert other.seconds == idle


@pytest.mark.long
def test_every_loop_is_measured(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.toml", save_teacher(tmp_path / "teacher"))
    figures = stalls.run(load_recipe(recipe, ["checkpoint_every=50"]), rounds=3, steps=2)
    assert [*figures["sides"]] == [*stalls.SIDES]
    assert figures["sides"]["resident"]["ratio"]["median"] == 1
    assert figures["sides"]["resident"]["data"]["high"] == 0
    assert all(0 <= figures["sides"][side]["data"]["median"] < 1 for side in ("data", "disk", "checkpoints"))
    saved = figures["checkpoint"]
    assert saved["every"] == 50
    assert 0 < saved["share"]["median"] < 1 and saved["held_ms"]["median"] > 0
    shown = stalls.shown(figures)
    assert shown[1].row_count == 4 and "one every 50 steps" in shown[2]
