"""The cache of encoded rows goes by the contents of a processor, not by where it comes from."""

from antgmm_jax.families import new_processor
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import preset
from data.encoding import Encoder
from data.tokenizer import corpus, train_tokenizer


def test_a_new_processor_and_its_saved_files_share_the_cache_of_rows(tmp_path):
    config = preset("llava-tiny")
    new = new_processor(config, train_tokenizer(corpus("s", 50), vocab=256, min_frequency=2))
    new.save_pretrained(tmp_path / "model")
    loaded = load_processor(tmp_path / "model")
    assert Encoder(loaded, config).digest() == Encoder(new, config).digest()
    loaded.tokenizer.add_tokens(["price"])
    assert Encoder(loaded, config).digest() != Encoder(new, config).digest()
