"""Batches of a plan are split where they do not fit into the memory of a device."""

from types import SimpleNamespace

import pytest

from antgmm_jax.config import LMMConfig
from antgmm_jax.presets import preset
from experiments.auto import room
from experiments.auto.goal import Goal
from experiments.auto.room import trial_tables, with_disk, with_room
from experiments.auto.schedule import Scale, Tuned, base, stages
from experiments.run import cuts
from experiments.run.schema.recipe import recipe_of
from pruning.costs import total_parameters

CONFIG: LMMConfig = preset("llava-290m")
WANTED = {"vision/layers": 8, "text/layers": 7}


class Rows:
    """Long training records."""

    lengths = property(lambda self: {"text": 1024, "answer": 64, "slots": 1})

    def __len__(self):
        return 5000


@pytest.fixture
def tables():
    data = {"kind": "jsonl", "path": "a.jsonl", "samples": 5000}
    return base(Goal("teacher", data, data | {"path": "b.jsonl"}), data, data | {"path": "b.jsonl"})


def planned(tables):
    return {**tables, "stage": stages(CONFIG, WANTED, 5000, Scale(1.0, 1.0), Tuned())}


def test_a_cpu_is_given_whole_batches(tables):
    raw = planned(tables)
    assert with_room(raw, CONFIG, Rows()) == (raw, [])
    assert trial_tables(tables, CONFIG, WANTED, Rows()) == tables


def test_less_memory_gives_more_parts_of_the_same_batch(tables, monkeypatch):
    raw, before = planned(tables), []
    for gigabytes in (1000, 16, 8, 1):
        monkeypatch.setattr(room, "memory_limit", lambda size=gigabytes: size * 10**9)
        roomy, lines = with_room(raw, CONFIG, Rows())
        parsed = recipe_of(roomy, "plan").stages  # a divisor of each batch
        parts = [stage.optimizer.accumulate for stage in parsed]
        assert [s.optimizer.batch_size for s in parsed] == [64, 64, 16]
        split = [line for line in lines if line.startswith("memory: ")]
        assert len(split) == sum(number > 1 for number in parts)
        assert any("split them with --mesh fsdp=N" in line for line in lines) == (gigabytes == 1)
        assert not before or all(now >= then for now, then in zip(parts, before, strict=True))
        trial = trial_tables(tables, CONFIG, WANTED, Rows())["optimizer"].get("accumulate", 1)
        assert trial >= parts[2]  # as large batches, and an image side that is not cut yet
        before = parts
    assert before == [64, 64, 16]
    assert split[1] == (
        "memory: stage language takes its batches of 64 in 64 parts of 1 (accumulate), so that they fit into 1 GB"
    )


def test_memory_for_everything_splits_nothing(tables, monkeypatch):
    raw = planned(tables)
    monkeypatch.setattr(room, "memory_limit", lambda: 10**12)
    assert with_room(raw, CONFIG, Rows()) == (raw, [])
    given = {**raw, "optimizer": {**raw["optimizer"], "accumulate": 2}}
    monkeypatch.setattr(room, "memory_limit", lambda: 10**9)
    assert with_room(given, CONFIG, Rows())[0] == given


def test_frozen_parameters_have_no_gradients_and_moments():
    whole = SimpleNamespace(frozen=(), optimizer=SimpleNamespace(dtype="float32"))
    language = SimpleNamespace(frozen=("vision", "bridge"), optimizer=SimpleNamespace(dtype="bfloat16"))
    count = total_parameters(CONFIG)
    assert room._state_bytes(CONFIG, whole) == 12 * count
    assert 4 * count < room._state_bytes(CONFIG, language) < 16 * count


class Pictured(Rows):
    """Rows with one image each, of which the features are wide."""

    totals = property(lambda self: {"slots": 5000})


def test_features_that_do_not_fit_on_the_disk_are_computed_in_every_step(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(cuts, "feature_bytes", lambda config, samples, shift, dtype: 10**9)
    for free, changed in ((2 * 10**9, {}), (10**9, {"features": "recompute"})):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        roomy, lines = with_disk(tables, CONFIG, WANTED, Pictured(), tmp_path / "none" / "yet")
        assert roomy == {**tables, **changed} and len(lines) == len(changed)
    given = {**tables, "features": "disk"}
    assert with_disk(given, CONFIG, WANTED, Pictured(), tmp_path) == (given, [])
