"""Loading and saving checkpoints: shards, other files, and errors."""

import json
from copy import deepcopy

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import convert
from antgmm_jax.io.convert import load_hf, save_hf
from antgmm_jax.io.tensors import INDEX, WEIGHTS
from antgmm_jax.presets import preset
from antgmm_jax.pure import functional
from tests import reference


def ours(directory, arrays):
    config, params = load_hf(directory)
    return np.asarray(functional(config).apply(params, reference.ours(arrays))["logits"])


def test_sharded_checkpoints_load_in_jax_and_pytorch(tmp_path):
    model = reference.blip2()
    arrays = reference.batch(model)
    reference.saved(model, tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / INDEX).exists()
    config, params = load_hf(tmp_path / "in")
    save_hf(config, params, tmp_path / "out", like=tmp_path / "in", max_shard_size="30KB")
    assert (tmp_path / "out" / INDEX).exists() and not (tmp_path / "out" / WEIGHTS).exists()
    expected = reference.logits(model, arrays)
    reference.close(ours(tmp_path / "out", arrays), expected)
    reference.close(reference.logits(reference.reloaded(tmp_path / "out"), arrays), expected)


def test_an_unusual_start_token_survives_a_round_trip(tmp_path):
    model = reference.blip2()
    model.config.text_config.decoder_start_token_id = 2
    config, params = load_hf(reference.saved(model, tmp_path / "in"))
    assert config.language.start_token == 2
    save_hf(config, params, tmp_path / "out")
    assert load_hf(tmp_path / "out")[0] == config
    assert reference.reloaded(tmp_path / "out").config.text_config.decoder_start_token_id == 2


def test_the_dtype_of_the_files_is_the_only_one_of_the_config(tmp_path):
    """SGLang computes in the dtype of `text_config`, if it has one."""
    reference.saved(reference.llava(), tmp_path / "in")
    raw = json.loads((tmp_path / "in" / "config.json").read_text())
    raw["torch_dtype"] = raw["text_config"]["torch_dtype"] = raw["vision_config"]["dtype"] = "float16"
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw))
    config, params = load_hf(tmp_path / "in")
    save_hf(config, params, tmp_path / "out", like=tmp_path / "in", dtype="bfloat16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written
    assert not {"dtype", "torch_dtype"} & {*written["text_config"], *written["vision_config"]}


def test_other_files_are_copied_and_other_weights_are_not(tmp_path):
    reference.saved(reference.llava(), tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "in" / "pytorch_model.bin.index.json").write_text("{}")  # names files that the copy lacks
    (tmp_path / "in" / "training.json").write_text("{}")  # describes the other model
    (tmp_path / "in" / "processing.py").write_text("raise SystemExit")
    (tmp_path / "in" / "state.pkl").write_bytes(b"pickle")
    config, params = load_hf(tmp_path / "in")
    save_hf(config, params, tmp_path / "out", like=tmp_path / "in")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_the_target_of_a_link_is_not_copied(tmp_path):
    source = reference.saved(reference.llava(), tmp_path / "in")
    (tmp_path / "secret").write_text("password")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    config, params = load_hf(source)
    save_hf(config, params, tmp_path / "out", like=source)
    assert "notes.txt" not in {path.name for path in (tmp_path / "out").iterdir()}
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(AntgmmError, match=r"in/vocab.txt is a link, .*: replace it with the file"):
        save_hf(config, params, tmp_path / "refused", like=source)
    # A folder that looks like the cache of the Hub, with its files elsewhere.
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    source.rename(cache / "snapshots" / "0")
    (cache / "blobs").symlink_to(tmp_path)
    with pytest.raises(AntgmmError, match="vocab.txt is a link"):
        save_hf(config, params, tmp_path / "refused", like=cache / "snapshots" / "0")
    assert not (tmp_path / "refused").exists()


@pytest.fixture
def checkpoint(tmp_path):
    return reference.saved(reference.blip2(), tmp_path / "checkpoint")


def _edit(checkpoint, change):
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


def test_a_missing_tensor_is_named(checkpoint):
    _edit(checkpoint, lambda t: t.pop("query_tokens"))
    with pytest.raises(AntgmmError, match="missing.*query_tokens"):
        load_hf(checkpoint)


def test_an_extra_tensor_is_named(checkpoint):
    _edit(checkpoint, lambda t: t.update(adapter=np.zeros(3, np.float32)))
    with pytest.raises(AntgmmError, match="unexpected tensors in the checkpoint: adapter"):
        load_hf(checkpoint)


def test_a_misshapen_tensor_is_named_with_both_shapes(checkpoint):
    name = "language_projection.weight"
    _edit(checkpoint, lambda t: t.update({name: t[name][:, :-1].copy()}))
    with pytest.raises(AntgmmError, match=r"language_projection.weight has shape \(16, 23\).*\(16, 24\)"):
        load_hf(checkpoint)


def test_a_nan_is_named(checkpoint):
    _edit(checkpoint, lambda t: t["qformer.layernorm.bias"].__setitem__(2, np.nan))
    with pytest.raises(AntgmmError, match="qformer.layernorm.bias contains NaN"):
        load_hf(checkpoint)


def test_a_file_cut_short_is_named(checkpoint):
    path = checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AntgmmError, match="model.safetensors cannot be read"):
        load_hf(checkpoint)


def test_pickled_weights_are_not_read(checkpoint):
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(AntgmmError, match="no model.safetensors"):
        load_hf(checkpoint)


def test_another_family_is_refused(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "qwen2_vl"}))
    with pytest.raises(AntgmmError, match="'qwen2_vl' is not supported: use one of blip-2, llava"):
        load_hf(checkpoint)


@pytest.mark.parametrize("part", ["bridge", "text"])
def test_an_unknown_activation_is_refused(part):
    """Configs of transformers may name others, also for a projector, which is no stack."""
    config = deepcopy(preset("llava-tiny"))
    layers, name = (config.bridge, "the projector") if part == "bridge" else (config.language.decoder, part)
    object.__setattr__(layers, "act", "gelu_fast")  # annotations, which only tests check, forbid it
    with pytest.raises(AntgmmError, match=f"activation 'gelu_fast' of {name} is not supported: use one of gelu, "):
        convert._check_activations(config)


def test_an_index_may_not_leave_the_folder(checkpoint):
    (checkpoint / WEIGHTS).rename(checkpoint.parent / "other.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"query_tokens": "../other.safetensors"}}))
    with pytest.raises(AntgmmError, match="outside the checkpoint"):
        load_hf(checkpoint)


def test_files_may_be_links_as_in_the_hubs_cache(checkpoint):
    config, _ = load_hf(checkpoint)
    blob = checkpoint.parent / "blob"
    (checkpoint / WEIGHTS).rename(blob)
    (checkpoint / WEIGHTS).symlink_to(blob)
    assert load_hf(checkpoint)[0] == config


@pytest.mark.parametrize("text", ["{}", '{"weight_map": ["model.safetensors"]}', "[]"])
def test_an_invalid_index_is_refused(checkpoint, text):
    (checkpoint / INDEX).write_text(text)
    (checkpoint / WEIGHTS).rename(checkpoint / "model-00001-of-00001.safetensors")
    with pytest.raises(AntgmmError, match=r"model\.safetensors\.index\.json .*copy it again"):
        load_hf(checkpoint)


def test_one_file_stands_before_the_index_of_shards_as_in_transformers(checkpoint):
    """`save_pretrained` into a folder of shards removes them, and leaves their index."""
    config, params = load_hf(checkpoint)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"query_tokens": "model-00001-of-00002.safetensors"}}))
    again, same = load_hf(checkpoint)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_an_existing_directory_is_not_overwritten(checkpoint):
    config, params = load_hf(checkpoint)
    with pytest.raises(AntgmmError, match="exists"):
        save_hf(config, params, checkpoint)


def test_a_failed_write_leaves_nothing(checkpoint, monkeypatch):
    config, params = load_hf(checkpoint)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("antgmm_jax.io.convert.write", full)
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(AntgmmError, match="No space left on device"):
        save_hf(config, params, checkpoint.parent / "out")
    assert sorted(checkpoint.parent.iterdir()) == before
