"""Packed rows give the loss and gradients of unpacked rows, and no token attends to another sample."""

import json
from itertools import islice

import jax
import numpy as np
import pytest

import data.maad as maad
import distill
import pruning
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.pure import functional
from distill.loop import HOST_ONLY
from experiments.run.features import image_features
from experiments.run.pipeline import Run
from experiments.run.rows.datasets import encode_both, load_both
from experiments.run.rows.samples import Samples
from experiments.run.schema.recipe import load_recipe
from tests.experiments.tiny import save_llava, save_teacher, taken, write_recipe
from tests.reference import squares

SAMPLES, ROWS, SEED = 24, 4, 3
WEIGHTS = distill.LossConfig(hard=1.0, soft=1.0, pair=0.5, rank=0.5, hidden=0.5, vision=0.5, bridge=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Config, parameters, samples without and with packing (about three per row), and a packed batch."""
    directory = save_llava(tmp_path_factory.mktemp("m") / "teacher")
    config, params = load_hf(directory)
    records, processor = maad.source("s", "val", SAMPLES), load_processor(directory)
    plain = Samples(records, processor, config)
    packed = Samples(records, processor, config, pack=int(2.6 * plain.needs.text.mean()))
    # A batch with an empty place: its rows hold different numbers of samples.
    batch = next(each for each in packed.shuffled(ROWS, SEED) if (each["index"] < 0).any())
    return config, params, plain, packed, batch


def unpacked(plain, batch):
    """The same samples, one per row."""
    rows = batch["index"][batch["index"] >= 0]
    return taken(plain, rows)


def device(teacher, batch):
    return {name: value for name, value in teacher.attach(batch).items() if name not in HOST_ONLY}


def test_a_batch_has_several_samples_a_row_and_each_once_an_epoch(model):
    _, _, _, packed, batch = model
    assert (batch["segment_ids"].max(axis=1) > 1).all() and (batch["index"] < 0).any()
    assert len(set(packed.needs.text[batch["index"][batch["index"] >= 0]])) > 1
    run, seen = packed.shuffled(ROWS, SEED), np.zeros(0, int)
    while len(seen) < SAMPLES:
        index = next(run)["index"]
        seen = np.concatenate([seen, index[index >= 0]])
    np.testing.assert_array_equal(np.sort(seen), np.arange(SAMPLES))


@pytest.mark.parametrize("mode", ["online", "cache"])
def test_loss_and_gradients_equal_those_of_unpacked_rows(model, tmp_path, mode):
    config, params, plain, _, batch = model
    pure = functional(config)
    teacher = distill.online(pure, params)
    if mode == "cache":
        names = ("final", "vision/states", "text/states", OUT)
        like = next(plain.in_order(8))
        about = {"samples": SAMPLES, "like": like, "key": "k", "names": names}
        distill.build_cache(pure, params, plain.in_order(8), tmp_path / "cache", **about)
        teacher = distill.cached(pure, params, distill.open_cache(tmp_path / "cache", key="k", names=names))
    loss = distill.make_loss(pure, WEIGHTS, teacher=teacher, parts=distill.parts(config, pruning.identity(config)))
    run = jax.jit(jax.value_and_grad(lambda p, b: loss(p, {}, b, teacher.params), has_aux=True))
    student = pure.init(jax.random.key(7))
    (value, terms), gradient = run(student, device(teacher, batch))
    (expected, others), reference = run(student, device(teacher, unpacked(plain, batch)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(terms) == set(WEIGHTS.terms())
    for name in terms:
        np.testing.assert_allclose(terms[name], others[name], rtol=1e-5, atol=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(reference))
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * max(1.0, largest))


def test_micro_batches_of_packed_rows_equal_the_whole_batch(model):
    config, params, _, _, batch = model
    pure, results = functional(config), []
    teacher = distill.online(pure, params)
    inputs = device(teacher, batch)
    for pieces in (1, 2):
        optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-2), steps=1)
        parts = distill.parts(config, pruning.identity(config))
        step = distill.make_step(pure, optimizer, WEIGHTS, teacher=teacher, parts=parts, micro_batches=pieces)
        state = distill.init_state(pure.init(jax.random.key(7)), optimizer)
        results.append(step(state, inputs, {}, teacher.params)[1])
    for name in results[0]:
        np.testing.assert_allclose(results[1][name], results[0][name], rtol=1e-5)


def test_image_features_replace_pictures(model, tmp_path):
    config, params, _, packed, batch = model
    features = image_features(config, params, packed, tmp_path / "features")
    run = packed.shuffled(ROWS, SEED, features=features)
    given = next(each for each in run if (each["index"] < 0).any())
    np.testing.assert_array_equal(given["index"], batch["index"])
    apply = jax.jit(functional(config).apply)
    one, other = (apply(params, {k: v for k, v in b.items() if k not in HOST_ONLY})["logits"] for b in (given, batch))
    valid = batch["segment_ids"] > 0
    np.testing.assert_allclose(one[valid], other[valid], atol=1e-5, rtol=1e-5)


def test_no_token_sees_another_sample(model):
    config, params, _, _, batch = model
    apply = jax.jit(functional(config).apply)
    inputs = {name: value for name, value in batch.items() if name not in HOST_ONLY}
    before = np.asarray(apply(params, inputs)["logits"])
    segments = batch["segment_ids"]
    for sample in (1, 2):
        # Change the picture and the words of the sample, but not its image tokens.
        ids, images = inputs["input_ids"].copy(), inputs["images"]
        words = (segments == sample) & (ids != config.image_token)
        ids[words] = 5 + ids[words] % 7
        other = images["pixels"].copy()
        other[:, sample - 1] = 255 - other[:, sample - 1]
        after = np.asarray(apply(params, {**inputs, "input_ids": ids, "images": {**images, "pixels": other}})["logits"])
        mine, others = segments == sample, (segments != sample) & (segments > 0)
        np.testing.assert_array_equal(after[others], before[others])
        assert (np.abs(after - before)[mine].max(axis=-1) > 0).all()


def test_batches_resume_from_a_position(model):
    _, _, _, packed, _ = model
    whole = packed.shuffled(ROWS, SEED)
    for _ in range(5):
        next(whole)
    again = packed.shuffled(ROWS, SEED)
    again.seek(whole.position)
    for one, other in islice(zip(whole, again, strict=True), 4):
        for name in one:
            jax.tree.map(np.testing.assert_array_equal, one[name], other[name])


@pytest.mark.long
def test_a_recipe_trains_on_packed_rows(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.toml", save_llava(tmp_path / "teacher"), sizes='"text/layers" = 2')
    loaded = load_recipe(recipe, ["pack=128", "optimizer.batch_size=2", "optimizer.accumulate=2"])
    Run(loaded, tmp_path / "run").scores()
    config, processor = load_hf(tmp_path / "teacher")[0], load_processor(tmp_path / "teacher")
    samples, _ = encode_both(loaded, load_both(loaded), processor, config)
    # 16 samples of about 40 tokens, three per row.
    assert next(samples.shuffled(2, 0))["index"].shape[1] > 1
    history = json.loads((tmp_path / "run" / "stages" / "01-blocks" / "stage.json").read_text())["metrics"]["history"]
    assert np.isfinite([point["loss"] for point in history]).all() and history[-1]["step"] == 4


def test_t5_is_refused(tmp_path):
    directory = save_teacher(tmp_path / "teacher")
    config, params = load_hf(directory)
    with pytest.raises(AntgmmError, match="pack = 64: only models without an encoder can read packed rows"):
        Samples(maad.source("s", "val", 4), load_processor(directory), config, pack=64)
    ids = dict.fromkeys(("input_ids", "attention_mask", "segment_ids", "decoder_input_ids"), np.ones((1, 8), np.int32))
    with pytest.raises(AntgmmError, match="a model with an encoder cannot read packed rows"):
        functional(config).apply(params, ids | {"images": squares(np.zeros((1, 3, 32, 32), np.float32))})
