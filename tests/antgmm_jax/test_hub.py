"""Names of the Hub, against a local mirror: downloads, the cache without a network, errors and uploads."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import snapshot_download

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import hub
from antgmm_jax.io.convert import load_hf, save_hf
from data.readers import read_records
from tests import reference
from tests.data.own_files import picture, png
from tests.hub_mirror import mirrored

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = "models/org/tiny", "datasets/org/rows"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a checkpoint, with some that must not be downloaded."""
    folder = reference.saved(reference.llava(), tmp_path_factory.mktemp("hub") / "model")
    read = {path.name: path.read_bytes() for path in folder.iterdir()}
    card = {"README.md": b"---\nlicense: mit\n---\n"}
    return {**read, **card, "tokenizer.json": b"{}", "modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}


@pytest.fixture
def mirror(files, tmp_path):
    """A mirror with a model and a data set, and an empty cache."""
    repositories = {MODEL: {**files, "onnx/config.json": b"{}"}, DATA: rows(tmp_path)}
    with mirrored(repositories, tmp_path / "cache") as mirror:
        yield mirror


def rows(folder):
    """A data set of Parquet shards by split, and of JSONL with a picture."""
    table = pa.table({"image": [png(picture(0))], "question": ["what?"], "answer": ["a dog"]})
    pq.write_table(table, folder / "rows.parquet")
    line = {"image": "images/1.png", "question": "which?", "answer": "this"}
    return {
        **{f"data/train-{number}.parquet": (folder / "rows.parquet").read_bytes() for number in range(2)},
        "data/test-0.parquet": (folder / "rows.parquet").read_bytes(),
        "text/rows.jsonl": json.dumps(line).encode(),
        "text/images/1.png": png(picture(1)),
        "text/images/load.py": b"raise SystemExit",
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:org/name", ("org/name", "", "")),
        ("hf:org/na.me-1@v1.0", ("org/na.me-1", "v1.0", "")),
        ("hf:org/name/data/train-*.parquet", ("org/name", "", "data/train-*.parquet")),
        ("hf:org/name@main/data", ("org/name", "main", "data")),
    ],
)
def test_names_are_parsed_and_printed(text, parts):
    assert hub.parse(text) == hub.Repository(*parts)
    assert str(hub.parse(text)) == text
    assert hub.parse("hf:org/name/data/").path == "data"


@pytest.mark.parametrize("text", ["hf:name", "hf:org/name/../other", "hf:org/name@", "hf:", "hf:a b/c"])
def test_invalid_names_are_refused(text):
    with pytest.raises(AntgmmError, match="is not a name of the Hub: write it as hf:ORG/NAME or hf:ORG/NAME@REVISION"):
        hub.local(text)


def test_a_path_is_returned_unchanged_without_any_request(mirror):
    assert hub.local("some/folder") == Path("some/folder") and hub.pinned("some/folder") == "some/folder"
    assert mirror.requests == []


def test_a_model_is_downloaded_without_pickles_and_code(mirror, files, tmp_path):
    folder = hub.local("hf:org/tiny")
    allowed = {name for name in files if not name.endswith((".py", ".bin"))}
    assert {path.name for path in folder.iterdir()} == allowed
    assert folder.name == mirror.commit(MODEL)
    config, params = load_hf("hf:org/tiny")
    save_hf(config, params, tmp_path / "copy", like="hf:org/tiny")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == b"{}"
    assert load_hf(tmp_path / "copy")[0] == config


def test_a_complete_snapshot_is_used_without_a_network(mirror, monkeypatch):
    folder = hub.local("hf:org/tiny")
    hub._snapshot.cache_clear()
    before = len(mirror.requests)
    monkeypatch.setenv(hub.OFFLINE, "1")
    assert hub.local("hf:org/tiny") == folder
    assert hub.local(hub.pinned("hf:org/tiny")) == folder
    assert len(mirror.requests) == before
    (folder / "model.safetensors").unlink()
    hub._snapshot.cache_clear()
    with pytest.raises(AntgmmError, match="hf:org/tiny is not in the cache and cannot be downloaded"):
        hub.local("hf:org/tiny")


@pytest.mark.parametrize("offline", ["1", "0"], ids=["forbidden", "unreachable"])
def test_without_a_network_what_transformers_downloaded_is_enough(mirror, monkeypatch, files, offline):
    """It takes no card and no licence, but keeps the list of all files."""
    mirror.files[MODEL] |= {"LICENSE": b"MIT", "trainer_state.json": b"{}"}
    needed = [*(name for name in files if name.endswith("safetensors")), "config.json", "generation_config.json"]

    def downloaded(*names):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        snapshot_download("org/tiny", allow_patterns=[*needed, *names], endpoint=mirror.url)

    def read():
        hub._snapshot.cache_clear()
        with monkeypatch.context() as patch:
            patch.setenv(hub.OFFLINE, offline)
            patch.setenv(hub.ENDPOINT, "http://127.0.0.1:1")
            patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
            return hub.local("hf:org/tiny")

    downloaded()
    with pytest.raises(AntgmmError, match="hf:org/tiny is not in the cache and cannot be downloaded"):
        read()  # its tokenizer is missing
    downloaded("tokenizer.json")
    folder = read()
    assert not (folder / "README.md").exists()
    assert load_hf(folder)[0] == load_hf("hf:org/tiny")[0]
    hub._snapshot.cache_clear()
    assert (hub.local("hf:org/tiny") / "README.md").exists()  # with a network, the rest is downloaded


@pytest.mark.parametrize("offline", ["1", "0"], ids=["forbidden", "unreachable"])
def test_without_a_network_the_command_to_download_is_named(mirror, monkeypatch, offline):
    monkeypatch.setenv(hub.OFFLINE, offline)
    monkeypatch.setenv(hub.ENDPOINT, "http://127.0.0.1:1")
    with pytest.raises(AntgmmError) as caught:
        hub.local("hf:org/tiny@v1")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(
        "where there is a network, run `hf download org/tiny --revision v1 --include '*.safetensors' '*.json' '*.txt'"
        " '*.model' '*.jinja' 'README.md' 'LICENSE' 'LICENSE.md' 'NOTICE' --local-dir tiny`, and use the folder tiny as"
        " path"
    )
    with pytest.raises(AntgmmError, match=r"run `hf download org/rows --repo-type dataset --include 'data/\*.parquet'"):
        hub.local("hf:org/rows/data", "parquet")


def test_a_model_without_safetensors_is_refused(mirror):
    del mirror.files[MODEL]["model.safetensors"]
    with pytest.raises(AntgmmError, match="^hf:org/tiny has no safetensors: convert it"):
        load_hf("hf:org/tiny")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "other"}, "model_type 'other' is not supported: use one of"),
        ({"quantization_config": {"bits": 4}}, "is quantized, which only transformers and vLLM read"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer = \[-2, -1\] is not supported"),
    ],
    ids=["family", "quantized", "variant"],
)
def test_a_model_that_is_not_supported_is_refused_before_its_weights_are_downloaded(mirror, fields, message):
    content = json.loads(mirror.files[MODEL]["config.json"]) | fields
    mirror.files[MODEL]["config.json"] = json.dumps(content).encode()
    with pytest.raises(AntgmmError, match=message):
        hub.local("hf:org/tiny")
    assert [request for request in mirror.requests if "config.json" in request]
    assert not [request for request in mirror.requests if "safetensors" in request]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:org/none", "hf:org/none: there is no such public model on the Hub: check the name"),
        ("hf:org/tiny@v9", "hf:org/tiny@v9: there is no revision 'v9'"),
        ("hf:org/tiny/config.json", "hf:org/tiny/config.json is not a name of a model"),
    ],
)
def test_missing_repositories_and_revisions_are_named(mirror, name, message):
    with pytest.raises(AntgmmError, match=message):
        hub.local(name)


def test_a_pinned_name_is_that_of_the_commit(mirror):
    first = mirror.commit(MODEL)
    assert hub.pinned("hf:org/tiny") == f"hf:org/tiny@{first}"
    assert hub.pinned("hf:org/rows/data/test-*.parquet", "parquet") == (
        f"hf:org/rows@{mirror.commit(DATA)}/data/test-*.parquet"
    )
    mirror.files[MODEL]["tokenizer.json"] = b'{"new": 1}'
    hub._snapshot.cache_clear()
    assert hub.pinned("hf:org/tiny") == f"hf:org/tiny@{mirror.commit(MODEL)}" != f"hf:org/tiny@{first}"
    # The older commit is still in the cache.
    assert (hub.local(f"hf:org/tiny@{first}") / "tokenizer.json").read_bytes() == b"{}"


def test_rows_of_a_data_set_are_read_by_folder_file_and_pattern(mirror):
    for path, count in (("data/train-*.parquet", 2), ("data/test-0.parquet", 1)):
        records = read_records("parquet", f"hf:org/rows/{path}")
        assert len(records) == count
        np.testing.assert_array_equal(records[0].images[0], picture(0))
        downloaded = {request.partition("/data/")[2] for request in mirror.requests if "/resolve/" in request}
        assert ("test-0.parquet" in downloaded) == (count != 2)
    with pytest.raises(AntgmmError, match=r"/data holds the splits test, train, .* such as .*train-\*\.parquet"):
        read_records("parquet", "hf:org/rows/data")
    mirror.files[DATA]["other/en/new.parquet"] = b"PAR1"  # files in folders below are not downloaded
    hub._snapshot.cache_clear()
    with pytest.raises(AntgmmError, match=r"such as hf:ORG/NAME/data|has parquet files in folders"):
        read_records("parquet", "hf:org/rows")
    assert not [request for request in mirror.requests if "new.parquet" in request]
    (record,) = read_records("jsonl", "hf:org/rows/text/rows.jsonl")
    np.testing.assert_array_equal(record.images[0], picture(1))
    assert not any(".py" in request for request in mirror.requests)


def test_an_export_is_uploaded_to_a_private_repository(mirror, files, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    for name, content in files.items():
        (export / name).write_bytes(content)
    url = hub.push(export, "hf:org/student")
    (request,) = mirror.created
    assert (request["name"], request["visibility"]) == ("student", "private")
    allowed = {name: content for name, content in files.items() if not name.endswith((".py", ".bin"))}
    assert mirror.files["models/org/student"] == allowed
    assert url == f"{mirror.url}/org/student/commit/{mirror.commit('models/org/student')}"
    config, _ = load_hf("hf:org/student")
    assert config.family == "llava"


def test_a_second_upload_removes_files_that_servers_would_load_of_the_first(mirror, files, tmp_path):
    shards = {f"model-0000{number}-of-00002.safetensors": b"old" for number in (1, 2)}
    old = {**shards, "model.safetensors.index.json": b"{}", "merges.txt": b"a b", "a[1].safetensors": b"old"}
    own = {"README.md": b"mine", "requirements.txt": b"x", "onnx/config.json": b"{}", "results.json": b"{}"}
    mirror.files["models/org/student"] = {**old, "config.json": b"old", "qformer_tokenizer/vocab.json": b"{}", **own}
    export = tmp_path / "export"
    export.mkdir()
    for name in ("config.json", "model.safetensors"):
        (export / name).write_bytes(files[name])
    hub.push(export, "hf:org/student")
    uploaded = {name: files[name] for name in ("config.json", "model.safetensors")}
    assert mirror.files["models/org/student"] == {**uploaded, **own}


def test_a_failed_upload_names_the_command_that_repeats_it(mirror, monkeypatch, tmp_path):
    monkeypatch.setenv(hub.ENDPOINT, "http://127.0.0.1:1")
    with pytest.raises(AntgmmError, match="was not uploaded to hf:org/x .* run `hf upload") as error:
        hub.push(tmp_path, "hf:org/x")
    assert str(error.value).endswith(f"`hf upload org/x {tmp_path} --private --delete 'model*.safetensors*'`")
    monkeypatch.setenv(hub.ENDPOINT, "http://me:SECRET@127.0.0.1:1")
    with pytest.raises(AntgmmError, match="was not uploaded") as error:
        hub.push(tmp_path, "hf:org/x")
    assert "SECRET" not in str(error.value)
    assert hub._line(ValueError("401 for http://me:SECRET@host/a")) == "401 for http://host/a"
    for name in ("org/x", "hf:org/x@main", "hf:org/x/y"):
        with pytest.raises(AntgmmError, match=f"--push {name}: write it as hf:ORG/NAME"):
            hub.check_target(name)
    monkeypatch.setenv(hub.OFFLINE, "1")
    with pytest.raises(AntgmmError, match="HF_HUB_OFFLINE is set: unset it, or leave out --push"):
        hub.check_target("hf:org/x")


@pytest.mark.long
def test_commands_download_names_unless_the_user_is_offline(mirror, tmp_path):
    """In a process of its own, as a user starts it: only `HF_ENDPOINT` and `HF_HOME` lead to the mirror."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
    code = """
        from experiments.cli import environment
        environment()
        import os
        from antgmm_jax.errors import AntgmmError
        from antgmm_jax.io.hub import local
        try:
            print(os.environ["HF_HUB_OFFLINE"], local("hf:org/tiny").name)
        except AntgmmError as error:
            print(error)
    """

    def run(**more):
        environment = {**clean, "HF_ENDPOINT": mirror.url, **more}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert "run `hf download org/tiny" in run(HF_HUB_OFFLINE="1")
    assert run() == f"1 {mirror.commit(MODEL)}\n"
    assert run(HF_HUB_OFFLINE="1") == f"1 {mirror.commit(MODEL)}\n"
