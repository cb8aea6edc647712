"""What a loop waits for is counted where it waits, and nothing is counted where it does not."""

import pytest

from experiments.lab.bench import stalls
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import save_teacher, write_recipe

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's and transformers' own


def test_a_clock_counts_what_goes_by_inside_of_calls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stalls.time, "perf_counter", lambda: now[0])

    def batches():
        for number in range(3):
            now[0] += 2
            yield number

    clock = stalls._Clock()
    found = clock.over(batches())
    for number in range(3):
        assert next(found) == number
        now[0] += 100  # the step
    assert clock.seconds == 6

    def failing():
        now[0] += 110
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        clock.around(failing)()
    assert clock.seconds == 116
    # A device that was at work until second 420 of a wait from 416 to 426, and one that works on.
    for since, idle in ((420, 6), (float("inf"), 0)):
        now[0] = 416.0
        other = stalls._Clock(lambda since=since: since)
        other.around(lambda: now.__setitem__(0, 426.0))()
        assert other.seconds == idle


@pytest.mark.long
def test_every_loop_is_measured(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.toml", save_teacher(tmp_path / "teacher"))
    found = stalls.run(load_recipe(recipe, ["checkpoint_every=50"]), rounds=3, steps=2)
    assert [*found["sides"]] == [*stalls.SIDES]
    assert found["sides"]["resident"]["ratio"]["median"] == 1
    assert found["sides"]["resident"]["data"]["high"] == 0
    assert all(0 <= found["sides"][side]["data"]["median"] < 1 for side in ("data", "disk", "checkpoints"))
    saved = found["checkpoint"]
    assert saved["every"] == 50
    assert 0 < saved["share"]["median"] < 1 and saved["held_ms"]["median"] > 0
    told = stalls.shown(found)
    assert told[1].row_count == 4 and "one every 50 steps" in told[2]
