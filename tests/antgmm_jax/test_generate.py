"""Greedy decoding from the start token to the end token."""

import jax
import numpy as np
import torch

from antgmm_jax import decoding
from antgmm_jax.decoding import forced_logits, generate, phases
from antgmm_jax.io.convert import load_hf
from tests import reference

NEW = 10


def _torch_answers(model, arrays):
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if name != "decoder_input_ids"}
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    answers = model.generate(**tensors, max_new_tokens=NEW, do_sample=False).numpy()
    answers = answers[:, 1:] if model.config.is_encoder_decoder else answers[:, arrays["input_ids"].shape[1] :]
    return np.pad(answers, ((0, 0), (0, NEW - answers.shape[1])))


def test_decoding_starts_from_the_token_that_the_config_names(tmp_path):
    model = reference.blip2()
    model.config.text_config.decoder_start_token_id = 2
    reference.saved(model, tmp_path / "m")
    model = reference.reloaded(tmp_path / "m")  # generate() reads the token when a model is created
    arrays = reference.batch(model, rows=6)
    config, params = load_hf(tmp_path / "m")
    got = generate(config, params, reference.ours(arrays), max_new_tokens=NEW, eos=1, pad=0)
    np.testing.assert_array_equal(got, _torch_answers(model, arrays))


def test_a_finished_row_is_padded_while_others_continue(tmp_path):
    model = reference.blip2()
    arrays = reference.batch(model, rows=6)
    config, params = load_hf(reference.saved(model, tmp_path / "m"))
    free = np.asarray(generate(config, params, reference.ours(arrays), max_new_tokens=NEW, eos=(), pad=0))
    end = int(free[0, 2])
    got = np.asarray(generate(config, params, reference.ours(arrays), max_new_tokens=NEW, eos=end, pad=0))
    for row, full in zip(got, free, strict=True):
        stop = list(full).index(end) + 1 if end in full else NEW
        np.testing.assert_array_equal(row[:stop], full[:stop])
        assert not row[stop:].any()
    assert (got != free).any()


def test_layers_sliced_in_the_loop_give_the_same_answers(tmp_path, monkeypatch):
    """As on TPUs, where slices before the loop would hold the decoder twice."""
    model = reference.blip2()
    arrays = reference.batch(model, rows=6)
    config, params = load_hf(reference.saved(model, tmp_path / "m"))
    answers, outside = [], []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(decoding, "platform", lambda platform=platform: platform)
        phases.cache_clear()
        answers.append(generate(config, params, reference.ours(arrays), max_new_tokens=NEW, eos=1, pad=0))
        run = phases(config, NEW, (1,), 0)
        state = jax.eval_shape(run.prefill, params, reference.ours(arrays))
        outside.append(str(jax.make_jaxpr(run.decode)(params, state)).partition("while[")[0].count(" = slice["))
    phases.cache_clear()
    np.testing.assert_array_equal(*answers)
    assert outside[0] >= config.language.decoder.layers > outside[1] == 0


def test_logits_of_given_answers_are_those_of_pytorch(tmp_path):
    model = reference.blip2()
    arrays = reference.batch(model, rows=3)
    config, params = load_hf(reference.saved(model, tmp_path / "m"))
    answers = np.random.default_rng(0).integers(2, config.language.vocab, (3, 5)).astype(np.int32)
    start = np.full((3, 1), config.language.start_token)
    decoder = torch.from_numpy(np.concatenate([start, answers[:, :-1]], axis=1))
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if name != "decoder_input_ids"}
    with torch.inference_mode():
        expected = model(**tensors, decoder_input_ids=decoder).logits.numpy()
    got = forced_logits(config, params, reference.ours(arrays), answers)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
