"""Commands with names of the Hub, against a local mirror."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.io import hub
from antgmm_jax.io.convert import load_hf
from data.maad import source
from data.writers import write_parquet
from tests.experiments.tiny import save_llava, save_stage, save_teacher
from tests.hub_mirror import mirrored

# Commands may cause warnings of PyTorch and transformers.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def mirror(tmp_path_factory):
    """A mirror with a teacher, a model that vLLM has, and a data set in two shards."""
    folder = tmp_path_factory.mktemp("files")
    save_teacher(folder / "teacher")
    write_parquet(source("s", "test", 6), folder / "all.parquet")
    table, rows = pq.read_table(folder / "all.parquet"), {}
    for number in range(2):
        sink = pa.BufferOutputStream()
        pq.write_table(table.slice(3 * number, 3), sink)
        rows[f"data/test-{number}.parquet"] = sink.getvalue().to_pybytes()
    save_llava(folder / "llava")
    models = {
        f"models/org/{name}": {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        for name in ("teacher", "llava")
    }
    with mirrored({**models, "datasets/org/rows": rows}, folder / "cache") as mirror:
        yield mirror


def test_a_model_is_described_evaluated_and_shrunk_by_name(antgmm, mirror, tmp_path):
    described = json.loads(antgmm("import", "hf:org/teacher", "--json").stdout)
    config, _ = load_hf("hf:org/teacher")
    assert {axis: about["size"] for axis, about in described["axes"].items()} == sizes(config)
    assert not described["chat"]["template"] and described["chat"]["text"] == "question"
    assert json.loads(antgmm("cost", "hf:org/teacher", "--json").stdout)["params"] == described["params"]
    words = ("--data", "parquet:hf:org/rows/data/test-*.parquet", "--max-new-tokens", "2", "--json")
    assert json.loads(antgmm("eval", "hf:org/teacher", *words).stdout)["count"] == 6
    antgmm("shrink", "hf:org/teacher", "--size", "vision/layers=1", "--importance", "magnitude", "--out", "small")
    assert sizes(load_hf(tmp_path / "small")[0])["vision/layers"] == 1


@pytest.mark.long
def test_an_export_is_uploaded(antgmm, mirror, tmp_path):
    config, params = load_hf("hf:org/llava")
    keep = pruning.plan(pruning.magnitude(params, config), config, {"vision/layers": 1})
    smaller = save_stage(tmp_path / "stage", config, params, keep)
    words = ["export", "stage", "--like", "hf:org/llava", "--out", "out", "--samples", "2", "--max-new-tokens", "2"]
    words += ["--data", "parquet:hf:org/rows/data/test-*.parquet", "--quantize", "w8a8"]
    result = antgmm(*words, "--push", "hf:org/student")
    assert result.exit_code == 0, result.output
    noted = "the quantized copy is uploaded by `hf upload org/student-w8a8 out-w8a8 --private"
    uploaded = f"uploaded: {mirror.url}/org/student/commit/"
    assert result.stderr.index(noted) < result.stderr.index(uploaded)  # a failed upload must not cost the copy
    assert mirror.created[0]["visibility"] == "private"
    assert mirror.files["models/org/student"] == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()
    }
    assert load_hf("hf:org/student")[0] == smaller


@pytest.mark.parametrize(
    "words",
    [
        ("compress", "r.toml", "--run", "run"),
        ("train", "r.toml", "--run", "run"),
        ("recombine", "r.toml", "--run", "run", "--steps", "1", "--from", "a"),
        ("export", "stage", "--like", "t", "--out", "out"),
    ],
    ids=lambda words: words[0],
)
def test_an_upload_that_cannot_work_is_refused_first(refused, monkeypatch, tmp_path, words):
    assert refused(*words, "--push", "org/student") == "--push org/student: write it as hf:ORG/NAME"
    monkeypatch.setenv(hub.OFFLINE, "1")
    message = "--push hf:org/student: HF_HUB_OFFLINE is set: unset it, or leave out --push"
    assert refused(*words, "--push", "hf:org/student") == message
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_files_to_download_are_named(refused, mirror, monkeypatch):
    monkeypatch.setenv(hub.OFFLINE, "1")
    assert "run `hf download org/other --include '*.safetensors'" in refused("import", "hf:org/other")
    assert "is not a name of the Hub: write it as hf:ORG/NAME" in refused("cost", "hf:other")
