"""Length buckets of a recipe: same rows, same loss, same teacher cache, resumable."""

from itertools import islice

import jax
import numpy as np
import pytest

import data.maad as maad
import distill
import pruning
from antgmm_jax.config import towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.pure import functional
from experiments.run.rows.samples import Samples
from tests.experiments.tiny import save_llava, save_teacher, taken
from tests.marks import long

ROWS, SIZE = 32, 4


@pytest.fixture(scope="module", params=[long(save_teacher), save_llava], ids=["blip2", "llava"])
def model(request, tmp_path_factory):
    """A checkpoint's config, parameters and samples, with buckets of half the rows each."""
    directory = request.param(tmp_path_factory.mktemp("m") / "teacher")
    config, params = load_hf(directory)
    records, processor = maad.source("s", "val", ROWS), load_processor(directory)
    plain = Samples(records, processor, config)
    read = plain.needs.answer if config.language.encoder else plain.needs.text
    middle, prompt = int(np.median(read)), int(np.median(plain.needs.text))
    more = {"prompt_buckets": (prompt,)} if config.language.encoder else {}
    return config, params, plain, Samples(records, processor, config, buckets=(middle, 10**6), **more)


def width(batch):
    return batch["positions" if "decoder_input_ids" in batch else "input_ids"].shape[1]


def test_every_row_is_visited_and_some_batches_are_narrower(model):
    _, _, plain, cut = model
    epoch = [*islice(cut.shuffled(SIZE, 3), ROWS // SIZE)]
    np.testing.assert_array_equal(np.sort(np.concatenate([b["index"] for b in epoch])), np.arange(ROWS))
    # Larger buckets are replaced by the full width.
    whole = {width(b) for b in islice(plain.shuffled(SIZE, 3), 2)}
    assert {width(b) for b in epoch} == {min(map(width, epoch))} | whole
    assert min(map(width, epoch)) < max(whole)


def test_full_batches_do_not_depend_on_the_buckets(model):
    _, _, plain, cut = model
    for one, other in islice(zip(plain.shuffled(SIZE, 3), cut.shuffled(SIZE, 3, full=True), strict=True), 3):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_batches_resume_from_a_position(model):
    _, _, _, cut = model
    whole = cut.shuffled(SIZE, 3)
    for _ in range(5):
        next(whole)
    again = cut.shuffled(SIZE, 3)
    again.seek(whole.position)
    for one, other in islice(zip(whole, again, strict=True), 6):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_caches_of_bucketed_and_full_batches_are_equal(model, tmp_path):
    config, params, plain, cut = model
    visits = [*cut.by_bucket(lambda **_: SIZE)]
    np.testing.assert_array_equal(np.sort(np.concatenate([b["index"] for b in visits])), np.arange(ROWS))
    assert min(map(width, visits)) < max(map(width, visits)) == width(next(plain.in_order(SIZE)))
    names = ("final", *(f"{tower}/states" for tower in towers(config)))
    caches = []
    for name, rows in (("cut", visits), ("whole", plain.in_order(SIZE))):
        about = {"samples": ROWS, "like": next(plain.in_order(SIZE)), "key": "k", "names": names}
        distill.build_cache(functional(config), params, rows, tmp_path / name, **about)
        caches.append(distill.open_cache(tmp_path / name, key="k", names=names))
    for batch in visits:
        one, other = (cache.rows(batch) for cache in caches)
        for name in one:
            # Float32 rounding can change the last bit of the stored bfloat16.
            close = {"rtol": 2**-7, "atol": 1e-4}
            np.testing.assert_allclose(np.float32(one[name]), np.float32(other[name]), **close, err_msg=name)


@pytest.mark.parametrize("mode", ["online", "cache"])
def test_a_bucketed_batch_has_the_loss_of_the_full_one(model, tmp_path, mode):
    config, params, plain, cut = model
    pure = functional(config)
    names = ("final", *(f"{tower}/states" for tower in towers(config)))
    teacher = distill.online(pure, params)
    if mode == "cache":
        like = next(plain.in_order(8))
        about = {"samples": ROWS, "like": like, "key": "k", "names": names}
        distill.build_cache(pure, params, plain.in_order(8), tmp_path / "cache", **about)
        cache = distill.open_cache(tmp_path / "cache", key="k", names=names)
        teacher = distill.cached(pure, params, cache)
    weights = distill.LossConfig(hard=1.0, soft=1.0, pair=0.5, hidden=0.5, vision=0.5)
    compared = distill.parts(config, pruning.identity(config))
    loss = jax.jit(distill.make_loss(pure, weights, teacher=teacher, parts=compared))
    student = pure.init(jax.random.key(7))
    narrow = min(
        islice(cut.shuffled(SIZE, 3), ROWS // SIZE), key=lambda batch: (width(batch), batch["input_ids"].shape[1])
    )
    rows = narrow["index"]
    whole = taken(plain, rows)
    assert width(narrow) < width(whole)
    assert narrow["input_ids"].shape[1] < whole["input_ids"].shape[1]
    losses = []
    for batch in (narrow, whole):
        inputs = {name: value for name, value in teacher.attach(batch).items() if name != "index"}
        losses.append(loss(student, {}, inputs, teacher.params))
    (one, terms), (other, others) = losses
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for name in terms:
        np.testing.assert_allclose(terms[name], others[name], rtol=1e-5, atol=1e-5)


def test_prompt_buckets_need_an_encoder(model):
    config, _, plain, _ = model
    if config.language.encoder is None:
        with pytest.raises(AntgmmError, match="prompt_buckets: a model without an encoder"):
            Samples(plain.records, None, config, prompt_buckets=(8,))
