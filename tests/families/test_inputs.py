"""Token ids and pixels equal those of the checkpoint's `AutoProcessor`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import inputs, new_processor
from antgmm_jax.families.common.words import user_turn
from tests.families.cases import close, image_tokens, logits, tokenizer

LINE = "text: new , $25. question: what is the price ?"
SIDES = ((16, 16), (50, 21), (19, 64), (7, 5), (33, 33))
"""Widths and heights of pictures: the model's size and others."""


@pytest.fixture(scope="module")
def reads(case, tmp_path_factory):
    """The inputs of a processor that was saved and loaded with `AutoProcessor`."""
    folder = tmp_path_factory.mktemp("processor")
    new_processor(case.config, tokenizer()).save_pretrained(folder)
    return inputs(case.config, AutoProcessor.from_pretrained(folder))


def picture(width, height):
    """Returns a noisy ramp, which shows resizing, cropping and tiling."""
    noise = np.random.default_rng(width).integers(0, 55, (height, width, 3))
    return (np.linspace(0, 200, width)[None, :, None] + noise).astype(np.uint8)


def text_of(reads, images):
    """Returns the text of one turn with these images for the processor."""
    return reads.chat(user_turn(LINE, len(images)))


def processed(reads, images):
    """Returns the processor's output for a row: token ids, and the pictures for PyTorch."""
    made = reads.processor(text=[text_of(reads, images)], images=[images] if images else None, return_tensors="np")
    return np.asarray(made["input_ids"])[0], np.asarray(made["pixel_values"]) if images else None


def assert_pictures(case, reads, tree, theirs):
    """Asserts that a row's tree has the processor's pixels, both normalised and converted for PyTorch."""
    assert tree["pixels"].dtype == np.uint8
    if not case.config.grid:
        made = tree["pixels"] * tree["scale"][:, None, None] + tree["offset"][:, None, None]
        np.testing.assert_allclose(np.moveaxis(made, -1, 1), theirs.reshape(-1, *theirs.shape[-3:]), rtol=0, atol=1e-6)
    row = {name: leaf[None] for name, leaf in tree.items()} | {"valid": np.ones((1, len(tree["pixels"])), bool)}
    given = reads.torch({"images": row, "input_ids": np.zeros((1, 1), np.int32)}, case.model.config)
    np.testing.assert_allclose(given["pixel_values"], theirs, rtol=0, atol=1e-6)


def assert_computed(case, reads, image):
    """Asserts that our logits equal PyTorch's with the processor's masks of pixels and tokens."""
    text = text_of(reads, [image])
    given = reads.processor(text=[text], images=[image], return_tensors="pt")
    ids, tree = reads(text, [image])
    images = {name: leaf[None] for name, leaf in tree.items()} | {"valid": np.ones((1, len(tree["pixels"])), bool)}
    row = {"images": images, "input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int32)}
    if case.config.encoder_decoder:
        row["decoder_input_ids"] = np.zeros((1, 1), np.int32)
        given["decoder_input_ids"] = torch.zeros((1, 1), dtype=torch.int64)
    with torch.no_grad():
        close(logits(case.config, case.params, row), case.model(**given).logits.numpy()[0])


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_a_picture_and_its_tokens_equal_the_processors(case, reads, side):
    ids, tree = reads(text_of(reads, [0]), [picture(*side)])
    expected, theirs = processed(reads, [picture(*side)])
    np.testing.assert_array_equal(ids, expected)
    assert ids.dtype == np.int32
    assert (ids == case.config.image_token).sum() == image_tokens(case.config, tree.get("place", tree["pixels"]))
    assert_pictures(case, reads, tree, theirs)


def test_a_line_without_a_picture_equals_the_processors(case, reads):
    ids, tree = reads(text_of(reads, []), [])
    np.testing.assert_array_equal(ids, processed(reads, [])[0])
    assert case.config.image_token not in ids
    assert {len(leaf) for leaf in tree.values()} == {0}


def test_several_pictures_equal_the_processors(case, reads):
    images = [picture(*side) for side in SIDES[:3]]
    ids, tree = reads(text_of(reads, images), images)
    expected, theirs = processed(reads, images)
    token = case.config.image_token
    assert (ids == token).sum() == image_tokens(case.config, tree.get("place", tree["pixels"]))
    if (expected == token).sum() < (ids == token).sum():
        # This processor counts one picture per text; each further picture takes as many tokens.
        more = np.repeat(token, len(ids) - len(expected))
        expected = np.insert(expected, np.argmax(expected == token), more)
    np.testing.assert_array_equal(ids, expected)
    assert_pictures(case, reads, tree, theirs)


def test_logits_equal_pytorchs_with_all_outputs_of_the_processor(first):
    assert_computed(first, first.reads, picture(50, 21))


def test_a_processor_of_a_model_of_another_size_is_refused(case, reads):
    vision = case.config.vision
    config = replace(case.config, vision=replace(vision, image=2 * vision.image, patch=2 * vision.patch))
    with pytest.raises(AntgmmError, match=f"the processor makes images of {case.config.side} pixels with"):
        inputs(config, reads.processor)
    with pytest.raises(AntgmmError, match="the model's 7"):
        inputs(replace(case.config, image_token=7), reads.processor)


def test_a_servers_ids_equal_those_of_training(case, reads):
    """A server renders the chat template and adds no special tokens; transformers tokenises in one step or two."""
    if not reads.processor.chat_template:
        pytest.skip("no chat template")
    image = picture(50, 21)
    text = text_of(reads, [image])
    ids, _ = reads(text, [image])
    for options in ({}, {"add_special_tokens": False}):
        served = reads.processor(text=[text], images=[image], **options)["input_ids"][0]
        np.testing.assert_array_equal(served, ids)
