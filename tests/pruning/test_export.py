"""Models with fewer Q-Former layers, or with unequal encoder and decoder depths, load in stock `transformers`."""

import jax
import numpy as np
import pytest
import torch

from antgmm_jax.axes import sizes
from antgmm_jax.decoding import generate
from antgmm_jax.io.convert import load_hf, save_hf
from antgmm_jax.pure import functional, local_axes
from pruning import gates_of, ones, plan, random, shrink
from tests import reference

CUTS = {
    "blocks": {"vision/layers": 1, "bridge/layers": 2, "encoder/layers": 2, "decoder/layers": 1},
    "only cross layers, encoder deeper": {"bridge/layers": 1, "decoder/layers": 1},
}


@pytest.mark.parametrize("targets", CUTS.values(), ids=CUTS)
def test_transformers_gives_the_gated_models_logits(tmp_path, targets):
    model = reference.blip2(seed=3)
    arrays = reference.batch(model)
    reference.saved(model, tmp_path / "teacher")
    config, params = load_hf(tmp_path / "teacher")
    keep = plan(random(jax.random.key(1), sizes(config), local_axes(config)), config, targets)
    save_hf(*shrink(config, params, keep), tmp_path / "student", like=tmp_path / "teacher")
    student = reference.reloaded(tmp_path / "student")
    gates = {**ones(config), **gates_of(keep, config)}
    gated = jax.jit(functional(config).apply)(params, reference.ours(arrays), gates)["logits"]
    reference.close(np.asarray(gated), reference.logits(student, arrays))


@pytest.mark.parametrize("cached", [True, False])
def test_a_decoder_deeper_than_its_encoder_generates_with_and_without_a_cache(tmp_path, cached):
    model = reference.blip2(seed=4, text=(1, 3, 16, 3, 20))
    arrays = reference.batch(model)
    config, params = load_hf(reference.saved(model, tmp_path / "source"))
    save_hf(config, params, tmp_path / "deep", like=tmp_path / "source")
    served = reference.reloaded(tmp_path / "deep")
    served.generation_config.pad_token_id, served.generation_config.eos_token_id = 0, 1
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if name != "decoder_input_ids"}
    answers = served.generate(**tensors, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cached)
    ours = generate(config, params, reference.ours(arrays), max_new_tokens=6, eos=(), pad=0)
    np.testing.assert_array_equal(answers[:, 1:].numpy(), ours)
