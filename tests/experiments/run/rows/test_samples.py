"""Encoded rows: their cache, and room for answers."""

from dataclasses import replace

import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import preset
from data.encoding import Encoder
from data.maad import source
from data.tokenizer import corpus, train_tokenizer
from experiments.run.rows.samples import Samples


def test_a_new_processor_and_its_saved_files_share_the_cache_of_rows(tmp_path):
    """It goes by the contents of a processor, not by where it comes from."""
    config = preset("llava-tiny")
    new = new_processor(config, train_tokenizer(corpus("s", 50), vocab=256, min_frequency=2))
    new.save_pretrained(tmp_path / "model")
    loaded = load_processor(tmp_path / "model")
    assert Encoder(loaded, config).digest() == Encoder(new, config).digest()
    loaded.tokenizer.add_tokens(["price"])
    assert Encoder(loaded, config).digest() != Encoder(new, config).digest()


def test_answers_need_learned_positions_behind_the_longest_prompt():
    """The last token of an answer is not read."""
    config = preset("llava-tiny")
    processor = new_processor(config, train_tokenizer(corpus("s", 50), vocab=256, min_frequency=2))
    rows = source("s", "test", 3)
    longest = max(len(Encoder(processor, config)(record)["prompt"]) for record in rows)
    limited = replace(config, language=replace(config.language, learned_positions=longest + 9))
    samples = Samples(rows, processor, limited)
    samples.check_room(10)
    with pytest.raises(AntgmmError, match=f"needs {longest + 10} positions, and the model has {longest + 9}: shorten"):
        samples.check_room(11)
    Samples(rows, processor, config).check_room(4096)
