"""Processors that split pictures: each tile fills a slot and has its own tokens, with its row and column."""

import numpy as np
import pytest

from antgmm_jax.families import inputs, new_processor
from tests.families.cases import FIRST, case_of, tokenizer
from tests.families.test_inputs import LINE, assert_pictures, own, picture

SPLITTING = [one for one in FIRST if one[0] == "idefics3"]


@pytest.mark.parametrize("shape", SPLITTING, ids=" ".join)
@pytest.mark.parametrize("sides", [[(16, 16)], [(50, 21)], [(19, 64), (40, 40)], []], ids=str)
def test_tiles_and_their_tokens_are_the_processors_own(shape, sides, tmp_path_factory):
    config = case_of(*shape, tmp_path_factory.getbasetemp()).config
    processor = new_processor(config, tokenizer())
    processor.image_processor.do_image_splitting = True
    processor.image_processor.size = {"longest_edge": 3 * config.vision.image}
    reads, images = inputs(config, processor), [picture(*side) for side in sides]
    ids, tree = reads(LINE, images)
    expected, theirs = own(reads, images)
    np.testing.assert_array_equal(ids, expected)
    assert (ids == config.image_token).sum() == len(tree["pixels"]) * config.image_tokens
    if sides:
        assert len(tree["pixels"]) > len(sides)
        assert_pictures(reads, tree, theirs)
