"""The forecast of a run: its parts in order, their FLOPs and estimated durations."""

from pathlib import Path

import jax
import pytest

import pruning
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.parallel import sharding
from antgmm_jax.presets import preset
from data.encoding import Encoder
from data.maad import source
from data.source import evenly
from data.store import open_encoded
from experiments.run.progress import forecast
from experiments.run.progress.flops import (
    importance_flops,
    pass_flops,
    stage_flops,
    step_flops,
    training_flops,
    update_flops,
)
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
        "importance for stage 'image'",
        "stage 'image'",
        "scores after stage 'image'",
        "importance for stage 'language'",
        "image features",
        "stage 'language'",
        "scores after stage 'language'",
        "stage 'settle'",
        "scores after stage 'settle'",
        "report",
    ]
    trained = sum(part.flops for title, part in by_title.items() if title.startswith(("stage", "image features")))
    steps = [stage.work.stage.steps for stage in flops_of(config, recipe)]
    updates = [update_flops(stage.after, stage.work) for stage in flops_of(config, recipe)]
    assert trained == training_flops(config, recipe, length=50, answer=6) + sum(
        each * flops for each, flops in zip(steps, updates, strict=True)
    )
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
    checked = sum(pass_flops(shape, 1, length=50, answer=6).values()) + one  # in JAX and in PyTorch
    assert both[-1].flops == (3000 + 1000) * one + 2 * 320 * checked and "4000 questions" in both[-1].work
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
    assert taught["report"].flops - alone["report"].flops == pytest.approx((4000 + forecast.TIMED) * (before - small))
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
    assert step_flops(config, stage, **usual, slots=config.slots) == step_flops(config, stage, **usual)
    assert config.slots > 1


def test_seconds_of_a_part_by_hand():
    part = Part("steps", "", flops=1e12, batches=100, seconds=7)
    assert seconds(part, 1e11) == pytest.approx(7 + 100 * forecast.CALL + 10 / forecast.SHARE)


def test_importance_passes_the_records_once_for_each_method_that_reads_them(config):
    recipe, lengths = demo(), {"length": 50, "answer": 6}
    image, language = recipe.stages[:2]
    flops = pass_flops(config, 256, **lengths)
    side, whole = flops["vision"] + flops["bridge"], sum(flops.values())
    for stage, targets, how, expected in (
        (image, {"vision/mlp": 64}, "activation", side),
        (language, {"decoder/mlp": 64}, "activation", whole),
        (image, {"vision/mlp": 64}, "taylor", 3 * whole),
        (image, {"vision/mlp": 64}, "random", 0),
    ):
        scored = stage.model_copy(update={"importance": {"*": how}})
        assert importance_flops(config, scored, targets, 256, **lengths) == expected
    both = image.model_copy(update={"importance": {"*/layers": "block_influence", "*": "activation"}})
    assert importance_flops(config, both, {"vision/mlp": 64, "vision/layers": 2}, 256, **lengths) == 2 * side


def test_batches_are_read_while_others_are_computed():
    reading = Part("steps", "", flops=1e12, batches=100, seconds=7, ahead=5)
    assert seconds(reading, 1e11) == seconds(reading._replace(ahead=0), 1e11)
    assert seconds(reading._replace(ahead=300), 1e11) == 307


def test_pictures_that_are_not_kept_are_decoded_again_by_each_part(config):
    kept, again = (parts(demo(), config, ROWS._replace(decode=decode)) for decode in (0.0, 0.1))
    longer = {one.title: round(two.seconds - one.seconds, 6) for one, two in zip(kept, again, strict=True)}
    steps = {title: seconds for title, seconds in longer.items() if title.startswith("stage")}
    assert not any(steps.values())  # which read ahead
    assert {title: seconds for title, seconds in longer.items() if title not in steps} == {
        "reading": 0,
        "teacher cache": 1600,
        "image tokens for stage 'image'": 25.6,  # four batches of 64
        "importance for stage 'image'": 0,
        "importance for stage 'language'": 0,
        "scores after stage 'image'": 300,
        "image features": 1600,
        "scores after stage 'language'": 300,
        "scores after stage 'settle'": 300,
        "report": 2 * 400,
    }
    ahead = {part.title: part.ahead for part in again if part.ahead}
    (image, *_) = demo().stages
    assert ahead == {"stage 'image'": pytest.approx(0.1 * image.steps * image.optimizer.batch_size)}


def test_encoded_pictures_are_kept_up_to_a_size(config, monkeypatch):
    encoder, records = Encoder(load_processor(TEACHER), config), source("m", "val", 8)
    assert look_at(records, encoder)["decode"] == 0
    monkeypatch.setattr(records, "drawn", False)
    assert look_at(records, encoder)["decode"] == 0
    monkeypatch.setattr(forecast, "MOST_BYTES", 8 * 64 * 96)
    looks = look_at(records, encoder)
    assert looks["decode"] == looks["read"] > 0


def test_complete_parts_are_left_out(config, capsys, monkeypatch):
    monkeypatch.setattr(forecast, "matmul_rate", lambda dtype, devices: devices * 1e11)
    announce(demo(), config, ROWS, done=["stage 'image'"], devices=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("11 M parameters to about ")
    assert not any("'image'" in line for line in lines)
    assert any("stage 'language': encoder/layers 6 to 2, " in line for line in lines)


def test_lengths_are_estimated_from_records_all_over_the_source(config):
    encoder, records = Encoder(load_processor(TEACHER), config), source("m", "val", 40)

    def mean(rows):
        lengths = [len(encoder(records[int(row)])["prompt"]) for row in rows]
        return -(-sum(lengths) // len(lengths))

    estimate = look_at(records, encoder)
    assert estimate["prompt"] == mean(evenly(40, 16))
    assert estimate["slots"] == 1
    assert estimate["unread"] == 40
    open_encoded(records, encoder)
    stored = look_at(records, encoder)
    assert stored["unread"] == 0 and stored["prompt"] == mean(range(40))


def test_the_rate_is_that_of_all_devices_of_the_mesh_but_for_those_that_share_a_cpu(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: float(next(now)))
    alone = forecast.matmul_rate()
    assert alone == 2 * 1024**3
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])):
        assert forecast.matmul_rate() == alone
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(forecast, "_LARGE", 64)
        assert forecast.matmul_rate("bfloat16") == 4 * 2 * 64**3


def test_rows_that_are_encoded_are_not_read_again(config):
    (first, *_), (again, *_) = (parts(demo(), config, ROWS._replace(unread=unread)) for unread in (16000, 0))
    assert (first.seconds, again.seconds) == (pytest.approx(20.0), pytest.approx(4.0))
