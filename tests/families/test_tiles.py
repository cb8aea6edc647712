"""Processors that split pictures into tiles: each tile has a slot, and tokens with its row and column."""

import numpy as np
import pytest

from antgmm_jax.families import inputs, new_processor
from tests.families.cases import FIRST, case_of, tokenizer
from tests.families.test_inputs import assert_computed, assert_pictures, picture, processed, text_of

SPLITTING = [one for one in FIRST if one[0] == "idefics3"]


@pytest.fixture(scope="module", params=SPLITTING, ids=" ".join)
def split(request, tmp_path_factory):
    """A case and its inputs with a processor that makes up to three tiles per side."""
    case = case_of(*request.param, tmp_path_factory.getbasetemp())
    processor = new_processor(case.config, tokenizer())
    processor.image_processor.do_image_splitting = True
    processor.image_processor.size = {"longest_edge": 3 * case.config.vision.image}
    return case, inputs(case.config, processor)


@pytest.mark.parametrize("sides", [[(16, 16)], [(50, 21)], [(19, 64), (40, 40)], []], ids=str)
def test_tiles_and_their_tokens_equal_the_processors(split, sides):
    (case, reads), images = split, [picture(*side) for side in sides]
    ids, tree = reads(text_of(reads, images), images)
    expected, theirs = processed(reads, images)
    np.testing.assert_array_equal(ids, expected)
    assert (ids == case.config.image_token).sum() == len(tree["pixels"]) * case.config.image_tokens
    if sides:
        assert len(tree["pixels"]) > len(sides)
        assert_pictures(case, reads, tree, theirs)


@pytest.mark.parametrize("side", [(40, 1), (40, 3), (1, 40), (3, 3), (1, 1)], ids=str)
def test_pictures_of_one_or_three_rows_keep_their_colour(split, side):
    _, reads = split
    colour = np.array([200, 90, 10], np.uint8)
    images = [np.broadcast_to(colour, (height, width, 3)).copy() for width, height in (side, side[::-1])]
    _, tree = reads(text_of(reads, images), images)
    # The processor pads a picture with black at its right and lower side.
    corner = tree["pixels"][:, 0, 0]
    np.testing.assert_array_equal(corner, np.broadcast_to(colour, corner.shape))
    inside = tree["pixels"].any(axis=-1)
    assert (tree["pixels"][inside] == colour).all()


def test_logits_of_tiles_equal_pytorchs(split):
    assert_computed(*split, picture(50, 21))
