"""Parts of a plan: goals, rows, buckets, sensitivity, sizes by side, and stages for every family."""

import json
import os
import tomllib
from dataclasses import replace
from math import inf, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import preset
from data.maad import source
from data.metrics import most_frequent, varied
from data.readers import read_records
from data.record import Turn
from data.store import open_encoded
from experiments.auto import amount, plan, sizing
from experiments.auto.advice import is_flat
from experiments.auto.amount import affordable
from experiments.auto.buckets import bucket
from experiments.auto.goal import Goal, is_planned, marked, parameters, ratio, stage_of
from experiments.auto.look import (
    FEWEST,
    Look,
    at_chance,
    check_quality,
    longest_answer,
    rows_in,
    spread,
    warnings,
)
from experiments.auto.plan import Plan, fewer_scores, fewer_steps, in_time, of_words, shared, too_long, write
from experiments.auto.rows import kind_of, tables
from experiments.auto.schedule import Fitted, Scale, Tuned, base, draft
from experiments.auto.sensitivity import InTime, factors, reduced
from experiments.auto.sizing import Sensitivity, batches_for, fewest_layers, unseen, value_of, within
from experiments.lab.planning import search as searching
from experiments.lab.planning.rates import RequestSize
from experiments.run.calibration import calibration_batches
from experiments.run.progress import forecast
from experiments.run.rows.samples import Samples
from experiments.run.student import whole
from pruning.costs import total_parameters
from tests.data.test_store import encoder, same
from tests.experiments.tiny import save_llava
from tests.pruning.models import CONFIGS

GOAL = Goal("teacher", {"kind": "jsonl", "path": "a.jsonl"}, {"kind": "jsonl", "path": "b.jsonl"}, smaller=8.0)


def test_ratios_are_above_one():
    assert ratio("8x") == ratio("8") == 8
    for text in ("x", "1", "0.5x", "inf", "-3x", "1e9x"):
        with pytest.raises(AntgmmError, match=f"--smaller {text}: write how many times fewer"):
            ratio(text)


def test_a_plan_belongs_to_its_goal(tmp_path):
    plan = tmp_path / "plan.toml"
    assert not is_planned(plan, GOAL)
    plan.write_text(f"{marked(GOAL)}\nseed = 1\n")
    assert is_planned(plan, GOAL)
    with pytest.raises(AntgmmError, match="is the plan of other options"):
        is_planned(plan, GOAL._replace(smaller=4.0))
    for text in (b"seed = 1\n", b"\xff\xfe\n", b"#" * 10**6):
        plan.write_bytes(text)
        with pytest.raises(AntgmmError, match="is no plan"):
            is_planned(plan, GOAL)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AntgmmError, match="pipe is not a regular file"):
        is_planned(tmp_path / "pipe", GOAL)


def test_the_kind_of_data_follows_from_the_files(tmp_path):
    for name, kind in (("a.jsonl", "jsonl"), ("b.json", "jsonl"), ("c.parquet", "parquet"), ("d.tar", "webdataset")):
        assert kind_of(str(tmp_path / name), "--data") == kind
    for name in ("state.json", "data-0.arrow", "rows.csv"):
        (tmp_path / name).touch()
    assert kind_of(str(tmp_path), "--data") == "arrow"
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").touch()  # beside folders of rows
    assert kind_of(str(tmp_path / "splits"), "--data") == "arrow"
    with pytest.raises(AntgmmError, match=r"^--test .*rows\.csv: name a file that ends in \.jsonl"):
        kind_of(str(tmp_path / "rows.csv"), "--test")
    with pytest.raises(AntgmmError, match=r"^--test .*absent does not exist"):
        kind_of(str(tmp_path / "absent"), "--test")


def test_test_rows_must_be_others(tmp_path):
    rows = str(tmp_path / "a.jsonl")
    Path(rows).touch()
    with pytest.raises(AntgmmError, match="has the rows of --data: name other rows, or leave it out"):
        tables(rows, f"{tmp_path}/../{tmp_path.name}/a.jsonl")


@pytest.mark.parametrize(("text", "value"), [("7955971", 7955971), ("10M", 10_000_000), ("0.5B", 500_000_000)])
def test_numbers_of_parameters(text, value):
    assert parameters(text) == value


@pytest.mark.parametrize("text", ["", "M", "-3", "0", "nan", "1e400k", "ten"])
def test_other_texts_are_no_numbers_of_parameters(text):
    with pytest.raises(AntgmmError, match=r"^--params .*: write the maximum number of parameters, such as 10M"):
        parameters(text)


def test_a_student_that_consists_of_unused_tokens_is_said_so():
    config = preset("smolvlm-135m")  # 28.3 M of 143 M parameters are for tokens
    assert not of_words(config, 341)
    smaller = pruning.planned_config(config, {"text/layers": 8})
    (line,) = of_words(smaller, 341)
    assert line.startswith(
        "warning: 28.3 M of the student's parameters are for 49216 tokens, of which the rows use 341:"
    )
    assert not of_words(smaller, 30_000)


def test_without_test_rows_a_tenth_is_held_out():
    assert [one.get("split") for one in tables("a.jsonl", "")] == ["train", "test"]
    assert [one["path"] for one in tables("a.jsonl", "b.jsonl")] == ["a.jsonl", "b.jsonl"]
    # Pictures of other rows are beside them, not in the folder of the training rows, which a recipe would inherit.
    assert [one["images"] for one in tables("a.jsonl:images=p", "b.jsonl")] == ["p", ""]
    assert [one["images"] for one in tables("a.jsonl:images=p", "b.jsonl:images=q")] == ["p", "q"]


def test_a_bucket_saves_most_padding():
    # 3 rows of 4 fit 8 columns, one needs 32: 8, 8, 8, 32 instead of 32 each.
    assert bucket(np.array([5, 6, 8, 32])) == [8]
    assert bucket(np.array([30, 31, 32, 32])) == []
    assert bucket(np.array([4, 5])) == []


def halved(increases):
    return factors(increases, dict.fromkeys(increases, 2.0))


def test_factors_are_roots_of_increases_relative_to_their_geometric_mean():
    assert halved({"a/mlp": 1.0, "b/mlp": 4.0}) == pytest.approx({"a/mlp": sqrt(0.5), "b/mlp": sqrt(2)})
    assert halved({"a/mlp": -1.0, "b/mlp": 0.0}) == {"a/mlp": 1.0, "b/mlp": 1.0}
    wide = halved({"a/mlp": 0.0, "b/mlp": 1e4})
    assert wide == {"a/mlp": 0.25, "b/mlp": 4.0}


def test_an_axis_that_was_cut_less_is_worth_more():
    """Equal losses of a cut to a half and of one to a quarter, which the search prices at 1 and at 3."""
    ratio = sqrt(3)
    worth = factors({"a/heads": 1.0, "b/mlp": 1.0}, {"a/heads": 2.0, "b/mlp": 4.0})
    assert worth["a/heads"] / worth["b/mlp"] == pytest.approx(ratio)


def test_most_of_each_axis_is_closed():
    config = CONFIGS["llava"]
    before, left = sizes(config), reduced(config)
    assert left.keys() <= set(pruning.free_axes(config))
    assert all(units == max(1, round(before[axis] / 4)) for axis, units in left.items() if axis.endswith("/layers"))
    assert all(units < before[axis] for axis, units in left.items())


def test_a_width_has_at_most_the_factor_of_the_layers_of_its_side():
    increases = {
        "vision/layers": 4.0,
        "vision/embed": 1.0,
        "encoder/layers": 1.0,
        "decoder/layers": 4.0,
        "text/embed": 16.0,
    }
    mean = 256.0 ** (1 / 10)  # root of the geometric mean
    assert halved(increases) == pytest.approx(
        {
            "vision/layers": 2 / mean,
            "vision/embed": 1 / mean,
            "encoder/layers": 1 / mean,
            "decoder/layers": 2 / mean,
            "text/embed": 2 / mean,  # and not 4
        }
    )
    assert halved({"text/mlp": 1.0, "text/embed": 4.0})["text/embed"] == pytest.approx(sqrt(2))


def test_the_most_frequent_answer_of_each_type():
    chance = most_frequent(["a", "a", "a", "b"], ["Yes", "yes ", "no", "3"])
    assert chance == {"a": pytest.approx(2 / 3), "b": 1.0}
    assert at_chance({"a": 0.7, "b": 1.0}, chance) == ["a"]
    assert at_chance({"a": 0.8, "b": 1.0}, chance) == []


def test_types_of_free_answers_are_not_called_unlearnt():
    """Exact match of what is different in every row is near 0, whatever was learnt."""
    types = [*["a", "b"] * 20, *["few"] * 5]
    answers = [text for row in range(20) for text in (("yes", "no")[row % 2], f"A  story {row % 15}")]
    answers += [f"${row}" for row in range(5)]
    chance, different = most_frequent(types, answers), varied(types, answers)
    assert different == {"a": 0.1, "b": 0.75}  # five answers that differ say nothing
    assert at_chance({"a": 0.0, "b": 0.0, "few": 0.0}, chance, different) == ["a", "few"]
    mixed = look(0.5, {"a": 0.1, "b": 0.1, "c": 0.1})._replace(by_type={"a": 0.0, "b": 0.0, "c": 1.0})
    (line,) = warnings(mixed._replace(varied_by_type={"a": 0.1, "b": 0.9, "c": 0.1}))
    assert "does not know questions of type a: " in line


def look(score, chance, rows=5000, tested=100):
    trained = range(rows)
    return Look(None, None, trained, None, tested, score, dict.fromkeys(chance, score), chance)  # pyright: ignore


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (look(0.9, {"a": 0.3, "b": 0.5}), []),
        (look(0.45, {"a": 0.3, "b": 0.5}), ["a student cannot learn the task"]),
        (
            look(0.9, {"a": 0.3}, rows=18, tested=2),
            ["18 training rows are few", "2 held-out rows are few: a score is uncertain by 35 points", "one question"],
        ),
        (look(0.0, {"": 0.0})._replace(varied=0.9), ["90% of the answers are different texts", "one question type"]),
        (look(0.7, {"a": 0.1, "b": 0.7}), ["does not know questions of type b"]),
        (look(1.0, {"": 0.95}), ["one question type", "nearly all answers are equal"]),
        (look(0.96, {"": 0.95}), ["a student cannot learn", "one question type", "nearly all answers are equal"]),
    ],
)
def test_warnings_say_what_makes_a_good_student_unlikely(seen, words):
    lines = warnings(seen)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_a_teacher_below_the_most_frequent_answers_has_no_quality_to_keep():
    check_quality(look(0.45, {"a": 0.3, "b": 0.5}))
    with pytest.raises(
        AntgmmError, match="--keep-quality: the teacher's answers score 0.30, the most frequent answers 0"
    ):
        check_quality(look(0.3, {"a": 0.3, "b": 0.5}))
    with pytest.raises(AntgmmError, match="--keep-quality compares exact match: 60% .*; give --smaller or --params"):
        check_quality(look(0.05, {"": 0.0})._replace(varied=0.6, rouge=0.4))
    check_quality(look(0.9, {"": 0.0})._replace(varied=0.6))  # printed names and prices, which it reads


@pytest.fixture
def pictured(tmp_path):
    """Nine rows with a picture each, of which every second one is among five at equal distances."""
    lines = []
    for row in range(9):
        Image.new("RGB", (24, 20), (25 * row, 0, 0)).save(tmp_path / f"{row}.png")
        lines.append(json.dumps({"image": f"{row}.png", "question": "is it red?", "answer": "red " * (1 + row)}))
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "rows.jsonl"


def test_bad_pictures_of_spread_rows_are_listed_as_those_of_the_file(pictured, tmp_path):
    for row in (4, 8):
        (tmp_path / f"{row}.png").write_text("no picture")
    records, errors = read_records("jsonl", pictured), []
    for some in (spread(records, 5), records):
        with pytest.raises(AntgmmError) as refused:
            open_encoded(some, encoder(), tmp_path / "cache")
        errors.append(str(refused.value))
    assert errors[0] == errors[1]
    head, *lines = errors[0].splitlines()
    assert "2 of 9 rows are invalid" in head
    assert [line.split(" cannot")[0] for line in lines] == ["line 5: image 4.png", "line 9: image 8.png"]


def test_spread_rows_that_are_too_long_are_left_out_as_in_their_source_and_read_again(pictured, tmp_path):
    few, every = encoder(max_answer=6), encoder()
    with pytest.raises(AntgmmError, match=r"rows are too long(.|\n)*line 9: answer of"):
        open_encoded(spread(read_records("jsonl", pictured), 5), few, tmp_path / "cache")
    records = read_records("jsonl", pictured, drop_long=True)
    some = spread(records, 5)
    assert some.drops_long
    for encode, rows in ((few, [0, 2, 4]), (every, [0, 2, 4, 6, 8]), (few, [0, 2, 4])):
        stored = open_encoded(some, encode, tmp_path / "cache")
        assert (stored.dropped, len(stored), len(some)) == (5 - len(rows), len(rows), len(rows))
        assert [some.words(place).id for place in range(len(rows))] == [f"line {row + 1}" for row in rows]
        for place, row in enumerate(rows):
            same(stored[place], encode(records[row]))


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (GOAL._replace(minutes=4), "more than the 4 minutes: give at least --minutes 11 in another --run"),
        # A student of a search has a quarter of the time.
        (
            GOAL._replace(minutes=4, keep=0.9, params=9),
            "more than a student's part of the 16 minutes: give at least --minutes 44 in another --run",
        ),
    ],
)
def test_a_plan_that_takes_too_long_names_the_minutes_of_the_whole_command(goal, words):
    (line,) = too_long(goal, 60 * 10.5)
    assert line == f"warning: plan and run take about 10:30, {words}"
    assert not [*too_long(goal, 60 * 4.3)]


def test_a_plan_says_that_other_work_slowed_it():
    (line,) = shared(4.06, 2)
    assert line.startswith("warning: the load is 4.1 on 2 cores")
    assert not [*shared(2.4, 2)]


def test_reasons_with_line_breaks_and_control_characters_are_comments_of_a_plan(tmp_path):
    reasons = ["the teacher does not know a\nseed = 7\r\nof b", "\x00\x1b[31m\x7f\ttail"]
    write(Plan({"seed": 1}, reasons, 1, Tuned()), GOAL, tmp_path / "plan.toml")
    text = (tmp_path / "plan.toml").read_text()
    assert tomllib.loads(text) == {"seed": 1}
    assert [line[:2] for line in text.splitlines()[:3]] == ["# "] * 3
    assert "seed = 7" in text and is_planned(tmp_path / "plan.toml", GOAL)


def test_a_loss_that_does_not_fall_is_flat():
    assert is_flat([2.0, 1.99] * 8)
    assert not is_flat([2.0 - 0.05 * step for step in range(16)])
    assert not is_flat([2.0] * 4)
    assert not is_flat([0.04] * 16)  # learnt in an earlier stage


def test_the_search_spends_its_cuts_on_what_is_valued():
    config = CONFIGS["llava"]
    wide = pruning.search(config, total_parameters, total_parameters(config) / 3).sizes
    quick = pruning.search(config, total_parameters, total_parameters(config) / 3, value=value_of(config)).sizes
    assert quick["text/layers"] < wide["text/layers"]
    assert quick["text/embed"] >= wide["text/embed"]


@pytest.mark.parametrize(("answer", "batches"), [(1, 16), (8, 16), (15, 9), (35, 4), (300, 4)])
def test_sensitivity_reads_fewer_rows_with_long_answers(answer, batches):
    assert batches_for(answer) == batches


@pytest.mark.parametrize(
    ("seconds", "durations", "read"),
    [
        (35, [10] * 8, 3),  # a fourth one would end at 40
        (40, [10] * 8, 4),
        (75, [30] + [10] * 7, 5),
        (55, [30] + [10] * 7, 3),  # the first one also compiles, and does not say how long the next one takes
        (25, [30] + [10] * 7, 1),
        (-5, [10] * 8, 1),
        (inf, [10] * 8, 8),
    ],
)
def test_a_pass_over_batches_ends_in_time(seconds, durations, read):
    now = [0.0]
    batches = InTime(range(8), seconds, lambda: now[0])  # pyright: ignore
    for _, duration in zip(batches, durations, strict=False):
        now[0] += duration
    assert batches.read == read


@pytest.mark.long
def test_rows_of_a_sensitivity_are_encoded_once_and_as_few_as_the_time_allows(tmp_path, monkeypatch):
    teacher, made = save_llava(tmp_path / "teacher"), []

    def counted(*arguments, **options):
        made.append(calibration_batches(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(sizing, "calibration_batches", counted)
    model, processor = whole(teacher), load_processor(teacher)
    samples = Samples(source("s", "train", 20), processor, model.config)
    budget = total_parameters(model.config) // 2
    every, few = (within(model, samples, budget, 0, "float32", seconds).sensitivity for seconds in (inf, 0.0))
    assert (every.rows, every.wanted, few.rows, few.wanted) == (16, 16, 8, 16)
    assert [len(batches) for batches in made] == [2, 2]
    assert every.increases.keys() == few.increases.keys() != set()
    chosen = within(model, samples, budget, 0, "float32", 0.0, multiple=12).sized.sizes
    cut = {axis: n for axis, n in chosen.items() if axis.endswith(("embed", "mlp")) and n < sizes(model.config)[axis]}
    assert cut and all(n % 12 == 0 for n in cut.values())


def test_the_plan_says_what_the_time_has_shortened():
    assert [*in_time(Sensitivity({}, {}, 128, 128), 1.0), *fewer_scores(900, 900)] == []
    (line,) = in_time(Sensitivity({}, {}, 24, 128), 1.0)
    assert line.startswith("sensitivity: measured on 24 of 128 rows, ")
    _, late = in_time(Sensitivity({}, {}, 8, 128), -65.0)
    assert late.startswith("warning: with 8 rows for the sensitivity the plan takes 1:05 more than a quarter")
    (line,) = fewer_scores(625, 1000)
    assert line.startswith("scores: on 625 of 1000 test rows, so that") and line.endswith("uncertain by 2 points")
    (line,) = fewer_scores(100, 1000)
    assert line.startswith("scores: on 100 of 1000 test rows, the fewest")
    assert [*fewer_steps(GOAL, Fitted({}, 60.0, Scale(1.0, 3.0), 60.0), 0.0)] == []
    short = Fitted({}, 60.0, Scale(1.2, 0.1), 3600.0)
    (line,) = fewer_steps(GOAL._replace(keep=0.9), short, 61.0)
    assert line.endswith("all of them take 248 minutes (--minutes)")  # four times, as a student has a quarter
    (line,) = fewer_steps(GOAL, short._replace(scale=Scale(1.2, 0.07)), 61.0)
    assert line.startswith("warning: steps: 100% of those aimed at for the image side and 7% for the language model; ")
    (line,) = fewer_steps(GOAL, short, 61.0)
    assert line == (
        "steps: 100% of those aimed at for the image side and 10% for the language model; all of them take 62 minutes"
        " (--minutes)"
    )


def test_a_large_model_answers_fewer_held_out_rows_of_a_short_plan(monkeypatch):
    class Rows(list):
        @property
        def totals(self):
            return {"text": 300, "answer": 60, "slots": 15}

    rows, rate = Rows(range(30)), 1e12
    monkeypatch.setattr("experiments.auto.look.matmul_rate", lambda dtype: rate)
    for model in ("llava-1.5-7b", "antgmm-5b"):  # texts of the second, with an encoder, hold no answer
        config = preset(model)
        length, slots = (10 if config.encoder_decoder else 8), 0.5
        size = (length, 2) if config.encoder_decoder else (length + 2, 0)
        flops = sum(pruning.forward_flops(config, 1, *size, slots=slots, logits=2).values())
        assert rows_in(26.5 * flops / (forecast.SHARE * rate), config, rows, "float32") == 26
        assert rows_in(1.0, config, rows, "float32") == FEWEST == 24
        assert rows_in(1e9, config, rows, "float32") == rows_in(inf, config, rows, "float32") == 30


def test_a_plan_takes_as_many_rows_as_its_time_and_the_disk_allow(tmp_path, monkeypatch):
    directory = save_llava(tmp_path / "teacher")
    config, processor = whole(directory).config, load_processor(directory)
    records = source("s", "train", 2000)
    looks = {"prompt": 20, "answer": 4, "slots": 1.0, "read": 0.01, "unread": 2000}
    monkeypatch.setattr(amount, "load_records", lambda data: records)
    monkeypatch.setattr(forecast, "look_at", lambda *_: looks)
    monkeypatch.setattr(forecast, "matmul_rate", lambda dtype: 1e15)
    data = {**GOAL.data, "samples": 2000}
    tables = base(GOAL._replace(model=str(directory)), data, {**GOAL.test, "samples": 8})
    recipe = draft(tables)

    def rows(minutes=30.0, free=10**12, recipe=recipe):
        monkeypatch.setattr(amount.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
        return affordable(GOAL._replace(minutes=minutes), recipe, config, processor, tmp_path)

    assert rows() == (2000, "")
    fewer = rows(minutes=1.0)  # a quarter of a minute reads 1 500 rows of 10 ms
    assert fewer.rows == pytest.approx(1500, abs=2) and "1500 of 2000" in fewer.reason.replace("1499", "1500")
    each = config.image_tokens * config.language.decoder.embed * 2
    full = rows(free=int(1200 * each / 0.8) + 1)
    assert full.rows == 1200 and "of disk" in full.reason
    assert rows(free=0).rows == 1000
    online = draft({**tables, "teacher": {**tables["teacher"], "mode": "online"}})
    assert rows(free=0, recipe=online) == (2000, "")
    for changes, lines in (((), 1), (("data.samples=2000",), 0), (("data.take=first",), 0)):
        written = {**tables, "data": dict(tables["data"])}
        assert len(plan._amount(GOAL._replace(minutes=1.0, changes=changes), written, tmp_path / "none")) == lines
        assert (written["data"].get("take") == "spread") == bool(lines)
    looks["unread"] = 0
    assert rows(minutes=1.0) == (2000, "")
    looks["slots"] = 0.0  # rows without images that are encoded already cost nothing
    assert rows(minutes=1.0, free=0) == (2000, "")


def test_the_longest_answer_of_a_conversation_is_its_last_one(tmp_path):
    teacher = save_llava(tmp_path / "teacher")
    config, processor = whole(teacher).config, load_processor(teacher)
    turns = (Turn("user", (None, "what?")), Turn("assistant", ("a pill " * 20,)), Turn("user", ("is it red?",)))
    (one,) = source("s", "train", 1)
    samples = Samples([replace(one, turns=turns, answer="yes")], processor, config)
    assert samples.rows.index.earlier[0] > 40
    assert longest_answer(samples) == 8


def test_a_decoder_keeps_three_layers():
    assert fewest_layers(CONFIGS["llava"]) == fewest_layers(preset("blip2-opt-tiny")) == {"text/layers": 3}
    two = pruning.planned_config(CONFIGS["llava"], {"text/layers": 2})
    assert fewest_layers(two) == {"text/layers": 2}
    assert fewest_layers(CONFIGS["blip2_t5"]) == {}
    assert fewest_layers(pruning.planned_config(CONFIGS["llava"], {"text/layers": 1})) == {}


def test_an_image_side_that_no_row_trains_keeps_its_size():
    config = CONFIGS["llava"]
    present = unseen(config, SimpleNamespace(totals={"slots": 0}))
    assert {axis: sizes(config)[axis] for axis in present} == present
    assert {"vision/layers", "vision/embed"} <= {*present}
    chosen = pruning.search(config, total_parameters, 0.5 * total_parameters(config), pins=present).sizes
    assert {axis: chosen[axis] for axis in present} == present and chosen["text/embed"] < sizes(config)["text/embed"]
    assert unseen(config, SimpleNamespace(totals={"slots": 1})) == {}


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ("stage.image.recover_steps=3", "image"),
        (" stage.settle.loss={}", "settle"),
        ("stages.a=1", None),
        ("seed=1", None),
    ],
)
def test_a_change_names_its_stage(change, stage):
    assert stage_of(change) == stage


@pytest.mark.parametrize(("changes", "expected"), [((), "bfloat16"), (("export.dtype=float32",), "float32")])
def test_a_plan_for_a_latency_measures_in_the_dtype_that_its_report_times(monkeypatch, changes, expected):
    used = []
    monkeypatch.setattr(searching, "compute_dtype", lambda stored: stored)
    monkeypatch.setattr(sizing, "_sensitivity", lambda *_: Sensitivity({}, {}, 1, 1))
    monkeypatch.setattr(sizing, "longest_request", lambda samples: (RequestSize(40, 8), {}))
    monkeypatch.setattr(sizing, "calibrate", lambda config, request, prompt, dtype: used.append(dtype))
    monkeypatch.setattr(sizing, "time_request", lambda config, *, prompt, answer, dtype: used.append(dtype) or 7.0)
    monkeypatch.setattr(
        sizing, "by_latency", lambda config, *rest: (SimpleNamespace(sized="sized", measured=rest[-1](config)), [])
    )
    teacher, trained = SimpleNamespace(config=CONFIGS["llava"]), SimpleNamespace(totals={"slots": 1})
    seen = SimpleNamespace(teacher=teacher, trained=trained, held=None)
    goal = GOAL._replace(smaller=0.0, latency_ms=9.0, changes=changes)
    assert sizing.chosen(goal, seen, 0, "float32", 1.0).milliseconds == 7.0
    assert used == [expected, expected]
