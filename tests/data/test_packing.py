"""Packed rows hold every sample once and whole, in the same order at every start."""

import json

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from data.making import ImageOptions
from data.packing import pack, packed, packed_batches, row_count
from data.shifting import shifted
from tests.data.test_batches import assert_equal
from tests.data.toy import LLAMA, ToyViews, toy

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 20, 101)
ONES = np.ones(101, int)


def rows_of(count=10, pictures=(1,), side=2):
    """LLaVA-like rows: prompts and answers of different lengths."""
    numbers = np.arange(count)
    return toy(numbers % 3 + 3, numbers % 2 + 1, np.resize(pictures, count), side=side)


def run(rows, size, seed, width, **more):
    """Shuffled packed batches, made as `Samples` makes them."""
    return packed_batches(
        rows, rows.needs(LLAMA), size=size, seed=seed, width=width, answer=2, own=np.arange(size), **more
    )


def test_every_sample_has_a_place_and_no_row_is_too_long():
    rows = pack(LENGTHS, ONES, 64, seed=3)
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(101))
    assert np.where(rows >= 0, LENGTHS[rows], 0).sum(axis=1).max() <= 64
    assert rows.shape[1] == round(64 / LENGTHS.mean())
    # Little room is left unused.
    assert len(rows) < 1.2 * LENGTHS.sum() / 64
    # Samples come first, then -1.
    assert (np.diff((rows < 0).astype(int), axis=1) >= 0).all()
    np.testing.assert_array_equal(pack(LENGTHS, ONES, 64, seed=3), rows)
    assert not np.array_equal(pack(LENGTHS, ONES, 64, seed=4)[: len(rows) - 2], rows[: len(rows) - 2])


def test_a_sample_joins_the_first_row_that_has_room():
    # In any order, 5 + 3 fill a row of 8, and 4 + 4 do as well.
    rows = pack(np.array([5, 3]), np.ones(2, int), 8, seed=0)
    assert sorted(rows[0]) == [0, 1] and len(rows) == 1
    assert len(pack(np.array([4, 4, 4, 4]), np.ones(4, int), 8, seed=0)) == 2
    # 6 and 5 do not share a row of 8.
    assert pack(np.array([6, 5]), np.ones(2, int), 8, seed=0).tolist() in ([[0], [1]], [[1], [0]])


def test_the_pictures_of_a_row_are_limited_by_the_average():
    slots = RNG.choice([0, 1, 9], 101)
    rows = pack(LENGTHS, slots, 64, seed=3)
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(101))
    most = np.where(rows >= 0, slots[rows], 0).sum(axis=1).max()
    assert most <= max(9, np.ceil(round(64 / LENGTHS.mean()) * slots.mean()))
    alike = pack(LENGTHS, ONES, 64, seed=3)
    assert most < np.where(alike >= 0, slots[alike], 0).sum(axis=1).max()


def test_rows_by_hand():
    rows = toy([3, 4, 5, 2], [1, 2, 1, 1], [1, 2, 1, 0])
    made = packed(rows, np.array([[2, 3, 0], [1, -1, -1]]), width=14, answer=2, slots=2)
    np.testing.assert_array_equal(made["segment_ids"], [[1] * 6 + [2] * 3 + [3] * 4 + [0], [1] * 6 + [0] * 8])
    np.testing.assert_array_equal(made["attention_mask"], made["segment_ids"] > 0)
    np.testing.assert_array_equal(
        made["input_ids"], [[*range(201, 207), *range(301, 304), *range(1, 5), 0], [*range(101, 107)] + [0] * 8]
    )
    # Sample 2's answer is its token 5, predicted at 4; sample 0's its token 3, predicted at 2, which is 11 in the row.
    np.testing.assert_array_equal(made["positions"], [[4, 0, 7, 0, 11, 0], [3, 4, 0, 0, 0, 0]])
    no = -100
    np.testing.assert_array_equal(made["targets"], [[206, no, 303, no, 4, no], [105, 106, no, no, no, no]])
    # Pictures are in the order of the samples; one sample has none.
    pixels = [[rows[2]["images"]["pixels"][0], rows[0]["images"]["pixels"][0]], rows[1]["images"]["pixels"]]
    np.testing.assert_array_equal(made["images"]["pixels"], np.stack(pixels))
    np.testing.assert_array_equal(made["images"]["scale"], np.array([[3, 1], [2, 2]])[:, :, None].repeat(3, axis=2))
    assert made["images"]["valid"].all()
    np.testing.assert_array_equal(made["slots"], [[1, 0, 1], [2, 0, 0]])
    np.testing.assert_array_equal(made["index"], [[2, 3, 0], [1, -1, -1]])


def test_a_row_without_samples_has_no_pictures():
    made = packed(rows_of(3), np.array([[-1, -1]]), width=8, answer=2, slots=2)
    assert made["images"]["pixels"].shape == (1, 2, 2, 2, 3) and not made["images"]["valid"].any()
    assert not made["attention_mask"].any() and (made["targets"] == -100).all()


@pytest.mark.parametrize("size", [2, 3])
def test_every_epoch_sees_each_sample_once_in_another_order(size):
    rows = rows_of(20)
    made = run(rows, size, 5, 13)
    count = len(pack(rows.needs(LLAMA).text, np.ones(20, int), 13, seed=5)) / size
    epochs = [np.concatenate([next(made)["index"] for _ in range(int(np.ceil(count)))]) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch[epoch >= 0]), np.arange(20))
    assert not np.array_equal(epochs[0], epochs[1])


def test_an_epoch_holds_each_sample_as_often_as_requested():
    rows, wanted = rows_of(10), np.array([1, 3, 3, 7, 8, 8, 8])
    made = run(rows, 2, 5, 13, visits=wanted)
    count = len(pack(rows.needs(LLAMA).text[wanted], np.ones(7, int), 13, seed=5))
    epoch = [next(made) for _ in range(-(-count // 2))]
    index = np.concatenate([each["index"] for each in epoch])
    np.testing.assert_array_equal(np.sort(index[index >= 0]), wanted)
    for each in epoch:
        for samples, pixels in zip(each["index"], each["images"]["pixels"], strict=True):
            for sample, image in zip(samples[samples >= 0], pixels, strict=False):
                np.testing.assert_array_equal(image, rows[sample]["images"]["pixels"][0])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_run_sees_the_same_batches(prefetch):
    rows = rows_of(20, (1, 0, 2), 6)
    options = {"size": 2, "seed": 1, "width": 13, "prefetch": prefetch, "seen": ImageOptions(shift=1)}
    whole, seen = run(rows, **options), []
    for _ in range(9):
        position = json.loads(json.dumps(whole.position))
        seen.append((position, next(whole)))
    again = run(rows, **options)
    again.seek(seen[4][0])
    for _, expected in seen[4:]:
        assert_equal(next(again), expected)


def test_bad_requests_are_refused():
    with pytest.raises(AntgmmError, match="pack = 5, but a sample has 6 tokens: increase pack"):
        run(rows_of(4), 1, 0, 5)
    with pytest.raises(AntgmmError, match="a batch of 9 rows of 13 tokens needs more samples: the data fills"):
        run(rows_of(4), 9, 0, 13)


def test_shifted_pictures_stay_with_their_samples():
    rows = rows_of(10, side=6)
    still, moving = run(rows, 2, 1, 14), run(rows, 2, 1, 14, seen=ImageOptions(shift=1))
    every = np.array([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)])
    moved = 0
    for _ in range(5):
        before, made = next(still), next(moving)
        for name in before.keys() - {"images"}:
            np.testing.assert_array_equal(made[name], before[name])
        for place in np.argwhere(before["images"]["valid"]):
            image, view = before["images"]["pixels"][*place], made["images"]["pixels"][*place]
            assert any(np.array_equal(view, each) for each in shifted(image[None].repeat(9, 0), every))
            moved += not np.array_equal(view, image)
    assert moved > 10


def test_each_sample_of_a_row_gets_features_of_one_of_its_views():
    rows, rng = rows_of(10), np.random.default_rng(0)
    views = ToyViews(rng.normal(size=(4, 1, 3, 5)) for _ in range(10))
    given = run(rows, 2, 1, 14, seen=ImageOptions(views=views))
    drawn = {sample: set() for sample in range(10)}
    for _ in range(100):
        made = next(given)
        assert {*made["images"]} == {"valid"}
        for samples, features in zip(made["index"], made["vision_features"], strict=True):
            for sample, view_features in zip(samples[samples >= 0], features, strict=False):
                (view,) = np.flatnonzero((views.features[sample][:, 0] == view_features).all(axis=(1, 2)))
                drawn[int(sample)].add(int(view))
    assert all(views == {0, 1, 2, 3} for views in drawn.values())


@pytest.mark.parametrize("enough", [1, 12, 20, 99])
def test_rows_are_counted_exactly_unless_fewer_are_enough(enough):
    exact = len(pack(LENGTHS, ONES, 64, seed=3))
    counted = row_count(LENGTHS, ONES, 64, seed=3, enough=enough)
    assert counted == exact if counted < enough else enough <= counted <= exact
