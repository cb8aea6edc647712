"""The compiled step at a vocabulary of 150 000 never holds an array [batch, length, vocab]."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill
from antgmm_jax.axes import sizes
from antgmm_jax.config import towers
from antgmm_jax.pure import abstract, functional
from distill.align import parts
from tests.pruning.models import CONFIGS, EACH

VOCAB, BATCH, ANSWER = 150_000, 128, 64
ALL_LOGITS = 4 * BATCH * ANSWER * VOCAB  # float32, one model's
LOSSES = distill.LossConfig(hard=1.0, soft=0.5, pair=0.3, hidden=0.4, temperature=2.0)


def model(family):
    config = CONFIGS[family]
    return dataclasses.replace(config, language=dataclasses.replace(config.language, vocab=VOCAB))


def shapes(config):
    """The shapes of a batch; no array is allocated."""
    t5, image = config.language.encoder is not None, config.vision.image
    prompt = config.image_tokens + 4 + (0 if t5 else ANSWER)
    names = {"input_ids": prompt, "attention_mask": prompt, "positions": ANSWER, "targets": ANSWER}
    names |= {"decoder_input_ids": ANSWER} if t5 else {}
    batch = {name: jax.ShapeDtypeStruct((BATCH, length), jnp.int32) for name, length in names.items()}
    pixels = jax.ShapeDtypeStruct((BATCH, 1, image, image, 3), jnp.float32)
    return batch | {"images": {"pixels": pixels, "valid": jax.ShapeDtypeStruct((BATCH, 1), jnp.bool_)}}


def temporaries(family, **options):
    """Bytes of temporary memory of the compiled step."""
    config = model(family)
    pure, optimizer = functional(config), distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-3), steps=1)
    state = jax.eval_shape(partial(distill.init_state, optimizer=optimizer), abstract(config))
    frozen = abstract(config)
    axes = [axis for tower in towers(config).values() for axis in (tower.axis("layers"), tower.embed)]
    aligned = parts(config, {axis: np.arange(sizes(config)[axis]) for axis in axes})
    step = distill.make_step(pure, optimizer, LOSSES, teacher=distill.online(pure, frozen), parts=aligned, **options)
    # The program never runs, so it is compiled without optimisation.
    lowered = step.program.lower(state, shapes(config), {}, frozen, jax.ShapeDtypeStruct((), jnp.float32))
    analysis = lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("family", EACH)
def test_a_step_needs_less_than_a_third_of_one_models_logits(family):
    # 512 of 8192 tokens are in memory at once, in about four arrays: logits of both models and derived values.
    assert temporaries(family) < ALL_LOGITS / 3


def test_a_step_without_chunks_holds_all_logits():
    assert temporaries("llava", chunk=BATCH * ANSWER) > 4 * ALL_LOGITS
