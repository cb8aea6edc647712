"""The files beside config and weights that an export takes over from another checkpoint."""

import shutil
from pathlib import Path

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.hub import contents

COMPANIONS = frozenset(
    (
        *("generation_config.json", "antgmm.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
        *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
        *("chat_template.jinja", "chat_template.json"),
    )
)
"""Names of tokenizer, processor, generation settings and licence: no code, no pickles, no notes about the model.

Nor Mistral's tekken.json: where mistral-common is installed, it replaces tokenizer.json and the chat template, and with
them the prompts that the model was trained on.
"""
SECOND = "qformer_tokenizer"
"""Folder of the tokenizer of a Q-Former that reads text; another tokenizer is taken in its place if it is missing."""


def copy_companions(source: Path, target: Path) -> None:
    """Copies the `COMPANIONS` of a checkpoint.

    Args:
        source: Hugging Face directory; links are followed only inside the cache of `huggingface_hub`.
        target: directory to copy to.

    Raises:
        AntgmmError: one of the files is a link.
    """
    source = source.resolve()
    blobs = contents(source)
    for folder in ("", SECOND):
        if (source / folder).is_dir():
            _copy(source / folder, target / folder, source, blobs)


def _copy(folder: Path, target: Path, source: Path, blobs: Path) -> None:
    """Copies the files of a folder of the checkpoint `source`; links of a cache lead to its `blobs`."""
    if folder.is_symlink():
        raise AntgmmError(f"{folder} is a link, and an export copies no link's target: replace it with the folder")
    target.mkdir(exist_ok=True)
    for name in sorted(COMPANIONS & {path.name for path in folder.iterdir()}):
        path = folder / name
        if path.is_symlink() and (blobs == source or path.resolve().parent != blobs):
            raise AntgmmError(f"{path} is a link, and an export copies no link's target: replace it with the file")
        if path.is_file():
            shutil.copyfile(path, target / name)
