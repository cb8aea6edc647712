"""Rows with several samples, and cached features instead of images, give the same logits."""

import jax
import numpy as np
import pytest

from antgmm_jax.blocks.pictures import without_pixels
from antgmm_jax.pure import functional
from tests.families.cases import batch, close, logits


def packed(arrays: dict, groups: list[list[int]]) -> tuple[dict, list[tuple[int, slice, int]]]:
    """Returns rows of several samples, and (row, columns, sample) of each sample."""
    mask, valid = arrays["attention_mask"], arrays["images"]["valid"]
    lengths, used = mask.sum(axis=1), valid.sum(axis=1)
    width, slots = (max(int(counts[rows].sum()) for rows in groups) for counts in (lengths, used))
    ids, segments = np.zeros((2, len(groups), width), np.int32)
    images = {n: np.zeros((len(groups), slots, *leaf.shape[2:]), leaf.dtype) for n, leaf in arrays["images"].items()}
    where = []
    for row, samples in enumerate(groups):
        start = at = 0
        for place, sample in enumerate(samples):
            span, end = slice(start, start + lengths[sample]), at + used[sample]
            ids[row, span], segments[row, span] = arrays["input_ids"][sample, : lengths[sample]], place + 1
            for name, leaf in arrays["images"].items():
                images[name][row, at:end] = leaf[sample, : used[sample]]
            where.append((row, span, sample))
            start, at = span.stop, end
    made = {"images": images, "input_ids": ids, "segment_ids": segments}
    return made | {"attention_mask": (segments > 0).astype(np.int32)}, where


def test_packed_samples_have_the_logits_of_separate_rows(first):
    if first.config.encoder_decoder:
        pytest.skip("an encoder does not read packed rows")
    arrays = batch(first.config)
    rows, where = packed(arrays, [[3, 0], [1, 2]])
    apply = jax.jit(lambda params, batch: functional(first.config).apply(params, batch)["logits"])
    together, apart = (np.asarray(apply(first.params, given)) for given in (rows, arrays))
    for row, span, sample in where:
        close(together[row, span], apart[sample, : span.stop - span.start])


def test_features_replace_pictures(first):
    arrays = batch(first.config)
    features = jax.jit(functional(first.config).features)(first.params, arrays["images"])
    assert features.shape[:2] == arrays["images"]["valid"].shape
    given = {**arrays, "images": without_pixels(arrays["images"]), "vision_features": features}
    close(logits(first.config, first.params, given), logits(first.config, first.params, arrays))
