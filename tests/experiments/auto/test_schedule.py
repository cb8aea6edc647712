"""The stages of a plan: what they train, with which batches, and how they fill the time."""

from functools import cache
from math import inf
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import IMAGE_SIDE
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from antgmm_jax.io import checkpoint
from antgmm_jax.io.loading import load_processor
from data.maad import source
from distill import Diverged
from experiments.auto import tune
from experiments.auto.goal import Goal
from experiments.auto.look import Look
from experiments.auto.schedule import (
    DECAY,
    IMAGE,
    Machine,
    Scale,
    Tuned,
    base,
    fitted,
    saved_every,
    scored_rows,
    stages,
    with_stages,
)
from experiments.auto.sizing import by_side, value_of
from experiments.auto.tune import FEWEST, Trial, steps_within
from experiments.run.checks import check_sizes
from experiments.run.progress import forecast
from experiments.run.progress.forecast import Rows
from experiments.run.rows.samples import Samples
from experiments.run.schema.recipe import recipe_of
from experiments.run.student import Student, whole
from pruning.costs import total_parameters
from tests.experiments.tiny import save_llava
from tests.pruning.models import CONFIGS

GOAL = Goal("teacher", {"kind": "jsonl", "path": "a.jsonl"}, {"kind": "jsonl", "path": "b.jsonl"}, smaller=8.0)


@cache
def small(name):
    """Sizes of a third of the parameters."""
    config = CONFIGS[name]
    return pruning.search(config, total_parameters, total_parameters(config) / 3, value=value_of(config)).sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_the_image_side_is_cut_first_and_alone(name):
    config = CONFIGS[name]
    wanted = small(name)
    image, text = by_side(config, wanted)
    assert {**image, **text} == {axis: n for axis, n in wanted.items() if n < sizes(config)[axis]}
    assert not image.keys() & text.keys()
    assert {axis.split("/")[0] for axis in complete(config, image)} <= {*IMAGE_SIDE}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [20, 5000])
def test_stages_of_a_plan_are_a_legal_recipe(name, rows):
    config = CONFIGS[name]
    raw = base(GOAL, {**GOAL.data, "samples": rows}, {**GOAL.test, "samples": 10})
    of = stages(config, small(name), rows, Scale(0.1, 0.1), Tuned("adamw", 0.5))
    recipe = recipe_of({**raw, "stage": of}, "plan")
    every = pruning.identity(config)
    check_sizes(Student(config, dict, every), recipe.stages, whole=every)
    last = recipe.stages[-1]
    assert (last.optimizer.kind, last.optimizer.learning_rate) == ("adamw", 0.0015)
    assert all(stage.optimizer.weight_decay == DECAY and stage.optimizer.batch_size <= rows for stage in recipe.stages)
    assert all("magnitude" not in stage.importance.values() for stage in recipe.stages)


def planned(name):
    """Tables, config and sizes of a plan, with a machine of 1e9 FLOP/s."""
    raw = base(GOAL, {**GOAL.data, "samples": 5000}, {**GOAL.test, "samples": 1000})
    rows = Rows(trained=5000, scored=1000, hard=0, prompt=50, answer=6, slots=1.0, read=1e-3, unread=0)
    return raw, CONFIGS[name], small(name), Machine(rows, 1e9, 100.0)


def test_scores_take_a_fifth_of_the_time():
    raw, config, wanted, machine = planned("llava")
    image, after = (
        pruning.planned_config(config, complete(config, part)) for part in (by_side(config, wanted)[0], wanted)
    )
    seconds = machine.rows.read
    for model in (image, after, after, config, after):  # three stages, then teacher and student in the report
        flops = sum(sum(towers.values()) for towers in pruning.cost(model, 1, 50, 6).flops.values())
        seconds += flops / (forecast.SHARE * 1e9) + forecast.CALL * 6 / forecast.BATCH
    goal = GOAL._replace(minutes=5 * 400.5 * seconds / 60)
    assert scored_rows(goal, raw, config, wanted, machine) == 400
    assert scored_rows(goal._replace(minutes=10 * goal.minutes), raw, config, wanted, machine) == 1000
    hurried = goal._replace(minutes=goal.minutes / 10)
    assert scored_rows(hurried, raw, config, wanted, machine) == 100
    assert scored_rows(hurried, raw, config, wanted, machine.scoring(60)) == 60


def test_the_time_for_scores_is_taken_from_the_steps():
    raw, config, wanted, machine = planned("llava")
    time = fitted(GOAL, raw, config, wanted, machine, Tuned())[1]
    goal, rows = GOAL._replace(minutes=(time + machine.spent) / 60), []
    for scored in (0, 1000, 2000):
        tables, expected, *_ = fitted(goal, raw, config, wanted, machine.scoring(scored), Tuned())
        assert expected == pytest.approx(time, rel=0.01)
        rows.append(np.dot(steps_of(tables["stage"]), batches_of(tables["stage"])))
    assert rows[0] > rows[1] > rows[2]


def test_features_of_many_rows_are_computed_where_steps_see_only_some_of_them():
    raw, config, wanted, machine = planned("llava")
    computed = {**raw, "features": "recompute"}
    goal = GOAL._replace(minutes=(fitted(GOAL, raw, config, wanted, machine, Tuned()).aim + machine.spent) / 60)
    for rows, better in ((5000, raw), (500_000, computed)):
        many, data = machine._replace(rows=machine.rows._replace(trained=rows)), {**raw["data"], "samples": rows}
        fits = [fitted(goal, {**tables, "data": data}, config, wanted, many, Tuned()) for tables in (raw, computed)]
        assert max(fits, key=lambda fit: fit.order).raw.get("features") == better.get("features")
    assert fits[0].order[0] < fits[1].order[0]


def test_a_killed_run_loses_five_minutes_of_training_at_most():
    raw, config, wanted, machine = planned("llava")
    tables = fitted(GOAL, raw, config, wanted, machine, Tuned()).raw
    work = recipe_of(tables, "plan").work
    slow = {each.title: 6.0 * each.stage.steps for each in work}
    assert saved_every(tables, slow) == 50
    assert saved_every(tables, slow | {work[0].title: 15.0 * work[0].stage.steps}) == 20
    assert saved_every(tables, {title: seconds * 100 for title, seconds in slow.items()}) == 10
    assert saved_every(tables, dict.fromkeys(slow, 1.0)) == 500
    given = {**raw, "checkpoint_every": 7}
    assert fitted(GOAL, given, config, wanted, machine, Tuned()).raw["checkpoint_every"] == 7


def test_the_image_side_gets_a_fifth_of_a_short_time():
    raw, config, wanted, machine = planned("llava")

    def time(some, *steps):
        some = [{**stage, "recover_steps": number} for stage, number in zip(some, steps, strict=True)]
        recipe = recipe_of({**raw, "stage": some}, "plan")
        return sum(forecast.seconds(part, machine.rate) for part in forecast.parts(recipe, config, machine.rows))

    def stages_within(seconds):
        goal = GOAL._replace(minutes=(machine.spent + seconds) / 60)
        return fitted(goal, raw, config, wanted, machine, Tuned())[0]["stage"]

    aim = stages(config, wanted, 5000, Scale(1.0, 1.0), Tuned())
    most, batches = steps_of(aim), [64, 64, 16]
    assert batches_of(aim) == batches and most[2] == 4 * most[1]
    enough = time(aim, *most)
    assert steps_of(stages_within(enough)) == pytest.approx(most, rel=0.01)
    few = stages(config, wanted, 5000, Scale(0.01, 0.01), Tuned())
    none = time(few, 21, 21, 21)
    short = stages_within((none + enough) / 2)
    # Fewer than 600 steps of 64: more steps of 16.
    assert batches_of(short) == [64, 16, 16]
    image, language, settle = steps_of(short)
    assert (time(short, image, 21, 21) - none) / (time(short, image, language, settle) - none) == pytest.approx(
        IMAGE, abs=0.01
    )
    assert image / most[0] > 0.5 > language * 16 / (most[1] * 64)
    assert time(short, image, language, settle) == pytest.approx((none + enough) / 2, rel=0.01)


def test_an_online_teacher_does_not_read_shifted_pictures():
    """The loss of the image side reads it; other stages learn from labels, with shifted pictures, unless all distil."""
    raw, config, wanted, _ = planned("llava")
    for mode, loss, shifts in (
        ("cache", raw["loss"], [1, 1, 1]),
        ("online", raw["loss"], [0, 1, 1]),
        ("online", {**raw["loss"], "soft": 1.0}, [0, 0, 0]),
    ):
        tables = {**raw, "loss": loss, "teacher": {**raw["teacher"], "mode": mode}}
        made = with_stages(tables, config, wanted, 5000, Scale(1.0, 1.0), Tuned())
        assert [stage.shift for stage in recipe_of(made, "plan").stages] == shifts


def test_the_image_side_learns_from_the_bridge_alone():
    """Other terms of the top-level loss would run the whole language model at each of its steps."""
    raw, config, wanted, _ = planned("llava")
    loss = {"soft": 1.0, "pair": 0.5, "temperature": 2.0}
    made = with_stages({**raw, "loss": loss}, config, wanted, 5000, Scale(1.0, 1.0), Tuned())
    image, language, _ = recipe_of(made, "plan").stages
    assert image.loss.terms() == ("bridge",) and not image.loss.reads_answers
    assert language.loss.terms() == ("hard", "soft", "pair")
    # Only what it would inherit is written.
    assert made["stage"][0]["loss"].keys() == {"hard", "soft", "pair", "bridge", "bridge_tokens"}
    plain = with_stages(raw, config, wanted, 5000, Scale(1.0, 1.0), Tuned())["stage"][0]["loss"]
    assert plain == {"hard": 0.0, "bridge": 1.0, "bridge_tokens": "sensitivity"}


def test_a_plan_has_at_least_600_steps_of_64_or_more_steps_of_16():
    _, config, wanted, _ = planned("llava")
    for scale, batches, steps in ((1.0, [64, 16], [625, 2500]), (0.95, [16, 16], [2375, 2375])):
        some = stages(config, wanted, 5000, Scale(1.0, scale), Tuned())[1:]
        assert (batches_of(some), steps_of(some)) == (batches, steps)
    some = stages(config, wanted, 100, Scale(1.0, 1.0), Tuned())[1:]  # a quarter of the rows at most
    assert batches_of(some) == [25, 16]


def steps_of(some):
    return [stage["recover_steps"] for stage in some]


def batches_of(some):
    return [stage["optimizer"]["batch_size"] for stage in some]


def test_the_tuner_sees_no_row_twice():
    raw, config, wanted, machine = planned("llava")
    text = by_side(config, wanted)[1]

    def steps(rows):
        return steps_within(1e6, raw, config, text, machine._replace(rows=machine.rows._replace(trained=rows)))

    assert [steps(rows) for rows in (5000, 1600, 16 * FEWEST, 16 * FEWEST - 1)] == [200, 100, FEWEST, 0]


def test_the_tuner_trains_on_labels_also_if_the_plan_compares_the_teacher():
    tables, config, wanted, _ = planned("llava")
    given = {
        **tables,
        "loss": {"hard": 0.5, "soft": 1.0},
        "teacher": {"path": "T", "states": ["text"], "mode": "cache"},
    }
    recipe = tune._recipe(given, config, by_side(config, wanted)[1], 100, Tuned(), steps=20)
    (stage,) = recipe.stages
    assert stage.loss.terms() == ("hard",) and not stage.loss.reads_teacher
    assert recipe.teacher.path == "T" and not recipe.teacher.states


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """A tuner of two steps for a student with given sizes; parameters in float32 have a loss of 0.5."""
    directory = save_llava(tmp_path / "teacher")
    teacher, processor = whole(directory), load_processor(directory)
    samples = Samples(source("s", "train", 8), processor, teacher.config)
    seen = Look(teacher, processor, samples, samples, 8, 1.0, {}, {})
    tables = base(GOAL._replace(model=str(directory)), {**GOAL.data, "samples": 8}, {**GOAL.test, "samples": 8})
    rows = Rows(trained=8, scored=8, hard=0, prompt=20, answer=4, slots=1.0, read=1e-3, unread=0)

    def loss(config, params, *_, **__):
        return 0.5 if {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"} else 0.0

    for name, value in (("STEPS", 2), ("FEWEST", 2), ("token_loss", loss)):
        monkeypatch.setattr(tune, name, value)

    def tried(wanted):
        return tune.tuned(tables, seen, wanted, Machine(rows, 1e12, 0.0), 1e6, tmp_path / "tuning")

    return tried


@pytest.fixture
def tuning(monkeypatch, tuner):
    """A tuner whose trials diverge or lack memory with some settings."""

    def trials(diverging=lambda optimizer: False, large=lambda optimizer: False):
        def run(stage_run, start):
            optimizer = stage_run.stage.optimizer
            if diverging(optimizer):
                raise Diverged("a loss is not finite")
            if large(optimizer):
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 25600000000 bytes.")
            return SimpleNamespace(config=start.config, params=start.load("bfloat16"))

        monkeypatch.setattr(tune.StageRun, "run", run)
        return [(one.tuned.kind, round(one.tuned.rate, 2), one.loss) for one in tuner({"text/layers": 2})]

    return trials


def test_a_trial_that_diverges_has_an_infinite_loss_and_the_others_go_on(tuning, tmp_path):
    usual, muon, low = ("adamw", 1.0, 0.5), ("muon", 1.0, inf), ("adamw", 0.33, 0.5)
    assert tuning(lambda optimizer: optimizer.kind == "muon") == [usual, low, muon]
    assert tuning(lambda optimizer: optimizer.learning_rate > 2e-3)[0] == ("muon", 0.33, 0.5)
    assert not (tmp_path / "tuning").exists()


def test_if_every_trial_diverges_one_line_says_what_to_do(tuning, tmp_path):
    with pytest.raises(AntgmmError, match=r"^the language model diverges with every .*: check .* or train with --set"):
        tuning(lambda optimizer: True)
    assert not (tmp_path / "tuning").exists()


def test_a_trial_without_memory_is_left_out_and_the_plan_goes_on(tuning, tmp_path):
    usual, low = ("adamw", 1.0, 0.5), ("adamw", 0.33, 0.5)
    assert tuning(large=lambda optimizer: optimizer.kind == "muon") == [usual, low]
    assert tuning(lambda optimizer: optimizer.kind == "adamw", lambda optimizer: optimizer.learning_rate < 2e-3) == [
        ("muon", 1.0, 0.5),
        ("adamw", 1.0, inf),
    ]
    assert tuning(large=lambda optimizer: True) == []
    assert not (tmp_path / "tuning").exists()


@pytest.mark.long
def test_trials_write_no_checkpoints(tuner, monkeypatch):
    monkeypatch.setattr(tune, "KINDS", ("adamw",))
    monkeypatch.setattr(tune, "RATES", ())
    monkeypatch.setattr(checkpoint, "save_step", lambda folder, *_: pytest.fail(f"wrote {folder}"))
    assert tuner({}) == [Trial(Tuned("adamw", 1.0), 0.5)]


def test_errors_other_than_those_of_memory_end_the_tuner(tuning):
    def broken(optimizer):
        raise RuntimeError("INTERNAL: a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        tuning(large=broken)


def test_nothing_is_tried_where_parameters_and_moments_alone_exceed_the_memory(tuning, monkeypatch):
    def tried(optimizer):
        pytest.fail("a trial was started")

    monkeypatch.setattr(tune, "device_memory", lambda: 1000)
    assert tuning(tried) == []


def test_the_usual_optimizer_and_rate_are_left_only_for_a_clearly_lower_loss():
    usual = Trial(Tuned("muon", 1.0), 0.335)
    assert usual.handicapped < Trial(Tuned("muon", 3.0), 0.331).handicapped
    assert usual.handicapped > Trial(Tuned("muon", 3.0), 0.320).handicapped
    assert usual.handicapped < Trial(Tuned("adamw", 3.0), 0.320).handicapped
