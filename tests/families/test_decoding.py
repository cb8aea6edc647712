"""Step-by-step decoding gives the logits of one teacher-forced pass."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from antgmm_jax.pure import functional
from tests.families.cases import PICTURES, WORDS, batch

NEW = 5


def stepwise(config, params, arrays, answers):
    """Returns the logits of each answer token by the engine's phases: prompt, then one token at a time."""
    graph = functional(config).graph

    def prefill(params, batch):
        return nnx.merge(graph, nnx.State(params)).prefill(batch, NEW)

    def step(params, ids, state, valid):
        language = nnx.merge(graph, nnx.State(params)).language
        return language.step(ids, state, valid, language.decoder.unstack())

    (state, valid), next_token = jax.jit(prefill)(params, arrays), jax.jit(step)
    logits = [state.logits]
    for ids in answers.T[:-1]:
        new, caches = next_token(params, ids, state, valid)
        state = state._replace(caches=caches, lengths=state.lengths + 1, slot=jnp.int32(state.slot + 1))
        logits.append(new)
    return np.stack(logits, axis=1)


def test_teacher_forced_logits_equal_those_of_step_by_step_decoding(first):
    config, arrays = first.config, batch(first.config, pad="left")
    params = jax.tree.map(jnp.asarray, first.params)
    answers = np.random.default_rng(0).integers(*WORDS, (len(PICTURES), NEW)).astype(np.int32)
    if config.encoder_decoder:
        start = np.full((len(PICTURES), 1), config.language.start_token, np.int32)
        longer, prompt = {**arrays, "decoder_input_ids": np.concatenate([start, answers[:, :-1]], axis=1)}, 1
    else:
        ids = np.concatenate([arrays["input_ids"], answers[:, :-1]], axis=1)
        mask = np.pad(arrays["attention_mask"], ((0, 0), (0, NEW - 1)), constant_values=1)
        longer, prompt = {**arrays, "input_ids": ids, "attention_mask": mask}, arrays["input_ids"].shape[1]
    longer.pop("labels")
    forced = jax.jit(functional(config).apply)(params, longer)["logits"][:, prompt - 1 :]
    np.testing.assert_allclose(stepwise(config, params, arrays, answers), forced, rtol=1e-5, atol=1e-5)
