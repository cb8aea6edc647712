"""The order of batches: complete, deterministic, resumable, bucketed."""

import json
from itertools import islice

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from data.batches import batches, cuts, lengths
from data.shifting import shifted


def toy(rows=10, widths=8):
    """T5-like arrays whose answers have 1 to `widths` tokens."""
    count = np.arange(rows) % widths + 1
    targets = np.where(np.arange(widths) < count[:, None], np.arange(rows)[:, None], -100).astype(np.int32)
    return {
        "input_ids": np.arange(rows * 4, dtype=np.int32).reshape(rows, 4),
        "attention_mask": np.ones((rows, 4), np.int32),
        "decoder_input_ids": np.zeros((rows, widths), np.int32),
        "labels": targets.copy(),
        "positions": np.tile(np.arange(widths, dtype=np.int32), (rows, 1)),
        "targets": targets,
    }


@pytest.mark.parametrize("widths", [(), (3, 8)])
def test_every_epoch_visits_each_row_once(widths):
    run = batches(toy(12), size=3, seed=5, widths=widths)
    epochs = [np.concatenate([next(run)["index"] for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("widths", [(), (3, 8)])
def test_an_epoch_visits_the_rows_asked_for_as_often(widths):
    arrays, wanted = toy(12), np.array([0, 4, 4, 9, 9, 11])
    found = [*islice(batches(arrays, size=3, seed=5, widths=widths, rows=wanted), 2)]
    np.testing.assert_array_equal(np.sort(np.concatenate([batch["index"] for batch in found])), wanted)
    for batch in found:
        np.testing.assert_array_equal(batch["input_ids"], arrays["input_ids"][batch["index"]])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("widths", [(), (2, 5, 8)])
def test_a_resumed_run_sees_the_same_batches(widths, prefetch):
    arrays = toy(11)
    whole = batches(arrays, size=4, seed=1, widths=widths, prefetch=prefetch)
    seen = []
    for _ in range(9):
        position = json.loads(json.dumps(whole.position))
        seen.append((position, next(whole)))
    assert seen[5][0] == {"next_index": 5}
    again = batches(arrays, size=4, seed=1, widths=widths, prefetch=prefetch)
    again.seek(seen[5][0])
    for _, expected in seen[5:]:
        found = next(again)
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name])


def test_pictures_are_shifted_anew_whenever_they_are_seen_and_alike_after_a_restart():
    rng = np.random.default_rng(0)
    arrays = {**toy(6), "images": rng.integers(0, 256, (6, 8, 8, 3), np.uint8)}
    run = batches(arrays, size=3, seed=4, shift=1)
    seen = [next(run) for _ in range(20)]
    moves = {row: set() for row in range(6)}
    every = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    for batch in seen:
        for row, image in zip(batch["index"], batch["images"], strict=True):
            views = shifted(arrays["images"][[row] * 9], np.array(every))
            (move,) = [place for place, view in enumerate(views) if np.array_equal(view, image)]
            moves[int(row)].add(move)
        np.testing.assert_array_equal(batch["input_ids"], arrays["input_ids"][batch["index"]])
    assert all(len(found) > 2 for found in moves.values())
    again = batches(arrays, size=3, seed=4, shift=1, prefetch=0)
    again.seek({"next_index": 13})
    np.testing.assert_array_equal(next(again)["images"], seen[13]["images"])


def test_of_computed_views_one_is_drawn_whenever_a_row_is_seen():
    arrays = {**toy(6), "views": np.arange(6 * 4 * 2.0).reshape(6, 4, 2)}
    run = batches(arrays, size=3, seed=4)
    found = {row: set() for row in range(6)}
    for _ in range(40):
        batch = next(run)
        for row, features in zip(batch["index"], batch["vision_features"], strict=True):
            (view,) = np.flatnonzero((arrays["views"][row] == features).all(axis=1))
            found[int(row)].add(int(view))
    assert "views" not in batch
    assert all(views == {0, 1, 2, 3} for views in found.values())


def test_rows_stay_together_and_another_seed_gives_another_order():
    arrays = toy(12)
    one, two = batches(arrays, size=3, seed=0), batches(arrays, size=3, seed=1)
    first, other = next(one), next(two)
    np.testing.assert_array_equal(first["input_ids"], arrays["input_ids"][first["index"]])
    orders = [np.concatenate([next(run)["index"] for _ in range(3)]) for run in (one, two)]
    assert not np.array_equal(orders[0], orders[1])
    assert first["index"].dtype == other["index"].dtype == np.int32


def test_buckets_cut_padding_only():
    arrays = toy(64)
    run = batches(arrays, size=4, seed=0, widths=(3, 8))
    shapes = []
    for _ in range(16):
        batch = next(run)
        shapes.append(batch["targets"].shape[1])
        full = arrays["targets"][batch["index"]]
        np.testing.assert_array_equal(batch["targets"], full[:, : shapes[-1]])
        assert (full[:, shapes[-1] :] == -100).all()
        assert batch["labels"].shape == batch["decoder_input_ids"].shape == batch["positions"].shape
        assert batch["input_ids"].shape == (4, 4)
    assert shapes.count(3) == 6  # 24 of 64 rows have at most 3 answer tokens


def test_prompts_are_cut_by_themselves():
    arrays = toy(64)
    arrays["attention_mask"] = (np.arange(4) < np.tile([2, 2, 3, 4], 16)[:, None]).astype(np.int32)
    run = batches(arrays, size=4, seed=0, widths=(3, 8), prompts=(2, 4))
    shapes = set()
    for _ in range(16):
        batch = next(run)
        length = batch["input_ids"].shape[1]
        shapes.add((length, batch["targets"].shape[1]))
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(batch[name], arrays[name][batch["index"], :length])
        assert not arrays["attention_mask"][batch["index"], length:].any()
        assert batch["labels"].shape == batch["decoder_input_ids"].shape == batch["targets"].shape
    assert shapes == {(2, 3), (2, 8), (4, 3), (4, 8)}


def test_llava_is_cut_along_the_input():
    arrays = {name: value for name, value in toy(4).items() if name != "decoder_input_ids"}
    arrays["attention_mask"] = np.array([[1, 1, 0, 0]] * 4, np.int32)
    arrays["labels"] = np.full((4, 4), -100, np.int32)
    (by_row,) = cuts(arrays, (2, 4))
    cut = by_row(arrays, np.arange(4))
    assert cut["input_ids"].shape == cut["labels"].shape == (4, 2)
    assert cut["targets"].shape == arrays["targets"].shape
    np.testing.assert_array_equal(lengths(arrays), [2, 2, 2, 2])


def test_finish_is_the_last_step():
    run = batches(toy(4), size=2, seed=0, finish=lambda batch: {"rows": batch["index"] * 10})
    assert sorted(np.concatenate([next(run)["rows"], next(run)["rows"]])) == [0, 10, 20, 30]


def test_bad_requests_are_refused():
    with pytest.raises(AntgmmError, match="a batch of 5 needs as many rows; the data has 4"):
        batches(toy(4), size=5, seed=0)
    with pytest.raises(AntgmmError, match="equally many rows"):
        batches({**toy(4), "images": np.zeros((3, 1))}, size=2, seed=0)
    with pytest.raises(AntgmmError, match="widest length bucket is 4 but a row has 8 tokens"):
        batches(toy(8), size=2, seed=0, widths=(2, 4))
