"""Batches: their order is complete, deterministic, resumable and bucketed; their contents by hand."""

import json
from itertools import islice
from threading import Barrier

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from data import collate
from data.batching import Plan, batches, sequential_batches
from data.making import ImageOptions, batch, in_threads
from data.shifting import shifted
from tests.data.toy import LLAMA, T5, ToyViews, toy


def rows_of(count=10, widths=8, prompts=(4,), pictures=(1,), side=2):
    """T5-like rows with answers of 1 to `widths` tokens."""
    numbers = np.arange(count)
    return toy(*(np.resize(each, count) for each in (prompts, numbers % widths + 1, pictures)), side=side)


def run(rows, size, seed, *, buckets=(), prompt_buckets=(), about=T5, seen=None, **more):
    """Shuffled batches of rows, made as `Samples` makes them."""
    needs, seen = rows.needs(about), seen or ImageOptions()
    widths = collate.widths(needs, about.apart, buckets=buckets, prompt_buckets=prompt_buckets)

    def make(index, rng):
        choices = seen.choices(rng, index.shape)
        return batch(rows, index, about, widths.holds(needs.of(index)), seen=seen, choices=choices)

    return batches(make, widths.groups(needs), size=size, seed=seed, **more)


def leaves(made):
    """All arrays of a batch by path."""
    return {**{n: x for n, x in made.items() if n != "images"}, **{f"images/{n}": x for n, x in made["images"].items()}}


def assert_equal(actual, expected):
    one, other = leaves(actual), leaves(expected)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("widths", [(), (3, 8)])
def test_every_epoch_visits_each_row_once(widths):
    made = run(rows_of(12), 3, 5, buckets=widths)
    epochs = [np.concatenate([next(made)["index"] for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("widths", [(), (3, 8)])
def test_an_epoch_visits_each_row_as_often_as_requested(widths):
    rows, wanted = rows_of(12), np.array([0, 4, 4, 9, 9, 11])
    epoch = [*islice(run(rows, 3, 5, buckets=widths, visits=wanted), 2)]
    np.testing.assert_array_equal(np.sort(np.concatenate([each["index"] for each in epoch])), wanted)
    for each in epoch:
        np.testing.assert_array_equal(each["input_ids"][:, :4], [rows[row]["prompt"] for row in each["index"]])


@pytest.mark.parametrize(("prefetch", "threads"), [(0, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("widths", [(), (2, 5, 8)])
def test_a_resumed_run_sees_the_same_batches(widths, prefetch, threads):
    rows = rows_of(11, pictures=(1, 0, 3), side=6)
    about = {"buckets": widths, "prefetch": prefetch, "threads": threads, "seen": ImageOptions(shift=1)}
    whole = run(rows, 4, 1, **about)
    seen = []
    for _ in range(9):
        position = json.loads(json.dumps(whole.position))
        seen.append((position, next(whole)))
    assert seen[5][0] == {"next_index": 5}
    again = run(rows, 4, 1, **about)
    again.seek(seen[5][0])  # the middle of the third epoch
    for _, expected in seen[5:]:
        assert_equal(next(again), expected)


@pytest.mark.parametrize("about", [T5, LLAMA], ids=["apart", "joined"])
def test_rows_with_zero_one_and_several_pictures_share_a_batch(about):
    rows = toy([3, 2, 1], [2, 1, 3], [2, 0, 1])
    made = batch(rows, np.array([2, 0, 1]), about, collate.Shape(8, 4, 2))
    images = {
        "valid": [[1, 0], [1, 1], [0, 0]],
        "pixels": np.stack(
            [
                [rows[2]["images"]["pixels"][0], 0 * rows[2]["images"]["pixels"][0]],
                rows[0]["images"]["pixels"],
                np.zeros((2, 2, 2, 3)),
            ]
        ),
        "scale": [[[3] * 3, [0] * 3], [[1] * 3, [1] * 3], [[0] * 3, [0] * 3]],
    }
    assert {name: leaf.dtype for name, leaf in made["images"].items()} == {
        "valid": bool,
        "pixels": np.uint8,
        "scale": np.float32,
    }
    for name, expected in images.items():
        np.testing.assert_array_equal(made["images"][name], expected)
    no = -100
    targets = [[202, 203, 204, no], [4, 5, no, no], [103, no, no, no]]
    if about.apart:
        expected = {
            "input_ids": [[201] + [0] * 7, [1, 2, 3] + [0] * 5, [101, 102] + [0] * 6],
            "decoder_input_ids": [[0, 202, 203, 0], [0, 4, 0, 0], [0, 0, 0, 0]],
            "labels": targets,
            "positions": [[0, 1, 2, 3]] * 3,
        }
        mask = [[1] + [0] * 7, [1] * 3 + [0] * 5, [1] * 2 + [0] * 6]
    else:
        expected = {
            "input_ids": [[201, 202, 203, 204] + [0] * 4, [1, 2, 3, 4, 5] + [0] * 3, [101, 102, 103] + [0] * 5],
            "labels": [[no, 202, 203, 204] + [no] * 4, [no] * 3 + [4, 5] + [no] * 3, [no, no, 103] + [no] * 5],
            "positions": [[0, 1, 2, 0], [2, 3, 0, 0], [1, 0, 0, 0]],
        }
        mask = [[1] * 4 + [0] * 4, [1] * 5 + [0] * 3, [1] * 3 + [0] * 5]
    expected |= {"attention_mask": mask, "targets": targets, "index": [2, 0, 1]}
    assert {*made} == {*expected, "images"}
    for name, value in expected.items():
        np.testing.assert_array_equal(made[name], value)
        assert made[name].dtype == np.int32


def test_shifts_differ_between_visits_and_repeat_after_a_restart():
    rows = rows_of(6, pictures=(1, 2), side=8)
    made = run(rows, 3, 4, seen=ImageOptions(shift=1))
    seen = [next(made) for _ in range(20)]
    moves = {row: set() for row in range(6)}
    every = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    for each in seen:
        for place, row in enumerate(each["index"]):
            pixels = rows[row]["images"]["pixels"]
            views = np.stack([shifted(pixels, np.tile(move, (len(pixels), 1))) for move in every])
            shown = each["images"]["pixels"][place][: len(pixels)]
            (move,) = [number for number, view in enumerate(views) if np.array_equal(view, shown)]
            moves[int(row)].add(move)
            np.testing.assert_array_equal(each["input_ids"][place][:4], rows[row]["prompt"])
    assert all(len(shifts) > 2 for shifts in moves.values())
    again = run(rows, 3, 4, seen=ImageOptions(shift=1), prefetch=0)
    again.seek({"next_index": 13})
    np.testing.assert_array_equal(next(again)["images"]["pixels"], seen[13]["images"]["pixels"])


def test_each_visit_of_a_row_draws_one_computed_view():
    rows = rows_of(6, pictures=(1, 2))
    views = ToyViews(np.random.default_rng(0).normal(size=(4, count, 3, 2)) for count in (1, 2) * 3)
    made = run(rows, 3, 4, seen=ImageOptions(views=views))
    drawn = {row: set() for row in range(6)}
    for _ in range(40):
        each = next(made)
        assert {*each["images"]} == {"valid"} and each["vision_features"].shape == (3, 2, 3, 2)
        for row, features, valid in zip(each["index"], each["vision_features"], each["images"]["valid"], strict=True):
            count = 1 + row % 2
            np.testing.assert_array_equal(valid, np.arange(2) < count)
            assert not features[count:].any()
            (view,) = np.flatnonzero((views.features[row] == features[:count]).all(axis=(1, 2, 3)))
            drawn[int(row)].add(int(view))
    assert all(views == {0, 1, 2, 3} for views in drawn.values())
    both = next(run(rows, 3, 4, seen=ImageOptions(views=views, pictures=True)))
    assert {*both["images"]} == {"valid", "pixels", "scale"} and "vision_features" in both


def test_arrays_of_a_row_stay_together_and_the_seed_sets_the_order():
    rows = rows_of(12)
    one, two = run(rows, 3, 0), run(rows, 3, 1)
    first, other = next(one), next(two)
    for place, row in enumerate(first["index"]):
        np.testing.assert_array_equal(first["input_ids"][place][:4], rows[row]["prompt"])
        np.testing.assert_array_equal(first["images"]["pixels"][place], rows[row]["images"]["pixels"])
    orders = [np.concatenate([next(made)["index"] for _ in range(3)]) for made in (one, two)]
    assert not np.array_equal(orders[0], orders[1])
    assert first["index"].dtype == other["index"].dtype == np.int32


def test_buckets_cut_padding_only():
    rows = rows_of(64)
    whole = batch(rows, np.arange(64), T5, collate.Shape(8, 8, 1))
    made = run(rows, 4, 0, buckets=(3,))
    shapes = []
    for _ in range(16):
        each = next(made)
        shapes.append(each["targets"].shape[1])
        full = whole["targets"][each["index"]]
        np.testing.assert_array_equal(each["targets"], full[:, : shapes[-1]])
        assert (full[:, shapes[-1] :] == -100).all()
        assert each["labels"].shape == each["decoder_input_ids"].shape == each["positions"].shape
        assert each["input_ids"].shape == (4, 8)
    assert shapes.count(3) == 6  # 24 of 64 rows have at most 3 answer tokens
    assert {*shapes} == {3, 8}


def test_prompts_have_their_own_buckets():
    rows = rows_of(64, prompts=(2, 2, 3, 4))
    whole = batch(rows, np.arange(64), T5, collate.Shape(8, 8, 1))
    made = run(rows, 4, 0, buckets=(3,), prompt_buckets=(2,))
    shapes = set()
    for _ in range(16):
        each = next(made)
        length = each["input_ids"].shape[1]
        shapes.add((length, each["targets"].shape[1]))
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(each[name], whole[name][each["index"], :length])
        assert not whole["attention_mask"][each["index"], length:].any()
        assert each["labels"].shape == each["decoder_input_ids"].shape == each["targets"].shape
    assert shapes == {(2, 3), (2, 8), (8, 3), (8, 8)}


def test_buckets_cover_text_length_and_picture_slots():
    rows = rows_of(96, pictures=(0, 1, 2, 3, 5, 5))
    made, shapes = run(rows, 2, 0, buckets=(3,)), []
    for _ in range(48):
        each = next(made)
        count = [len(rows[row]["images"]["pixels"]) for row in each["index"]]
        np.testing.assert_array_equal(each["images"]["valid"].sum(axis=1), count)
        slots = each["images"]["pixels"].shape[1]
        assert max(count) <= slots <= max(1, 1.5 * max(count))
        shapes.append((slots, each["targets"].shape[1]))
    assert {*shapes} == {(slots, answer) for slots in (1, 2, 3, 5) for answer in (3, 8)}
    # These widths without buckets are one shape, so one program.
    assert {next(run(rows, 2, seed))["images"]["valid"].shape for seed in range(5)} == {(2, 5)}


def test_llava_buckets_follow_the_input_length():
    rows = toy([1, 2], [1, 1], [1, 1])
    widths = collate.widths(rows.needs(LLAMA), False, buckets=(2, 4))
    assert widths == ((2, 4, 8), (8,), (1,))
    made = batch(rows, np.array([0]), LLAMA, widths.holds(rows.needs(LLAMA).of(np.array([0]))))
    assert made["input_ids"].shape == made["labels"].shape == (1, 2)
    assert made["targets"].shape == (1, 8)
    np.testing.assert_array_equal(rows.needs(LLAMA).text, [2, 3])


def test_an_epoch_leaves_out_rows_of_every_group_in_turn():
    groups = np.array([0] * 100 + [1] * 3)  # of which 96 are six full batches, and the rest is less than a batch
    seen = set()
    for epoch in range(40):
        plan = Plan(groups, 16, 5)
        rows = np.concatenate([plan[epoch * plan.per_epoch + place] for place in range(plan.per_epoch)])
        assert len({*rows.tolist()}) == len(rows) == 96
        seen |= {*rows.tolist()}
    assert seen == {*range(103)}


def test_rows_with_few_image_slots_are_not_as_wide_as_those_with_many():
    needs = collate.Needs(*np.array([[30, 4, 9], [9, 3, 2], [70, 2, 40], [5, 1, 0], [61, 9, 1]]).T)
    alike = collate.Alike.of(needs, apart=False)
    # Slots 0 to 2, 9 and 40; text and answers up to the next multiple of 8.
    assert alike.shapes == ((64, 16, 2), (32, 8, 9), (72, 8, 40))
    assert alike.groups(needs).tolist() == [1, 0, 2, 0, 0]
    assert alike.holds(needs.of(np.array([1, 3]))) == (64, 16, 2)
    assert alike.holds(needs.of(np.array([0]))) == (32, 8, 9)
    # Leftover rows of two groups: the slots of one, and text and answers of the other.
    assert alike.holds(needs.of(np.array([0, 4]))) == (72, 16, 9)


def test_sequential_batches_visit_every_row_and_repeat_the_last():
    batches_of_rows = [index.tolist() for index in sequential_batches(np.array([3, 1, 2]), 2)]
    assert batches_of_rows == [[3, 1], [2, 2]]


def test_bad_requests_are_refused():
    with pytest.raises(AntgmmError, match="a batch of 5 needs at least as many rows, but the data has 4"):
        run(rows_of(4), 5, 0)
    with pytest.raises(AntgmmError, match="largest bucket is 4, but a row needs 8: add a bucket"):
        collate.Widths((8,), (2, 4), (1,)).groups(rows_of(8).needs(T5))


def test_pictures_of_a_batch_are_decoded_at_the_same_time(monkeypatch):
    rows, index = rows_of(count=6), np.array([4, 0, 5])
    shape = collate.widths(rows.needs(T5), T5.apart).holds(rows.needs(T5).of(index))
    expected = batch(rows, index, T5, shape)
    images, together = rows.images, Barrier(3, timeout=60)

    def decode(row):
        together.wait()  # until all three are being read
        return images(row)

    monkeypatch.setattr(rows, "images", decode)
    assert_equal(batch(rows, index, T5, shape, threads=3), expected)


def test_a_bad_picture_stops_the_batch_with_its_own_message():
    def decode(row):
        if row == 2:
            raise AntgmmError("row 2: not a picture")
        return row

    with pytest.raises(AntgmmError, match="row 2: not a picture"):
        in_threads(decode, 3, range(5))
