"""Legal cuts leave checkpoints that plain `transformers` loads, with the logits of the teacher behind closed gates."""

import jax
import numpy as np
import pytest

from antgmm_jax.config import sizes
from antgmm_jax.convert import load_hf, save_hf
from antgmm_jax.functional import functional, local_axes
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
    gated = jax.jit(functional(config).apply)(params, arrays, gates)["logits"]
    valid = reference.valid(model, arrays)
    reference.close(np.asarray(gated)[valid], reference.logits(student, arrays)[valid])
