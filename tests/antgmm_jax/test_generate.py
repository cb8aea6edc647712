"""Greedy decoding against PyTorch's `generate` and against our own teacher-forced logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from antgmm_jax.convert import load_hf
from antgmm_jax.functional import functional
from antgmm_jax.generate import generate
from tests import reference

NEW = 10
CASES = [("blip2", {"seed": s}, "right") for s in (0, 1)] + [
    ("blip2", {"tied": True, "scaled": True, "gated": False, "text": (3, 1, 16, 3, 20)}, "left"),
    *[("llava", {"kv_heads": k, "seed": k}, "left") for k in (1, 2, 4)],
]


def _torch_answers(model, arrays):
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if name != "decoder_input_ids"}
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    answers = model.generate(**tensors, max_new_tokens=NEW, do_sample=False).numpy()
    answers = answers[:, 1:] if model.config.is_encoder_decoder else answers[:, arrays["input_ids"].shape[1] :]
    return np.pad(answers, ((0, 0), (0, NEW - answers.shape[1])))


@pytest.mark.parametrize(("family", "kwargs", "pad"), CASES)
def test_answers_equal_pytorch_token_for_token(tmp_path, family, kwargs, pad):
    model = getattr(reference, family)(**kwargs)
    arrays = reference.batch(model, rows=6, pad=pad)
    config, params = load_hf(reference.saved(model, tmp_path / "m"))
    got = generate(config, params, reference.ours(arrays), max_new_tokens=NEW, eos=1, pad=0)
    np.testing.assert_array_equal(got, _torch_answers(model, arrays))


def test_decoding_starts_from_the_token_that_the_config_names(tmp_path):
    model = reference.blip2()
    model.config.text_config.decoder_start_token_id = 2
    reference.saved(model, tmp_path / "m")
    model = reference.reloaded(tmp_path / "m")  # generate() has read the token where a model is made
    arrays = reference.batch(model, rows=6)
    config, params = load_hf(tmp_path / "m")
    got = generate(config, params, reference.ours(arrays), max_new_tokens=NEW, eos=1, pad=0)
    np.testing.assert_array_equal(got, _torch_answers(model, arrays))


def test_a_row_that_ends_is_padded_while_others_go_on(tmp_path):
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


@pytest.mark.parametrize("family", ["blip2", "llava"])
def test_teacher_forced_logits_equal_those_of_step_by_step_decoding(tmp_path, family):
    """Decoding reads the same slots that training trains (fault 2 of the paper's code)."""
    model = getattr(reference, family)(seed=3)
    arrays = reference.batch(model, rows=4)
    arrays["attention_mask"][:] = 1
    config, params = load_hf(reference.saved(model, tmp_path / "m"))
    answers = np.random.default_rng(0).integers(2, 48, (4, NEW)).astype(np.int32)
    if family == "blip2":
        arrays["decoder_input_ids"] = np.concatenate([np.zeros((4, 1), np.int32), answers[:, :-1]], axis=1)
        forced = functional(config).apply(params, reference.ours(arrays))["logits"]
    else:
        prompt = arrays["input_ids"].shape[1]
        longer = {**arrays, "input_ids": np.concatenate([arrays["input_ids"], answers[:, :-1]], axis=1)}
        longer["attention_mask"] = np.ones_like(longer["input_ids"])
        forced = functional(config).apply(params, reference.ours(longer))["logits"][:, prompt - 1 :]
    np.testing.assert_allclose(_stepwise(config, params, arrays, answers), forced, rtol=1e-5, atol=1e-5)


def _stepwise(config, params, arrays, answers):
    lmm = nnx.merge(functional(config).graph, nnx.State(jax.tree.map(jnp.asarray, params)))
    state, memory_valid = lmm.prefill(jax.tree.map(jnp.asarray, reference.ours(arrays)), NEW)
    layers, logits = lmm.language.decoder.unstack(), [state.logits]
    for ids in answers.T[:-1]:
        new, caches = lmm.language.step(jnp.asarray(ids), state, memory_valid, layers)
        state = state._replace(caches=caches, lengths=state.lengths + 1, slot=state.slot + 1)
        logits.append(new)
    return np.stack(logits, axis=1)


@pytest.mark.parametrize("family", ["blip2", "llava"])
def test_padding_on_the_right_changes_no_answer(tmp_path, family):
    model = getattr(reference, family)(seed=4)
    arrays = reference.batch(model, rows=2)
    arrays["attention_mask"][:] = 1
    config, params = load_hf(reference.saved(model, tmp_path / "m"))
    plain = generate(config, params, reference.ours(arrays), max_new_tokens=NEW, eos=1, pad=0)
    padded = dict(arrays)
    padded["input_ids"] = np.pad(arrays["input_ids"], ((0, 0), (0, 5)), constant_values=7)
    padded["attention_mask"] = np.pad(arrays["attention_mask"], ((0, 0), (0, 5)))
    np.testing.assert_array_equal(
        generate(config, params, reference.ours(padded), max_new_tokens=NEW, eos=1, pad=0), plain
    )
