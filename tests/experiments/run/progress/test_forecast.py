"""The forecast of a run: its parts in order, their FLOPs and estimated durations."""

from pathlib import Path

import pytest

import pruning
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import preset
from data.encoding import Encoder
from data.maad import source
from data.store import open_encoded
from experiments.run.progress import forecast
from experiments.run.progress.flops import pass_flops, stage_flops, step_flops, training_flops, update_flops
from experiments.run.progress.forecast import Part, Rows, announce, look_at, parts, seconds
from experiments.run.schema.recipe import load_recipe, load_training
from experiments.run.training import shape_of

EXPERIMENTS = Path(__file__).resolve().parents[4] / "experiments"
TEACHER = EXPERIMENTS / "teachers" / "maad-m"
ROWS = Rows(trained=16000, scored=3000, hard=1000, prompt=50, answer=6, slots=1.0, read=1e-3, unread=16000)


@pytest.fixture(scope="module")
def config():
    return open_hf(TEACHER)[0]


def flops_of(config, recipe):
    return [*stage_flops(config, recipe, length=50, answer=6)]


def demo(*changes):
    return load_recipe(EXPERIMENTS / "recipes" / "demo.toml", [f"teacher.path={TEACHER}", *changes])


def test_the_parts_of_the_demo(config):
    recipe = demo("loss.soft=1", "loss.hard=1")
    by_title = {part.title: part for part in parts(recipe, config, ROWS)}
    assert [*by_title] == [
        "reading",
        "teacher cache",
        "image tokens for stage 'image'",
        "stage 'image'",
        "scores after stage 'image'",
        "image features",
        "stage 'language'",
        "scores after stage 'language'",
        "stage 'settle'",
        "scores after stage 'settle'",
        "report",
    ]
    trained = sum(part.flops for title, part in by_title.items() if title.startswith(("stage", "image features")))
    updates = [stage.work.stage.steps * update_flops(stage.after, stage.work) for stage in flops_of(config, recipe)]
    assert trained == training_flops(config, recipe, length=50, answer=6) + sum(updates)
    # The language model learns at the same size in both of its stages; the image side has fewer maps.
    assert updates[1] == updates[2] > 0 and updates[0] > 0
    forward = pruning.forward_flops(config, 1, 50, 6)
    image = forward["vision"] + forward["bridge"]
    labels = demo(*(f"stage.{stage}.loss.{term}" for stage in ("language", "settle") for term in ("soft=0", "hard=1")))
    [cache] = (part for part in parts(labels, config, ROWS) if part.title == "teacher cache")
    # Without a loss on logits the teacher's language model does not run.
    assert cache.flops == 16000 * image


def test_the_sensitivity_of_image_tokens_passes_the_teacher_forwards_and_its_language_model_backwards(config):
    change = "stage.image.loss={hard=0.0,soft=0.0,bridge=1.0,bridge_tokens='sensitivity'}"
    weights = next(part for part in parts(demo(change), config, ROWS) if part.title == "image tokens for stage 'image'")
    flops = pass_flops(config, 1, length=ROWS.prompt, answer=ROWS.answer)
    image = flops["vision"] + flops["bridge"]
    assert weights.flops == 4 * 64 * (2 * sum(flops.values()) - image)
    assert weights.work == "sensitivity on 256 records"


def test_a_training_is_scored_in_its_report_and_only_if_its_last_phase_trains_answers():
    recipe = load_training(EXPERIMENTS / "recipes" / "teacher-m.toml")
    shape = shape_of(recipe)
    both = [*parts(recipe, shape, ROWS)]
    assert [part.title for part in both] == ["reading", "phase 'facts'", "image features", "phase 'answers'", "report"]
    one = sum(sum(towers.values()) for towers in pruning.cost(shape, 1, 50, 6).flops.values())
    assert both[-1].flops == (3000 + 1000) * one and "4000 questions" in both[-1].work
    [*_, report] = parts(recipe.model_copy(update={"phases": recipe.phases[:1]}), shape, ROWS)
    assert (report.flops, report.batches, report.work) == (0, 0, "export")


def test_image_features_that_are_not_on_disk_are_computed_in_every_step(config):
    def flops(features):
        recipe = demo(f"features={features}")
        return {part.title: part.flops for part in parts(recipe, config, ROWS)}, recipe

    (disk, _), (each, recipe) = flops("disk"), flops("recompute")
    small = pruning.planned_config(config, recipe.stages[0].sizes)
    student = pruning.planned_config(small, recipe.stages[1].sizes)  # its bridge writes fewer channels

    def image(model, rows):
        forward = pruning.forward_flops(model, rows, 50, 6)
        return forward["vision"] + forward["bridge"]

    for stage in recipe.stages[1:]:
        more = each.pop(f"stage '{stage.name}'") - disk.pop(f"stage '{stage.name}'")
        assert more == stage.steps * image(student, 16)
    assert disk.pop("image features") == image(small, 4 * 16000)  # as shifted pictures too
    assert each == disk  # the image side has a stage of its own


def test_the_teacher_of_a_smaller_start_is_cached_and_scored(config):
    recipe = demo("loss.soft=1", "loss.hard=1")
    start = pruning.planned_config(config, {"vision/layers": 5, "decoder/layers": 3})
    alone, taught = ({part.title: part for part in parts(recipe, start, ROWS, one)} for one in (None, config))
    whole = {part.title: part for part in parts(recipe, config, ROWS)}
    weights = "image tokens for stage 'image'"
    assert all(taught[title] == whole[title] for title in ("teacher cache", weights))
    before, small = (
        sum(sum(towers.values()) for towers in pruning.cost(one, 1, 50, 6).flops.values()) for one in (config, start)
    )
    assert taught["report"].flops - alone["report"].flops == pytest.approx(4000 * (before - small))
    same = {title: part for title, part in taught.items() if title not in ("teacher cache", "report", weights)}
    assert same == {title: alone[title] for title in same}


def test_slots_count_for_the_image_side_alone(config):
    def flops(**slots):
        return {part.title: part.flops for part in parts(demo(), config, ROWS._replace(**slots))}

    one, two, none = flops(), flops(slots=2.0), flops(slots=0.0)
    small = pruning.planned_config(config, demo().stages[0].sizes)
    image = sum(pruning.forward_flops(small, 64, 50, 6)[tower] for tower in ("vision", "bridge"))
    (first, *_) = flops_of(config, demo())
    updates = 7200 * update_flops(first.after, first.work)
    assert two["stage 'image'"] - one["stage 'image'"] == 3 * 7200 * image == one["stage 'image'"] - updates
    assert two["image features"] == 2 * one["image features"] and "image features" not in none
    # The language model reads features.
    assert two["stage 'language'"] == one["stage 'language'"] == none["stage 'language'"]


def test_the_slots_of_a_grid_are_not_counted_twice():
    """A usual picture has many slots there; its FLOPs are those of all of them."""
    config, recipe = preset("qwen3-vl-tiny"), demo()
    usual = {"length": 50, "answer": 6}
    stage = recipe.stages[-1]
    assert step_flops(config, stage, (), **usual, slots=config.slots) == step_flops(config, stage, (), **usual)
    assert config.slots > 1


def test_seconds_of_a_part_by_hand():
    part = Part("steps", "", flops=1e12, batches=100, seconds=7)
    assert seconds(part, 1e11) == pytest.approx(7 + 100 * forecast.CALL + 10 / forecast.SHARE)


def test_complete_parts_are_left_out(config, capsys, monkeypatch):
    monkeypatch.setattr(forecast, "matmul_rate", lambda: 1e11)
    announce(demo(), config, ROWS, done=["stage 'image'"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("11 M parameters to about ")
    assert not any("'image'" in line for line in lines)
    assert any("stage 'language': encoder/layers 6 to 2, " in line for line in lines)


def test_lengths_are_estimated_from_the_first_records(config):
    encoder, records = Encoder(load_processor(TEACHER), config), source("m", "val", 20)
    estimate = look_at(records, encoder)
    first = [encoder(records[index]) for index in range(8)]
    assert estimate["prompt"] == -(-sum(len(row["prompt"]) for row in first) // 8)
    assert estimate["slots"] == 1
    assert estimate["unread"] == 20
    open_encoded(records, encoder)
    assert look_at(records, encoder)["unread"] == 0


def test_rows_that_are_encoded_are_not_read_again(config):
    (first, *_), (again, *_) = (parts(demo(), config, ROWS._replace(unread=unread)) for unread in (16000, 0))
    assert (first.seconds, again.seconds) == (pytest.approx(20.0), pytest.approx(4.0))
