"""The tokens that end and pad an answer, as the files of a checkpoint say."""

from pathlib import Path
from typing import Any

from antgmm_jax.io.hub import local
from antgmm_jax.io.loading import generation_settings, hf_config
from data.encoding import Encoder


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


def answer_tokens(directory: Path, encoder: Encoder) -> tuple[tuple[int, ...], int]:
    """Returns the tokens that end an answer and the one that fills rows, for a model that reads rows.

    Files of some checkpoints name no padding token, or another end token than the chat template writes.

    Args:
        directory: Hugging Face directory.
        encoder: encoder of records for the model.

    Returns:
        The end tokens, that of training first and then those that generation_config.json adds; and the padding token.
    """
    further = generation_settings(local(directory)).get("eos_token_id") or ()
    return tuple(dict.fromkeys([encoder.eos, *as_tuple(further)])), encoder.pad


def as_tuple(eos: Any) -> tuple[int, ...]:
    """Returns the first result of `end_tokens`, a token or several, as a tuple."""
    return (eos,) if isinstance(eos, int) else tuple(eos)
