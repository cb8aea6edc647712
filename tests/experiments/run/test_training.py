"""The initial model of a training: the files of its processor."""

import dataclasses
import re

import pytest

from antgmm_jax.families import FAMILIES, new_processor
from antgmm_jax.families.common.words import IMAGE
from antgmm_jax.io.convert import _write_config
from antgmm_jax.io.loading import hf_config
from antgmm_jax.presets import PRESETS
from data.tokenizer import corpus, train_tokenizer
from experiments.run.training import save_processor


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus("s", 200), vocab=256, min_frequency=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_that_a_new_config_names_is_in_its_vocabulary(tokenizer, tmp_path, family):
    """The defaults of transformers are ids of the released models: servers would look for a video's token there."""
    like = next(config for config in PRESETS.values() if config.family == family)
    processor = new_processor(like, tokenizer)
    vocab = len(processor.tokenizer)
    language = dataclasses.replace(like.language, vocab=vocab)
    config = dataclasses.replace(like, language=language, image_token=IMAGE)
    save_processor(processor, tmp_path / "like", config)
    (tmp_path / "out").mkdir()
    _write_config(config, {}, tmp_path / "out", tmp_path / "like")
    made = hf_config(tmp_path / "out")
    named = {
        name: token
        for table in (made.to_dict(), made.get_text_config().to_dict())
        for name, token in table.items()
        if re.fullmatch(r"[a-z]\w*_token_(id|index)", name) and token is not None
    }
    assert {name: token for name, token in named.items() if token >= vocab} == {}
    texts = {name: processor.tokenizer.convert_ids_to_tokens(token) for name, token in named.items()}
    assert all("video" in text for name, text in texts.items() if name.startswith("video_"))
    assert all("vision" in text for name, text in texts.items() if name.startswith("vision_"))
