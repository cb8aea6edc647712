"""Files that an export takes over, and those of a model on the Hub."""

import pytest
from huggingface_hub.utils import filter_repo_objects

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.companions import SECOND, copy_companions
from antgmm_jax.io.hub import _SKIPPED, MODEL


@pytest.fixture
def source(tmp_path):
    """A checkpoint with a second tokenizer, code and another format."""
    names = (
        "tokenizer.json",
        "tekken.json",
        "run.py",
        f"{SECOND}/tokenizer.json",
        f"{SECOND}/vocab.txt",
        f"{SECOND}/run.py",
        "onnx/vocab.txt",
    )
    for name in names:
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "source"


def test_both_tokenizers_are_copied_and_nothing_else(source, tmp_path):
    (target := tmp_path / "target").mkdir()
    copy_companions(source, target)
    copied = {str(file.relative_to(target)): file.read_text() for file in target.rglob("*") if file.is_file()}
    assert copied == {name: name for name in ("tokenizer.json", f"{SECOND}/tokenizer.json", f"{SECOND}/vocab.txt")}


def test_links_are_refused_in_both(source, tmp_path):
    (tmp_path / "secret").write_text("secret")
    for number, name in enumerate((f"{SECOND}/merges.txt", "merges.txt")):
        (source / name).symlink_to(tmp_path / "secret")
        (target := tmp_path / f"target-{number}").mkdir()
        with pytest.raises(AntgmmError, match=r"merges\.txt is a link, and an export copies no link's target"):
            copy_companions(source, target)
        (source / name).unlink()
    (source / SECOND).rename(tmp_path / "folder")
    (source / SECOND).symlink_to(tmp_path / "folder")
    (target := tmp_path / "last").mkdir()
    with pytest.raises(AntgmmError, match="qformer_tokenizer is a link"):
        copy_companions(source, target)


def test_of_folders_on_the_hub_only_the_second_tokenizer_is_downloaded():
    wanted = ["config.json", "model-00001-of-00002.safetensors", f"{SECOND}/tokenizer.json", f"{SECOND}/vocab.txt"]
    others = [
        "onnx/config.json",
        "quantized/model.safetensors",
        "consolidated.safetensors",
        f"{SECOND}/code.py",
        "a/b.json",
    ]
    files = filter_repo_objects([*wanted, *others], allow_patterns=[*MODEL], ignore_patterns=[*_SKIPPED])
    assert [*files] == wanted
