"""Logits and greedy answers equal PyTorch `transformers`; padding changes neither."""

import numpy as np
import torch

from antgmm_jax.decoding import generate
from tests.families.cases import PICTURES, WORDS, as_torch, batch, close, logits, torch_logits

NEW = 8


def answers(case, arrays):
    return np.asarray(generate(case.config, case.params, arrays, max_new_tokens=NEW, eos=1, pad=0))


def test_logits_equal_pytorchs(every):
    arrays = batch(every.config)
    used = arrays["images"]["valid"].sum(axis=1)
    assert not arrays["attention_mask"].all() and (used >= PICTURES).all() and used[1] == 0
    close(logits(every.config, every.params, arrays), torch_logits(every.model, every, arrays))


def test_answers_equal_pytorchs_token_for_token(case):
    arrays = batch(case.config, pad="left", seed=1)
    with torch.no_grad():
        given = as_torch(case, arrays, "input_ids", "attention_mask")
        theirs = case.model.generate(**given, max_new_tokens=NEW, do_sample=False).numpy()
    theirs = theirs[:, 1 if case.config.encoder_decoder else arrays["input_ids"].shape[1] :]
    np.testing.assert_array_equal(answers(case, arrays), np.pad(theirs, ((0, 0), (0, NEW - theirs.shape[1]))))


def test_values_in_padding_change_no_logit(case):
    arrays = batch(case.config)
    rng, valid, images = np.random.default_rng(2), arrays["images"]["valid"], arrays["images"]
    noise = rng.normal(size=images["pixels"].shape).astype(np.float32)
    other = {**images, "pixels": np.where(valid[:, :, None, None, None], images["pixels"], noise)}
    words = np.where(arrays["attention_mask"] > 0, arrays["input_ids"], rng.integers(*WORDS, arrays["input_ids"].shape))
    expected = logits(case.config, case.params, arrays)
    close(logits(case.config, case.params, {**arrays, "images": other, "input_ids": words.astype(np.int32)}), expected)


def test_a_wider_bucket_changes_no_logit(first):
    arrays = batch(first.config)
    wide = {name: np.pad(value, ((0, 0), (0, 5))) for name, value in arrays.items() if name != "images"}
    kept = {name: arrays[name] for name in ("decoder_input_ids", "labels") if name in arrays}
    images = {name: np.concatenate([leaf, leaf[:, -1:]], axis=1) for name, leaf in arrays["images"].items()}
    assert images["valid"].shape[1] > arrays["images"]["valid"].shape[1] and not images["valid"][:, -1].any()
    actual = logits(first.config, first.params, {**wide, **kept, "images": images})
    close(actual, logits(first.config, first.params, arrays))


def test_answers_do_not_depend_on_the_side_of_the_padding(first):
    left, right = (answers(first, batch(first.config, pad=pad)) for pad in ("left", "right"))
    np.testing.assert_array_equal(left, right)


def test_rows_without_a_picture_need_no_slot(first):
    arrays = batch(first.config)
    words = np.where(arrays["input_ids"] == first.config.image_token, 7, arrays["input_ids"])
    unused = {**arrays["images"], "valid": np.zeros_like(arrays["images"]["valid"])}
    none = {name: leaf[:, :0] for name, leaf in arrays["images"].items()}
    actual, expected = (
        logits(first.config, first.params, {**arrays, "input_ids": words, "images": images})
        for images in (none, unused)
    )
    close(actual, expected)


def test_eight_bit_pictures_are_normalised_by_their_tree(first):
    arrays, rng = batch(first.config), np.random.default_rng(3)
    shape = arrays["images"]["pixels"].shape
    pixels = rng.integers(0, 256, shape).astype(np.uint8)
    scale, offset = (
        rng.uniform(low, high, (*shape[:2], 3)).astype(np.float32) for low, high in ((0.01, 0.02), (-2, -1))
    )
    plain = pixels * scale[:, :, None, None] + offset[:, :, None, None]
    actual, expected = (
        logits(first.config, first.params, {**arrays, "images": {**arrays["images"], **tree}})
        for tree in ({"pixels": pixels, "scale": scale, "offset": offset}, {"pixels": plain})
    )
    close(actual, expected)
