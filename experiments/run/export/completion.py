"""What servers and harnesses need in an export beyond the model: the settings of generation, and a finite length."""

from pathlib import Path

from transformers import GenerationConfig

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import read_json
from antgmm_jax.io.hub import local
from antgmm_jax.io.loading import CONFIG, GENERATION, hf_config, load_processor, splits_as_file, stock_processor
from data.encoding import Encoder
from experiments.run.export.ends import answer_tokens, as_tuple, end_tokens
from experiments.run.export.served_prompt import write_template
from experiments.run.files import write_json
from experiments.run.host.console import say

TOKENIZER = "tokenizer_config.json"
UNBOUNDED = 4096
"""Tokens of a prompt for a model with relative positions, which have no end: the default limit of `antgmm eval`."""
_FINITE = 2**31
"""Longer lengths in tokenizer_config.json mean none: transformers writes 1e30."""


def complete(directory: Path, config: LMMConfig) -> None:
    """Completes an export: chat template, tokenizer (class, side of padding, length), generation_config.json.

    Args:
        directory: Hugging Face directory; without a processor that can be loaded, its chat template stays as it is, and
            so does a generation_config.json.
        config: config of its model.
    """
    encoder = _encoder(directory, config)
    if encoder is not None:
        write_template(directory)
        _keep_rules(directory)
    if encoder is not None or not (directory / GENERATION).exists():
        _write_generation(directory, config, encoder)
    _limit_length(directory)
    if not config.encoder_decoder:
        _pad_left(directory)


def positions(directory: Path) -> int:
    """Returns the number of tokens that a model can read, by config.json, or `UNBOUNDED`.

    Args:
        directory: Hugging Face directory.
    """
    text = hf_config(directory).get_text_config()
    return getattr(text, "max_position_embeddings", None) or UNBOUNDED


def ends_of(directory: Path, config: LMMConfig) -> tuple[int | list[int], int]:
    """Returns the tokens that end and fill the answers of a checkpoint.

    Args:
        directory: Hugging Face directory, or a name of the Hub.
        config: config of its model.

    Returns:
        The end token or tokens and the padding token: those of `answer_tokens` if there is a processor, else of
        `end_tokens`.
    """
    return _ends(directory, _encoder(local(directory), config))


def _ends(directory: Path, encoder: Encoder | None) -> tuple[int | list[int], int]:
    if encoder is None:
        return end_tokens(directory)
    (first, *more), pad = answer_tokens(directory, encoder)
    return [first, *more] if more else first, pad


def _encoder(directory: Path, config: LMMConfig) -> Encoder | None:
    """Encodes records for the model; None without a processor."""
    if not any((directory / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        return Encoder(load_processor(directory), config)
    except AntgmmError as error:
        say(f"chat template and end token were not checked: {error}")
        return None


def _write_generation(directory: Path, config: LMMConfig, encoder: Encoder | None) -> None:
    """Writes settings for greedy decoding, as scores are measured, that stops at the end token of training."""
    eos, pad, start = *_ends(directory, encoder), None
    if encoder is not None:
        start = encoder.inputs.processor.tokenizer.bos_token_id  # pyright: ignore[reportAttributeAccessIssue]
    decoder = {"decoder_start_token_id": config.language.start_token} if config.encoder_decoder else {}
    GenerationConfig(bos_token_id=start, eos_token_id=eos, pad_token_id=pad, **decoder).save_pretrained(directory)
    _correct_text_config(directory, eos, pad)


def _correct_text_config(directory: Path, eos: int | list[int], pad: int) -> None:
    """Writes the end tokens into `text_config` if that names others than the first; some models read it there alone."""
    fields = read_json(directory / CONFIG)
    text = fields.get("text_config") or {}
    named = text.get("eos_token_id")
    if named is not None and as_tuple(eos)[0] not in as_tuple(named):
        tokens = {"eos_token_id": eos, "pad_token_id": pad}
        write_json(directory / CONFIG, {**fields, "text_config": {**text, **tokens}})


def _keep_rules(directory: Path) -> None:
    """Names a class of tokenizer that reads the whole tokenizer.json, where transformers would replace its rules."""
    path = directory / TOKENIZER
    if path.exists() and not splits_as_file(stock_processor(directory), directory / "tokenizer.json"):
        write_json(path, {**read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"})


def _pad_left(directory: Path) -> None:
    """Makes the tokenizer pad on the left: a decoder continues the prompts of a batch at their right ends."""
    path = directory / TOKENIZER
    if path.exists():
        write_json(path, {**read_json(path), "padding_side": "left"})


def _limit_length(directory: Path) -> None:
    """Makes model_max_length finite: without it, a tokenizer does not cut a text that is too long."""
    path = directory / TOKENIZER
    if not path.exists():
        return
    settings = read_json(path)
    length = settings.get("model_max_length")
    if not isinstance(length, int) or not 0 < length < _FINITE:
        write_json(path, {**settings, "model_max_length": positions(directory)})
