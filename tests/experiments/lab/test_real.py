"""What a training changed comes back from its small file, and English paragraphs are prose."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from antgmm_jax.axes import sizes
from antgmm_jax.io.convert import hf_tensors, open_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.pure import functional
from experiments.lab.real import base
from experiments.lab.real.delta import A, B, applied, extract
from experiments.lab.real.english import GIVEN, paragraphs
from tests.experiments.tiny import save_smolvlm

RNG = np.random.default_rng(0)
BEFORE = {name: RNG.normal(size=(12, 9)).astype(np.float32) for name in ("low", "full", "same")}


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def after():
    return {
        "low": BEFORE["low"] + draw(12, 2) @ draw(2, 9),
        "full": BEFORE["full"] + draw(12, 9),
        "same": BEFORE["same"].copy(),
    }


def test_only_what_changed_is_stored_and_low_ranks_as_factors(after):
    delta = extract(BEFORE.items(), after, rank=3)
    assert {name: values.shape for name, values in delta.items()} == {
        "low" + A: (12, 2),
        "low" + B: (2, 9),
        "full": (12, 9),
    }
    assert {values.dtype.name for values in delta.values()} == {"bfloat16"}


def test_the_trained_tensors_come_back_to_the_rounding_of_bfloat16(after):
    back = dict(applied(BEFORE.items(), extract(BEFORE.items(), after, rank=3)))
    for name, values in after.items():
        # Two rounded factors and a sum of two products: 2^-8 of the largest change.
        bound = 0 if name == "same" else 2**-7 * max(np.abs(values).max(), np.abs(values - BEFORE[name]).max())
        np.testing.assert_allclose(back[name], values, rtol=0, atol=bound)


def test_a_change_of_a_higher_rank_is_stored_as_factors_if_they_lose_little(after):
    after["low"] += 1e-2 * draw(12, 2) @ draw(2, 9)
    assert set(extract(BEFORE.items(), after, rank=2)) == {"low" + A, "low" + B, "full"}


def test_a_checkpoint_has_the_language_models_tensors_and_an_image_side_that_is_made_once(tmp_path, monkeypatch):
    saved, made = save_smolvlm(tmp_path / "tiny"), []
    config, words = open_hf(saved)[0], load_processor(saved).tokenizer

    def init(key):
        made.append(functional(config).init(key))
        return made[-1]

    norm = np.full(sizes(config)["text/embed"], 2.0, np.float32)
    monkeypatch.setattr(base, "preset", lambda name: config)
    monkeypatch.setattr(base, "functional", lambda config: functional(config)._replace(init=init))
    monkeypatch.setattr(base, "language_folder", lambda: saved)
    monkeypatch.setattr(base, "language_tensors", lambda: {"model.norm.weight": norm})
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **options: words)
    base.write(tmp_path / "model", None)
    (new,) = made
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.text_model.norm.weight"], norm)
    bridge = jax.tree.map(lambda leaf: base.WORDS * leaf, new["bridge"])
    for name, values in hf_tensors(config, {**new, "bridge": bridge}):
        if name != "model.text_model.norm.weight":
            np.testing.assert_array_equal(tensors[name], values)
    assert load_processor(tmp_path / "model").chat_template == base.CHATML


def test_paragraphs_are_long_sentences_without_code():
    words = "A sentence of many words that goes on and on until it is long enough to be prose, " * 6
    prose = words.strip()[:-1] + "."
    texts = [f"{prose}\n\n>>> code\n\n{prose} >>> x.\n\nToo short.\n\n    {prose}\n\n{prose.lower()}", prose]
    assert paragraphs(texts) == [prose]
    assert len(prose.split()) > 2 * GIVEN
