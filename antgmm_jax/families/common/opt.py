"""OPT inside a larger checkpoint: config conversion, conversion table and ties."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.config import LanguageConfig, StackConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.table import Entry, attention, dense, norm
from antgmm_jax.families.rules import Tie

_EPS = 1e-5
_UNUSED = 2
"""Entries of the table of positions before the first one."""
_FIXED = {
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}
"""Fields with the only value that is supported."""


def language_of(text: Mapping[str, Any], *, tied: bool) -> LanguageConfig:
    """Converts a `text_config` (with its defaults).

    Raises:
        AntgmmError: a variant that is not supported, such as OPT-350M with its norms after the sublayers.
    """
    for name, value in _FIXED.items():
        if text.get(name, value) != value:
            raise AntgmmError(f"OPT with {name} = {text[name]} is not supported: it must be {value}")
    if text["word_embed_proj_dim"] != text["hidden_size"]:
        raise AntgmmError(
            f"OPT with word_embed_proj_dim = {text['word_embed_proj_dim']} is not supported: it must be"
            f" hidden_size = {text['hidden_size']}"
        )
    sizes = (text["num_hidden_layers"], text["hidden_size"], text["num_attention_heads"], text["ffn_dim"])
    decoder = sized_decoder(sizes, text["hidden_size"] // text["num_attention_heads"], act=text["activation_function"])
    return LanguageConfig(
        decoder=decoder,
        vocab=text["vocab_size"],
        tied=tied,
        learned_positions=text["max_position_embeddings"],
        first_position=_UNUSED,
    )


def sized_decoder(sizes: tuple[int, int, int, int], head_dim: int, *, act: Any = "relu") -> StackConfig:
    """Returns the config of an OPT decoder: layers, embed, heads, mlp; embed must be heads x head_dim."""
    layers, embed, heads, mlp = sizes
    return StackConfig(
        layers=layers, embed=embed, heads=heads, mlp=mlp, head_dim=head_dim, act=act, eps=_EPS, causal=True
    )


def sized_language(sizes: tuple[int, int, int, int], head_dim: int, *, vocab: int, positions: int) -> LanguageConfig:
    """Returns the config of OPT with a tied head; sizes as in `sized_decoder`."""
    decoder = sized_decoder(sizes, head_dim)
    return LanguageConfig(decoder=decoder, vocab=vocab, tied=True, learned_positions=positions, first_position=_UNUSED)


def text_config(language: LanguageConfig) -> dict[str, Any]:
    """Returns the fields of `text_config` that depend on the model's shape."""
    opt = language.decoder
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": opt.embed,
        "word_embed_proj_dim": opt.embed,
        "ffn_dim": opt.mlp,
        "num_hidden_layers": opt.layers,
        "num_attention_heads": opt.heads,
        "activation_function": opt.act,
        "max_position_embeddings": language.learned_positions,
        "tie_word_embeddings": language.tied,
        "vocab_size": language.vocab,
    }


def ties(language: LanguageConfig) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    return (Tie("text/embed", "text/heads", language.decoder.head_dim),)


def text_weights(language: LanguageConfig, model: str, head: str) -> list[Entry]:
    """Returns the conversion table of the decoder and, unless tied, its head.

    Args:
        language: config of the language model.
        model: prefix of the decoder's tensor names.
        head: tensor name of the head.

    Returns:
        Entries of the table.
    """
    ours, layer = "language/decoder/blocks", model + ".layers.{i}"
    maps = {name: f"{layer}.self_attn.{name}_proj" for name in "qkv"} | {"o": f"{layer}.self_attn.out_proj"}
    entries = [
        Entry(f"{model}.embed_tokens.weight", ("language/tokens",), "v d -> v d"),
        Entry(f"{model}.embed_positions.weight", ("language/positions",), "p d -> p d"),
        *attention(maps, f"{ours}/attention", "text", qkv_bias=True, out_bias=True),
        *norm(f"{layer}.self_attn_layer_norm", f"{ours}/norm1", "text"),
        *norm(f"{layer}.final_layer_norm", f"{ours}/norm2", "text"),
        *dense(f"{layer}.fc1", f"{ours}/mlp/up", f"{ours}/mlp/up_bias", "m e -> e m", tower="text"),
        *dense(f"{layer}.fc2", f"{ours}/mlp/down", f"{ours}/mlp/down_bias", "e m -> m e", tower="text"),
        *norm(f"{model}.final_layer_norm", "language/norm"),
    ]
    return entries if language.tied else [*entries, Entry(head, ("language/out",), "v d -> d v")]
