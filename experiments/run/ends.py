"""The tokens that end and pad an answer, as the files of a checkpoint say."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from antgmm_jax.io.hub import local


def end_tokens(directory: Path) -> tuple[Any, int]:
    """Returns the end token or tokens and the padding token of a checkpoint.

    Args:
        directory: Hugging Face directory.

    Returns:
        eos and pad, from generation_config.json, else from config.json, else the defaults 1 and 0.
    """
    directory = local(directory)
    path = directory / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    text = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()

    def token(name: str, default: int) -> Any:
        candidates = (generation.get(name), getattr(text, name, None), default)
        return next(value for value in candidates if value is not None)

    pad = token("pad_token_id", 0)
    return token("eos_token_id", 1), pad if isinstance(pad, int) else pad[0]
