"""The tokens that end and pad an answer, as the files of a checkpoint say."""

from pathlib import Path
from typing import Any

from antgmm_jax.io.hub import local
from antgmm_jax.io.loading import generation_settings, hf_config


def end_tokens(directory: Path) -> tuple[Any, int]:
    """Returns the end token or tokens and the padding token of a checkpoint.

    Args:
        directory: Hugging Face directory.

    Returns:
        eos and pad, from generation_config.json, else from config.json, else the defaults 1 and 0.
    """
    directory = local(directory)
    generation = generation_settings(directory)
    text = hf_config(directory).get_text_config()

    def token(name: str, default: int) -> Any:
        candidates = (generation.get(name), getattr(text, name, None), default)
        return next(value for value in candidates if value is not None)

    pad = token("pad_token_id", 0)
    return token("eos_token_id", 1), pad if isinstance(pad, int) else pad[0]


def as_tuple(eos: Any) -> tuple[int, ...]:
    """Returns the first result of `end_tokens`, a token or several, as a tuple."""
    return (eos,) if isinstance(eos, int) else tuple(eos)
