"""The processor of a checkpoint is loaded without running its code, and names the cache of its rows."""

import json

import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import new_processor
from antgmm_jax.presets import preset
from data.encoding import Encoder
from data.tokenizer import corpus, train_tokenizer
from experiments.run.samples import load_processor
from tests.experiments.tiny import save_teacher


def test_code_beside_a_processor_is_never_run(tmp_path):
    directory = save_teacher(tmp_path / "teacher")
    config = json.loads((directory / "processor_config.json").read_text())
    config["auto_map"] = {"AutoProcessor": "processing.Hostile"}
    (directory / "processor_config.json").write_text(json.dumps(config))
    (directory / "processing.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Hostile: pass\n")
    load_processor(directory)
    config["processor_class"] = "Hostile"
    (directory / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(AntgmmError, match="has no processor"):
        load_processor(directory)
    assert not (tmp_path / "ran").exists()


def test_a_new_processor_and_its_saved_files_share_the_cache_of_rows(tmp_path):
    config = preset("llava-tiny")
    new = new_processor(config, train_tokenizer(corpus("s", 50), vocab=256, min_frequency=2))
    new.save_pretrained(tmp_path / "model")
    loaded = load_processor(tmp_path / "model")
    assert Encoder(loaded, config).digest() == Encoder(new, config).digest()
    loaded.tokenizer.add_tokens(["price"])
    assert Encoder(loaded, config).digest() != Encoder(new, config).digest()
