"""Batches of a plan are split where they do not fit into the memory of a device."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.presets import preset
from antgmm_jax.pure import abstract
from distill import LossConfig, StepConfig
from distill.adapters import shapes_with_adapters
from experiments.auto import room
from experiments.auto.goal import Goal
from experiments.auto.room import checkpoint_bytes, trial_bytes, trial_tables, with_disk, with_room
from experiments.auto.schedule import Scale, Tuned, base, stages
from experiments.run import cuts
from experiments.run.narrow import held_by, left_by, narrow_of
from experiments.run.schema import Stage, Work
from experiments.run.schema.recipe import recipe_of
from pruning.costs import total_parameters

CONFIG: LMMConfig = preset("llava-290m")
TURNED: LMMConfig = preset("antgmm-tiny")
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


def test_less_memory_gives_more_parts_of_the_same_batch(tables, monkeypatch):
    raw, before = planned(tables), []
    for gigabytes in (1000, 16, 8, 1):
        monkeypatch.setattr(room, "device_memory", lambda size=gigabytes: size * 10**9)
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
    monkeypatch.setattr(room, "device_memory", lambda: 10**12)
    assert with_room(raw, CONFIG, Rows()) == (raw, [])
    assert trial_tables(tables, CONFIG, WANTED, Rows()) == tables
    given = {**raw, "optimizer": {**raw["optimizer"], "accumulate": 2}}
    monkeypatch.setattr(room, "device_memory", lambda: 10**9)
    assert with_room(given, CONFIG, Rows())[0] == given


def test_a_trial_has_the_state_of_a_model_whose_language_model_is_cut(tables):
    cut = pruning.planned_config(CONFIG, {"text/layers": 7})
    encoder = sum(leaf.size for leaf in jax.tree.leaves(abstract(cut)["vision"]))  # the bridge is trained
    count = total_parameters(cut)
    assert trial_bytes(tables, CONFIG, WANTED, 5000) == 4 * count + 12 * (count - encoder)
    exact = {**tables, "optimizer": {**tables["optimizer"], "dtype": "bfloat16"}}
    half = trial_bytes(exact, CONFIG, WANTED, 5000, narrow_of(abstract(CONFIG, jnp.bfloat16)))
    assert half == 4 * count + 12 * (count - encoder) - 2 * encoder


def test_frozen_parameters_have_no_gradients_and_moments():
    exact, count = StepConfig(learning_rate=0.1, batch_size=4), total_parameters(CONFIG)
    whole = Stage(name="whole", recover_steps=1, loss=LossConfig(), optimizer=exact)
    assert room._state_bytes(CONFIG, whole, {}) == 16 * count
    assert room._state_bytes(CONFIG, whole, {}, without="float32") == 12 * count
    half = dataclasses.replace(exact, dtype="bfloat16")
    image = whole.model_copy(update={"frozen": ("language",), "optimizer": half})
    language = sum(leaf.size for leaf in jax.tree.leaves(abstract(CONFIG)["language"]))
    trained = count - language
    assert room._state_bytes(CONFIG, image, {}) == 16 * trained + 4 * language
    for dtype, copied in (("bfloat16", 0), ("float16", 2)):
        held = held_by(Work(1, "", image, "answers", 0), CONFIG, narrow_of(abstract(CONFIG, jnp.dtype(dtype))))
        assert room._state_bytes(CONFIG, image, held) == 16 * trained + 2 * language
        assert room._state_bytes(CONFIG, image, held, without="bfloat16") == 16 * trained + copied * language


def test_adapters_alone_have_gradients_and_moments():
    table = StepConfig(learning_rate=0.1, batch_size=4, dtype="bfloat16")
    about = {"recover_steps": 1, "frozen": ("vision", "bridge"), "adapters": {"language": 2}, "loss": LossConfig()}
    stage, files = Stage(name="a", optimizer=table, **about), narrow_of(abstract(CONFIG, jnp.bfloat16))
    factors = sum(
        leaf.size for leaf in jax.tree.leaves(shapes_with_adapters(abstract(CONFIG), stage.adapters)["adapters"])
    )
    work = Work(1, "", stage, "answers", 0)
    held = held_by(work, CONFIG, files)
    assert room._state_bytes(CONFIG, stage, held) == 2 * total_parameters(CONFIG) + 16 * factors
    merged = {path for path in files if path.startswith("language/decoder/blocks/") and path.split("/")[-1] in MAPS}
    assert files.keys() - left_by(work, CONFIG, files).keys() == merged


MAPS = ("q", "k", "v", "o", "gate", "up", "down")


def test_a_frozen_part_stays_narrow_where_another_width_is_cut_to_components():
    """A bridge that reads the width is changed by it, and float32."""
    table = StepConfig(learning_rate=0.1, batch_size=4, dtype="bfloat16")
    about = {"recover_steps": 1, "loss": LossConfig(), "sizes": {"vision/embed": 0.5}, "optimizer": table}
    files, stages = narrow_of(abstract(TURNED, jnp.bfloat16)), {}
    for frozen in (("language",), ("language", "bridge")):
        stages[frozen] = Stage(
            name="a", importance={"vision/embed": "principal", "*": "magnitude"}, frozen=frozen, **about
        )
    held = [held_by(Work(1, "", stage, "answers", 0), TURNED, files) for stage in stages.values()]
    assert held[0].keys() == {path for path in files if path.startswith("language/")}
    assert {path for path in held[1] if path.startswith("bridge/")} < {p for p in files if p.startswith("bridge/")}


class Pictured(Rows):
    """Rows with one image each, of which the features are wide."""

    totals = property(lambda self: {"slots": 5000})


def test_features_that_do_not_fit_on_the_disk_are_computed_in_every_step(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(cuts, "feature_bytes", lambda config, samples, shift, dtype: 10**9)
    computed = {**tables, "features": "recompute"}
    for free, choices in ((2 * 10**9, [tables, computed]), (10**9, [computed])):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        possible = with_disk(tables, CONFIG, WANTED, Pictured(), tmp_path / "none" / "yet")
        assert [each for each, _ in possible] == choices
        assert all(len(lines) == (each == computed) for each, lines in possible)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: SimpleNamespace(free=2 * 10**9))
    assert [each for each, _ in with_disk(tables, CONFIG, WANTED, Pictured(), tmp_path, 10**9)] == [computed]
    given = {**tables, "features": "disk"}
    assert with_disk(given, CONFIG, WANTED, Pictured(), tmp_path) == [(given, [])]


def test_checkpoints_of_the_steps_of_the_largest_stage_and_of_all_stages_take_disk(tables):
    image = pruning.planned_config(CONFIG, {"vision/layers": 8})
    both = pruning.planned_config(image, {"text/layers": 7})
    sides = {
        model: sum(leaf.size for part in ("vision", "bridge") for leaf in jax.tree.leaves(abstract(model)[part]))
        for model in (image, both)
    }
    # The language model is frozen in the first stage, the image encoder (and not the bridge) in the others; what is
    # frozen and not cut is in no checkpoint of a step.
    encoder = sum(leaf.size for leaf in jax.tree.leaves(abstract(both)["vision"]))
    steps = 12 * sides[image], 12 * (total_parameters(both) - encoder)
    results = 4 * total_parameters(image) + 2 * 4 * total_parameters(both)
    assert checkpoint_bytes(tables, CONFIG, WANTED, 5000, {}) == 3 * max(steps) + results
