"""The language models of families that come with several: T5, OPT and Llama, with tensors `language_model.*`."""

from collections.abc import Mapping, Sequence
from typing import Any

from antgmm_jax.config import LanguageConfig, LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import llama, opt, t5
from antgmm_jax.families.base import Files
from antgmm_jax.families.rules import Tie
from antgmm_jax.families.table import Entry

_MODEL = "language_model"


def _says_tied(raw: Mapping[str, Any]) -> bool:
    text = raw["text_config"]
    # T5 has no field for it: a head equal to the token table shares it.
    default = {"t5": True, "llama": False}.get(kind := text.get("model_type", "opt"), True)
    return default if kind == "t5" else text.get("tie_word_embeddings", default)


FILES = Files(
    head=f"{_MODEL}.lm_head.weight",
    tokens=tuple(f"{_MODEL}.{name}.weight" for name in ("shared", "model.decoder.embed_tokens", "model.embed_tokens")),
    # Copies of T5's token table, and buffers that older releases wrote.
    ignored=(
        rf"{_MODEL}\.(encoder|decoder)\.embed_tokens\.weight",
        r".*position_ids",
        r".*rotary_emb\.inv_freq",
    ),
    says_tied=_says_tied,
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
    text = hf["text_config"]
    kind = text["model_type"]
    if kind not in kinds:
        raise AntgmmError(
            f"{hf['model_type']} with text_config.model_type = {kind!r} is not supported: it must be"
            f" {' or '.join(map(repr, kinds))}"
        )
    if kind == "t5":
        return t5.language_of(text, raw["text_config"], tied=tied)
    if kind == "opt":
        return opt.language_of(text, tied=tied)
    return LanguageConfig(decoder=llama.decoder_of(text), vocab=text["vocab_size"], tied=tied)


def language_fields(language: LanguageConfig) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the language model."""
    module = _module(language)
    return {"use_decoder_only_language_model": module is not t5, "text_config": module.text_config(language)}


def _module(language: LanguageConfig) -> Any:
    if language.encoder is not None:
        return t5
    return opt if language.learned_positions else llama


def language_weights(language: LanguageConfig) -> list[Entry]:
    """Returns the conversion table of the language model."""
    module = _module(language)
    prefix = {t5: _MODEL, opt: f"{_MODEL}.model.decoder", llama: f"{_MODEL}.model"}[module]
    return module.text_weights(language, prefix, FILES.head)


def language_ties(language: LanguageConfig) -> tuple[Tie, ...]:
    """Returns the sizes of the language model that share one field of config.json."""
    if language.encoder is not None:
        return t5.TIES
    return opt.ties(language) if language.learned_positions else ()


def language_violations(config: LMMConfig) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load a language model of this shape, beyond its ties."""
    return llama.head_violations(config) if _module(config.language) is llama else ()
