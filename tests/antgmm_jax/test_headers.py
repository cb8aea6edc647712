"""Config, shapes and dtypes of a checkpoint of a local mirror of the Hub, without its weights."""

import json

import jax
import pytest
from safetensors.numpy import load_file, save_file

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import hub
from antgmm_jax.io.convert import load_hf, save_hf
from antgmm_jax.io.headers import describe
from tests import reference
from tests.hub_mirror import mirrored

MODEL = "models/org/tiny"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return reference.saved(reference.llava(), tmp_path_factory.mktemp("headers") / "model")


@pytest.fixture(params=["one file", "shards"])
def folder(request, saved, tmp_path):
    """A checkpoint in one file or in shards."""
    if request.param == "one file":
        return saved
    config, params = load_hf(saved)
    save_hf(config, params, tmp_path / "sharded", like=saved, max_shard_size="200KB")
    return tmp_path / "sharded"


@pytest.fixture
def mirror(folder, tmp_path):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with mirrored({MODEL: files}, tmp_path / "cache") as mirror:
        yield mirror


def test_the_headers_describe_what_the_whole_file_holds(mirror, folder):
    config, shapes = describe("hf:org/tiny")
    expected, params = load_hf(folder)
    assert config == expected
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
    whole = sum(len(data) for name, data in mirror.files[MODEL].items() if name.endswith(".safetensors"))
    assert mirror.sent < whole


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_head_is_compared_with_the_token_table_by_its_first_bytes(tmp_path, tied):
    """config.json of InternVL3 says nothing of it, which means tied, and a file may hold the head in both cases."""
    saved = reference.saved(reference.llava(), tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (saved / "config.json").write_text(json.dumps(config))
    tensors = load_file(saved / "model.safetensors")
    if tied:
        (table,) = (values for name, values in tensors.items() if name.endswith("embed_tokens.weight"))
        tensors[next(name for name in tensors if name.endswith("lm_head.weight"))] = table.copy()
        save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    with mirrored({MODEL: files}, tmp_path / "cache"):
        described, _ = describe("hf:org/tiny")
    assert described == load_hf(saved)[0]
    assert described.language.tied == tied


def test_a_cached_snapshot_is_described_without_a_network(mirror, monkeypatch):
    online = describe("hf:org/tiny")
    hub.local("hf:org/tiny")
    hub._snapshot.cache_clear()
    sent = mirror.sent
    assert describe("hf:org/tiny") == online and mirror.sent == sent
    with monkeypatch.context() as patch:
        patch.setenv(hub.ENDPOINT, "http://127.0.0.1:1")  # unreachable
        assert describe("hf:org/tiny") == online
    monkeypatch.setenv(hub.OFFLINE, "1")
    before = len(mirror.requests)
    assert describe("hf:org/tiny") == online and len(mirror.requests) == before


def test_without_a_network_and_a_cache_the_command_to_download_the_model_is_named(mirror, monkeypatch):
    monkeypatch.setenv(hub.ENDPOINT, "http://127.0.0.1:1")
    with pytest.raises(AntgmmError, match=r"run `hf download org/tiny --include '\*.safetensors' '\*.json'"):
        describe("hf:org/tiny")


@pytest.mark.parametrize("folder", ["one file"], indirect=True)
def test_an_index_that_leads_out_of_the_folder_is_refused(mirror):
    mirror.files[MODEL]["sub/model.safetensors"] = mirror.files[MODEL].pop("model.safetensors")
    mirror.files[MODEL]["model.safetensors.index.json"] = b'{"weight_map": {"a": "sub/model.safetensors"}}'
    with pytest.raises(AntgmmError, match="contains 'sub/model.safetensors', which is outside the checkpoint"):
        describe("hf:org/tiny")


def test_a_model_without_safetensors_is_refused(mirror):
    for name in [name for name in mirror.files[MODEL] if "safetensors" in name]:
        del mirror.files[MODEL][name]
    with pytest.raises(AntgmmError, match="^hf:org/tiny has no safetensors: convert it"):
        describe("hf:org/tiny")


def test_a_repository_that_is_not_there_is_named(mirror):
    with pytest.raises(AntgmmError, match="hf:org/other: there is no such public model on the Hub"):
        describe("hf:org/other")
