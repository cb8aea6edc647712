"""Legal cuts leave checkpoints that plain `transformers` loads, with the logits of the teacher behind closed gates."""

import jax
import numpy as np
import pytest
import torch

from antgmm_jax.axes import sizes
from antgmm_jax.convert import load_hf, save_hf
from antgmm_jax.functional import functional, local_axes
from antgmm_jax.generate import generate
from pruning import gates_of, ones, plan, random, shrink
from tests import reference

BLOCKS = {"vision/layers": 1, "bridge/layers": 2, "encoder/layers": 2, "decoder/layers": 1}
HIDDEN = {"vision/embed": 16, "bridge/embed": 16, "text/embed": 10}
CUTS = {
    "blocks": ("blip2", BLOCKS),
    "only cross layers, encoder deeper": ("blip2", {"bridge/layers": 1, "decoder/layers": 1}),
    "intermediate": ("blip2", {"vision/mlp": 9, "bridge/mlp": 7, "encoder/mlp": 0.5, "encoder/heads": 2}),
    "hidden": ("blip2", HIDDEN),
    "everything": ("blip2", {**BLOCKS, **HIDDEN, "vision/mlp": 9, "encoder/mlp": 5, "encoder/heads": 1}),
    "LLaVA blocks": ("llava", {"vision/layers": 1, "text/layers": 1}),
    "LLaVA intermediate": ("llava", {"vision/mlp": 9, "text/mlp": 7, "text/heads": 1}),
    "LLaVA hidden": ("llava", {"vision/embed": 24, "text/embed": 16}),
    "LLaVA everything": ("llava", {"vision/layers": 1, "vision/embed": 8, "text/embed": 12, "text/heads": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "targets"), CUTS.values(), ids=CUTS)
def test_a_legal_cut_is_served_by_transformers(tmp_path, family, targets):
    model = getattr(reference, family)(seed=3)
    arrays = reference.batch(model)
    reference.saved(model, tmp_path / "teacher")
    config, params = load_hf(tmp_path / "teacher")
    keep = plan(random(jax.random.key(1), sizes(config), local_axes(config)), config, targets)
    save_hf(*shrink(config, params, keep), tmp_path / "student", like=tmp_path / "teacher")
    student = reference.reloaded(tmp_path / "student")
    gates = {**ones(config), **gates_of(keep, config)}
    gated = jax.jit(functional(config).apply)(params, reference.ours(arrays), gates)["logits"]
    valid = reference.valid(model, arrays)
    reference.close(np.asarray(gated)[valid], reference.logits(student, arrays)[valid])


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
