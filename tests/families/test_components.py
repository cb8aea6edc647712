"""The text width in another basis: a tied head is untied, and `transformers` gives the same logits from the files."""

import json

import numpy as np
import pytest

from antgmm_jax.axes import sizes
from antgmm_jax.io.convert import load_hf, save_hf
from pruning import shrink
from tests.families.cases import SHAPES, batch, case_of, close, reloaded, torch_logits

TIED = [(name, shape) for name, shape in SHAPES if " tied" in shape]


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, marks=[pytest.mark.long] * (shape[0] != "llava"), id=" ".join(shape)) for shape in TIED],
)
def test_all_components_give_the_logits_in_transformers_with_a_head_of_its_own(shape, tmp_path, tmp_path_factory):
    case = case_of(*shape, tmp_path_factory.getbasetemp())
    assert case.config.language.tied
    size = sizes(case.config)["text/embed"]
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0].astype(np.float32)
    turned, params = shrink(case.config, case.params, {"text/embed": basis})
    save_hf(turned, params, tmp_path / "turned", like=case.directory)
    fields = json.loads((tmp_path / "turned" / "config.json").read_text())
    assert not any(part.get("tie_word_embeddings") for part in (fields, fields["text_config"]))
    assert load_hf(tmp_path / "turned")[0] == turned
    arrays = batch(case.config)
    close(torch_logits(reloaded(tmp_path / "turned"), case, arrays), torch_logits(case.model, case, arrays))
