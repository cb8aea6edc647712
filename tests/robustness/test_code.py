"""No code beside a checkpoint runs, and no file of a checkpoint or a report reaches beyond its folder."""

import json
from contextlib import suppress

import pytest
from safetensors.numpy import load_file, save_file

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from experiments.report.write import render
from experiments.run.export.ends import end_tokens
from experiments.run.export.in_torch import torch_model
from tests.experiments.report.test_report_page import made
from tests.experiments.tiny import save_llava, save_teacher

LOADS = {
    "config.json": {"AutoConfig": "hostile.Hostile", "AutoModel": "hostile.Hostile"},
    "processor_config.json": {"AutoProcessor": "hostile.Hostile"},
    "tokenizer_config.json": {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]},
    "preprocessor_config.json": {"AutoImageProcessor": "hostile.Hostile"},
}


@pytest.fixture
def model(tmp_path):
    """A checkpoint with code beside it that would write the file `ran`."""
    directory = save_teacher(tmp_path / "model")
    (directory / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Hostile: pass\n")
    return directory


def changed(path, **fields):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


@pytest.mark.parametrize("file", LOADS)
def test_code_beside_a_checkpoint_never_runs(model, file):
    changed(model / file, auto_map=LOADS[file])
    for load in (load_processor, open_hf, end_tokens, torch_model):
        with suppress(AntgmmError):
            load(model)
    assert not (model.parent / "ran").exists()


def test_a_processor_class_of_its_own_is_refused(model):
    changed(model / "processor_config.json", auto_map=LOADS["processor_config.json"], processor_class="Hostile")
    with pytest.raises(AntgmmError, match="has no processor"):
        load_processor(model)
    assert not (model.parent / "ran").exists()


def test_only_models_of_transformers_are_loaded(model):
    changed(model / "config.json", architectures=["pipeline"])
    with pytest.raises(AntgmmError, match="has no architecture of transformers"):
        torch_model(model)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_stored_under_two_names_is_refused_if_they_differ(tmp_path, equal):
    path = save_llava(tmp_path / "model") / "model.safetensors"
    tensors = load_file(path)
    older, newer = "language_model.lm_head.weight", "lm_head.weight"
    head = tensors.get(older, tensors.get(newer))
    save_file({**tensors, older: head, newer: head if equal else head + 1}, path, metadata={"format": "pt"})
    if equal:
        open_hf(tmp_path / "model")
    else:
        with pytest.raises(AntgmmError, match=rf"{older} and {newer} .* differ"):
            open_hf(tmp_path / "model")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "ads/../../secret", "ads/link.png", "ads/01.png", 3])
def test_a_report_embeds_only_its_own_pictures(tmp_path, name):
    report, folder = made(), tmp_path / "run/report"
    (folder / "ads").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "run/secret").write_text("secret")
    for link in ("link", "01"):
        (folder / f"ads/{link}.png").symlink_to(tmp_path / "secret")
    report["examples"][0]["picture"] = name
    with pytest.raises(AntgmmError, match=r"report\.json"):
        render(folder, report)
