"""The language models of families that come with several: T5, OPT and Llama, with tensors `language_model.*`."""

from collections.abc import Mapping, Sequence
from typing import Any

from antgmm_jax.config import LanguageConfig, LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.base import Files
from antgmm_jax.families.common import llama, opt, t5, text
from antgmm_jax.families.common.table import Entry
from antgmm_jax.families.rules import Tie

_MODEL = "language_model"


FILES = Files(
    head=f"{_MODEL}.lm_head.weight",
    tokens=tuple(f"{_MODEL}.{name}.weight" for name in ("shared", "model.decoder.embed_tokens", "model.embed_tokens")),
    # Copies of T5's token table, and buffers that older releases wrote.
    ignored=(
        rf"{_MODEL}\.(encoder|decoder)\.embed_tokens\.weight",
        r".*position_ids",
        r".*rotary_emb\.inv_freq",
    ),
    # The language model is a whole model with a head of its own.
    says_tied=lambda hf: bool(hf["text_config"]["tie_word_embeddings"]),
    # An unscaled T5 has tie_word_embeddings: false, so its file must hold the head, tied or not.
    writes_head=lambda config: config.encoder_decoder and not config.language.scaled_head,
)


def language_of(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool, kinds: Sequence[str]) -> LanguageConfig:
    """Converts the `text_config` of a config.json.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written.
        tied: whether the head shares the token table.
        kinds: language models that the family supports.

    Returns:
        Config of the language model.

    Raises:
        AntgmmError: another language model, or a variant that is not supported.
    """
    fields = hf["text_config"]
    kind = fields["model_type"]
    if kind not in kinds:
        raise AntgmmError(
            f"{hf['model_type']} with text_config.model_type = {kind!r} is not supported: it must be"
            f" {' or '.join(map(repr, kinds))}"
        )
    if kind == "t5":
        return t5.language_of(fields, raw["text_config"], tied=tied)
    return opt.language_of(fields, tied=tied) if kind == "opt" else text.text_of(fields, tied=tied)


def image_token_of(hf: Mapping[str, Any], language: LanguageConfig) -> int:
    """Returns the id of the image token of a config.json.

    Args:
        hf: the Hugging Face config including its defaults.
        language: config of the language model.

    Raises:
        AntgmmError: it has none, or the token table has no row for it.
    """
    if (token := hf.get("image_token_index")) is None:
        raise AntgmmError("config.json has no image_token_index: set it to the id of the <image> token")
    if token >= language.vocab:
        raise AntgmmError(
            f"image_token_index = {token}, but the token table has {language.vocab} rows: load the model with"
            " transformers, call `resize_token_embeddings(len(processor.tokenizer))`, and save it"
        )
    return token


def language_fields(language: LanguageConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the language model."""
    module = _module(language)
    return {"use_decoder_only_language_model": module is not t5, "text_config": module.text_config(language)}


def _module(language: LanguageConfig) -> Any:
    if language.encoder is not None:
        return t5
    return opt if language.learned_positions else text


def language_weights(language: LanguageConfig) -> list[Entry]:
    """Returns the conversion table of the language model."""
    if language.encoder is not None:
        return t5.text_weights(language, _MODEL, FILES.head)
    if language.learned_positions:
        return opt.text_weights(language, f"{_MODEL}.model.decoder", FILES.head)
    return llama.text_weights(language, f"{_MODEL}.model", FILES.head)


def language_ties(language: LanguageConfig) -> tuple[Tie, ...]:
    """Returns the sizes of the language model that share one field of config.json."""
    if language.encoder is not None:
        return t5.TIES
    return text.text_ties(language) if isinstance(language, text.TextConfig) else opt.ties(language)


def language_violations(config: LMMConfig) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load a language model of this shape, beyond its ties."""
    return text.text_violations(config) if _module(config.language) is text else ()
