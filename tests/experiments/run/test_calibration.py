"""Batches before training: in proportion to the rows with few and many image slots, and some always have images."""

import numpy as np
import pytest

from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from data.record import Record
from experiments.run.calibration import apportioned, calibration_batches
from experiments.run.rows.samples import Samples
from tests.experiments.tiny import save_llava, save_smolvlm


@pytest.mark.parametrize(
    ("rows", "batches", "images", "expected"),
    [
        ([10], 4, 1, [4]),
        ([50, 50], 3, 2, [2, 1]),
        ([1, 99], 4, 1, [1, 3]),  # rounded down to none
        ([1, 99], 1, 1, [1, 0]),
        ([99, 1], 4, 2, [4, 0]),  # the second group is not the only one with images
        ([99, 1], 4, 0, [4, 0]),
        ([20, 30, 50], 10, 3, [2, 3, 5]),
        ([24, 33, 43], 4, 3, [1, 1, 2]),  # 0.96, 1.32, 1.72
    ],
)
def test_groups_get_batches_in_proportion_to_their_rows_and_images_at_least_one(rows, batches, images, expected):
    assert apportioned(rows, batches, images) == expected


@pytest.mark.parametrize("save", [save_llava, save_smolvlm], ids=["a slot a picture", "slots of tiles"])
def test_few_rows_with_pictures_are_in_the_batches_of_every_seed(tmp_path, save):
    directory, rng = save(tmp_path / "model"), np.random.default_rng(0)
    config, _ = load_hf(directory)
    picture = rng.integers(0, 256, (40, 40, 3), np.uint8)
    seen = Record(images=(picture,), question="what is shown?", text="", answer="five")
    blind = Record(images=(), question="what is two and three?", text="", answer="five")
    samples = Samples([*[blind] * 30, *[seen] * 2], load_processor(directory), config)
    for seed in range(3):
        batches = calibration_batches(samples, batch_size=4, batches=3, seed=seed)
        used = [int(np.asarray(batch["images"]["valid"]).any(axis=1).sum()) for batch in batches]
        assert used == [4, 0, 0]  # both rows, twice each
        assert all(np.asarray(batch["attention_mask"]).shape[0] == 4 for batch in batches)


def test_one_row_of_many_tiles_does_not_stand_for_all(tmp_path):
    directory, rng = save_smolvlm(tmp_path / "model"), np.random.default_rng(0)
    config, _ = load_hf(directory)
    wide, square = (rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((16, 160), (64, 64)))
    small, large = (Record(images=each, question="what?", text="", answer="five") for each in ((wide,), (square,) * 4))
    samples = Samples([*[small] * 9, large], load_processor(directory), config)
    assert samples.needs.slots.tolist() == [*[3] * 9, 20]
    (batch,) = calibration_batches(samples, batch_size=4, batches=1, seed=0)
    assert np.asarray(batch["images"]["valid"]).sum(axis=1).tolist() == [3] * 4
