"""Packed rows: every sample once, none cut, the same at every start."""

import json

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from data.packing import pack, packed, packed_batches
from data.shifting import shifted

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 20, 101)


def toy(rows=10):
    """LLaVA-like arrays: two image tokens (9), prompts and answers of different lengths."""
    prompt, answer = np.arange(rows) % 3 + 3, np.arange(rows) % 2 + 1
    at = np.arange(8)
    ids = np.where(at < 2, 9, 10 * (np.arange(rows)[:, None] + 1) + at)
    mask = at < (prompt + answer)[:, None]
    slots = np.arange(2) < answer[:, None]
    positions = (prompt - 1)[:, None] + np.arange(2)
    return {
        "images": np.arange(rows * 12, dtype=np.uint8).reshape(rows, 2, 2, 3),
        "input_ids": np.where(mask, ids, 0).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "positions": np.where(slots, positions, 0).astype(np.int32),
        "targets": np.where(slots, np.take_along_axis(ids, positions + 1, axis=1), -100).astype(np.int32),
    }


def test_every_sample_has_a_place_and_no_row_is_too_long():
    rows = pack(LENGTHS, 64, seed=3)
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(101))
    assert np.where(rows >= 0, LENGTHS[rows], 0).sum(axis=1).max() <= 64
    assert rows.shape[1] == round(64 / LENGTHS.mean())
    # Room for a sample is used.
    assert len(rows) < 1.2 * LENGTHS.sum() / 64
    # Samples stand first, -1 behind them.
    assert (np.diff((rows < 0).astype(int), axis=1) >= 0).all()
    np.testing.assert_array_equal(pack(LENGTHS, 64, seed=3), rows)
    assert not np.array_equal(pack(LENGTHS, 64, seed=4)[: len(rows) - 2], rows[: len(rows) - 2])


def test_a_sample_joins_the_first_row_that_has_room():
    # Whatever the order, 5 + 3 fill a row of 8, and so do 4 + 4.
    rows = pack(np.array([5, 3]), 8, seed=0)
    assert sorted(rows[0]) == [0, 1] and len(rows) == 1
    assert len(pack(np.array([4, 4, 4, 4]), 8, seed=0)) == 2
    # 6 and 5 do not share a row of 8.
    assert pack(np.array([6, 5]), 8, seed=0).tolist() in ([[0], [1]], [[1], [0]])


def test_rows_by_hand():
    arrays = toy(3)  # 3 + 1, 4 + 2 and 5 + 1 tokens
    arrays["views"] = np.arange(12.0).reshape(3, 2, 2)
    batch = packed(arrays, np.array([[2, 0], [1, -1]]), 12)
    np.testing.assert_array_equal(batch["segment_ids"], [[1] * 6 + [2] * 4 + [0] * 2, [1] * 6 + [0] * 6])
    np.testing.assert_array_equal(batch["attention_mask"], batch["segment_ids"] > 0)
    np.testing.assert_array_equal(batch["input_ids"][0], [9, 9, 32, 33, 34, 35, 9, 9, 12, 13, 0, 0])
    # Sample 2's answer is its token 5, told at 4; sample 0's its token 3, told at 2, which is 8 in the row.
    np.testing.assert_array_equal(batch["positions"], [[4, 0, 8, 0], [3, 4, 0, 0]])
    np.testing.assert_array_equal(batch["targets"], [[35, -100, 13, -100], [24, 25, -100, -100]])
    np.testing.assert_array_equal(batch["images"][0], arrays["images"][[2, 0]])
    np.testing.assert_array_equal(batch["views"][:, 0], arrays["views"][[2, 1]])
    np.testing.assert_array_equal(batch["index"], [[2, 0], [1, -1]])


@pytest.mark.parametrize("size", [2, 3])
def test_every_epoch_sees_each_sample_once_in_another_order(size):
    arrays = toy(20)
    run = packed_batches(arrays, size=size, seed=5, width=13)
    batches = len(pack(arrays["attention_mask"].sum(axis=1), 13, seed=5)) / size
    epochs = [np.concatenate([next(run)["index"] for _ in range(int(np.ceil(batches)))]) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch[epoch >= 0]), np.arange(20))
    assert not np.array_equal(epochs[0], epochs[1])


def test_an_epoch_holds_the_samples_asked_for_as_often():
    arrays, wanted = toy(10), np.array([1, 3, 3, 7, 8, 8, 8])
    run = packed_batches(arrays, size=2, seed=5, width=13, rows=wanted)
    rows = len(pack(arrays["attention_mask"].sum(axis=1)[wanted], 13, seed=5))
    found = [next(run) for _ in range(-(-rows // 2))]
    index = np.concatenate([batch["index"] for batch in found])
    np.testing.assert_array_equal(np.sort(index[index >= 0]), wanted)
    for batch in found:
        for sample, image in zip(batch["index"].ravel(), batch["images"].reshape(-1, 2, 2, 3), strict=True):
            assert sample < 0 or np.array_equal(image, arrays["images"][sample])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_run_sees_the_same_batches(prefetch):
    options = {"size": 2, "seed": 1, "width": 13, "prefetch": prefetch}
    whole, seen = packed_batches(toy(20), **options), []
    for _ in range(9):
        position = json.loads(json.dumps(whole.position))
        seen.append((position, next(whole)))
    again = packed_batches(toy(20), **options)
    again.seek(seen[4][0])
    for _, expected in seen[4:]:
        found = next(again)
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name])


def test_what_finishes_a_batch_is_given_pictures_by_row():
    def finish(batch):
        assert batch["images"].shape == (2, slots, 2, 2, 3)
        return {"images": {"pixels": batch["images"]}, "index": batch["index"]}

    slots = pack(toy(20)["attention_mask"].sum(axis=1), 13, seed=0).shape[1]
    batch = next(packed_batches(toy(20), size=2, seed=0, width=13, finish=finish, prefetch=0))
    here = batch["index"] >= 0
    np.testing.assert_array_equal(batch["images"]["valid"], here)
    np.testing.assert_array_equal(batch["images"]["pixels"][here], toy(20)["images"][batch["index"][here]])


def test_bad_requests_are_refused():
    with pytest.raises(AntgmmError, match="pack = 5 but a sample has 6 tokens: raise pack"):
        packed_batches(toy(4), size=1, seed=0, width=5)
    with pytest.raises(AntgmmError, match="a batch of 9 rows of 13 tokens needs more samples: the data fills"):
        packed_batches(toy(4), size=9, seed=0, width=13)


def test_shifted_pictures_stand_at_their_own_samples():
    arrays = {**toy(), "images": np.random.default_rng(0).integers(0, 256, (10, 6, 6, 3), np.uint8)}
    about = {"size": 2, "seed": 1, "width": 14}
    still, moving = packed_batches(arrays, **about), packed_batches(arrays, **about, shift=1)
    every = np.array([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)])
    moved = 0
    for _ in range(5):
        before, batch = next(still), next(moving)
        for name in before.keys() - {"images"}:
            np.testing.assert_array_equal(batch[name], before[name])
        for place in np.argwhere(batch["index"] >= 0):
            image, view = before["images"][*place], batch["images"][*place]
            assert any(np.array_equal(view, each) for each in shifted(image[None].repeat(9, 0), every))
            moved += not np.array_equal(view, image)
    assert moved > 10


def test_each_sample_of_a_row_is_given_the_features_of_one_of_its_own_views():
    arrays = {**toy(), "views": np.random.default_rng(0).normal(size=(10, 3, 5))}
    del arrays["images"]
    given = packed_batches(arrays, size=2, seed=1, width=14)
    found = {sample: set() for sample in range(10)}
    for _ in range(100):
        batch = next(given)
        assert "views" not in batch
        for place in np.argwhere(batch["index"] >= 0):
            sample = batch["index"][*place]
            (view,) = np.flatnonzero((arrays["views"][sample] == batch["vision_features"][*place]).all(axis=1))
            found[int(sample)].add(int(view))
    assert all(views == {0, 1, 2} for views in found.values())
