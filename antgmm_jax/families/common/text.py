"""Text models of four Hugging Face types inside a larger checkpoint: Llama, Mistral, Qwen2 and Qwen3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from antgmm_jax.config import LanguageConfig, Llama3Rope, LMMConfig, StackConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.llama import head_violations, stack_of, text_fields
from antgmm_jax.families.rules import Tie

TextType = Literal["llama", "mistral", "qwen2", "qwen3"]


@dataclass(frozen=True, kw_only=True)
class TextConfig(LanguageConfig):
    """A decoder of one of the supported types: `model_type` of its `text_config`.

    Rotary positions of the type "dynamic" are read as "default", and written so: they change only texts of more than
    `max_position_embeddings` tokens, but some servers apply them to texts of any length.
    """

    model_type: TextType = "llama"


class _Type(NamedTuple):
    """How a type of text model differs from the others.

    Attributes:
        architecture: class of the text model in transformers.
        biases: whether q, k and v have a bias, and whether the output has one; None: as `attention_bias` says.
        qk_norm: whether each head of queries and keys has an RMSNorm.
        windowed: whether a config can restrict attention to a sliding window.
        heads: heads x head_dim is "free" of the width, or "equal" to it, or the heads "divide" the width.
    """

    architecture: str
    biases: tuple[bool, bool] | None = None
    qk_norm: bool = False
    windowed: bool = True
    heads: Literal["free", "equal", "divide"] = "free"


_TYPES: dict[TextType, _Type] = {
    # The config of Llama requires that the heads divide the width in spite of `head_dim`.
    "llama": _Type("LlamaForCausalLM", windowed=False, heads="divide"),
    "mistral": _Type("MistralForCausalLM", biases=(False, False)),
    # transformers reads `head_dim` of a Qwen2, vLLM does not.
    "qwen2": _Type("Qwen2ForCausalLM", biases=(True, False), heads="equal"),
    "qwen3": _Type("Qwen3ForCausalLM", qk_norm=True),
}


def text_of(text: Mapping[str, Any], *, tied: bool, types: Sequence[TextType] = tuple(_TYPES)) -> TextConfig:
    """Converts a `text_config` to the language model's config.

    Args:
        text: `text_config` including its defaults.
        tied: whether the head shares the token table.
        types: supported values of its `model_type`.

    Returns:
        Config of the language model.

    Raises:
        AntgmmError: another type, scaled rotary positions, sliding windows, biases in the MLPs, or query heads that the
            key-value heads do not divide.
    """
    kind = text["model_type"]
    if kind not in types:
        raise AntgmmError(f"text_config.model_type = {kind!r} is not supported: it must be {' or '.join(types)}")
    rope = text["rope_parameters"]
    if (rotary := rope.get("rope_type", "default")) not in ("default", "dynamic", "llama3"):
        raise AntgmmError(
            f"text_config.rope_parameters.rope_type = {rotary!r} is not supported: it must be 'default', 'dynamic' or"
            " 'llama3'"
        )
    if text.get("mlp_bias"):
        raise AntgmmError("text_config.mlp_bias = True is not supported: use a checkpoint without it")
    if _TYPES[kind].windowed:
        _check_windows(text)
    decoder = replace(_decoder(text), llama3=_llama3(rope) if rotary == "llama3" else None)
    return TextConfig(model_type=kind, decoder=decoder, vocab=text["vocab_size"], tied=tied)


def _llama3(rope: Mapping[str, Any]) -> Llama3Rope:
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    if low >= high:
        wrong = f"low_freq_factor = {low:g} is not below high_freq_factor = {high:g}"
        raise AntgmmError(f"text_config.rope_parameters: {wrong}: correct config.json")
    original = rope["original_max_position_embeddings"]
    return Llama3Rope(factor=float(rope["factor"]), original=original, low=low, high=high)


def _decoder(text: Mapping[str, Any]) -> StackConfig:
    inherited = {"attention_bias": False, "head_dim": text["hidden_size"] // text["num_attention_heads"]}
    stack = stack_of({**inherited, **{name: value for name, value in text.items() if value is not None}})
    return decoder_of_type(stack, text["model_type"])


def decoder_of_type(stack: StackConfig, kind: TextType) -> StackConfig:
    """Returns a stack with the biases and the norms of queries and keys that a type of text model has."""
    of = _TYPES[kind]
    qkv_bias, out_bias = of.biases or (stack.qkv_bias, stack.out_bias)
    return replace(stack, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=of.qk_norm)


def _check_windows(text: Mapping[str, Any]) -> None:
    """Refuses windows that are shorter than the longest text."""
    window, longest = text.get("sliding_window"), text["max_position_embeddings"]
    by_layer = "use_sliding_window" in text  # Qwen's layers read `layer_types`, Mistral's the window alone
    types = (by_layer and text.get("layer_types")) or ["full_attention" if window is None else "sliding_attention"]
    other = next((name for name in types if name not in ("full_attention", "sliding_attention")), None)
    if other is not None:
        raise AntgmmError(f"text_config.layer_types has {other!r}: every layer must be 'full_attention'")
    if "sliding_attention" in types and (window is None or window < longest):
        off = "sliding_window = null in config.json"
        if by_layer:
            off = "use_sliding_window = false in config.json, and remove layer_types there,"
        raise AntgmmError(
            f"text_config.sliding_window = {window} is not supported, as max_position_embeddings = {longest}:"
            f" set {off} if no row has more tokens than the window"
        )


def text_config(language: TextConfig) -> dict[str, Any]:
    """Returns the fields of `text_config` that depend on the model's shape."""
    of, fields = _TYPES[language.model_type], text_fields(language)
    if of.biases is not None:
        fields.pop("attention_bias")
    if (llama3 := language.decoder.llama3) is None:
        fields["rope_scaling"] = None  # an older name, which would replace `rope_parameters`
    else:
        fields["rope_parameters"] |= {
            "rope_type": "llama3",
            "factor": llama3.factor,
            "original_max_position_embeddings": llama3.original,
            "low_freq_factor": llama3.low,
            "high_freq_factor": llama3.high,
        }
    more = {"mlp_bias": False} if language.model_type == "llama" else {"sliding_window": None}
    if language.model_type in ("qwen2", "qwen3"):
        layers = language.decoder.layers
        more |= {"use_sliding_window": False, "max_window_layers": layers, "layer_types": ["full_attention"] * layers}
    return {"model_type": language.model_type, "architectures": [of.architecture], **fields, **more}


def text_ties(language: TextConfig) -> tuple[Tie, ...]:
    """Returns the sizes of the text model that share one field of `text_config`."""
    if _TYPES[language.model_type].heads != "equal":
        return ()
    return (Tie("text/embed", "text/heads", language.decoder.q_per_kv * language.decoder.head_dim),)


def text_violations(config: LMMConfig) -> tuple[str, ...]:
    """Returns the reasons why the text model cannot be loaded with this shape, beyond its ties."""
    language = config.language
    assert isinstance(language, TextConfig)
    return head_violations(language.decoder) if _TYPES[language.model_type].heads == "divide" else ()
