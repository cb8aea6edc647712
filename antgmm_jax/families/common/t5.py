"""T5 inside a larger checkpoint: config conversion, conversion table and ties."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antgmm_jax.config import Act, LanguageConfig, StackConfig
from antgmm_jax.families.common.table import Entry, attention, dense, norm
from antgmm_jax.families.rules import Tie

TIES = (
    Tie("decoder/heads", "encoder/heads"),
    Tie("decoder/cross_heads", "encoder/heads"),
    Tie("decoder/mlp", "encoder/mlp"),
)
"""Sizes that share one field of config.json."""


def language_of(text: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> LanguageConfig:
    """Converts a `text_config`.

    Args:
        text: the `text_config` with its defaults.
        raw: the same as written: only it holds the scale of the head.
        tied: whether the head shares the token table.

    Returns:
        Config of the language model.
    """
    scaled = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings") is not False)
    starts = (raw.get("decoder_start_token_id"), text["pad_token_id"], 0)
    return LanguageConfig(
        encoder=_stack(text, decoder=False),
        decoder=_stack(text, decoder=True),
        vocab=text["vocab_size"],
        tied=tied,
        scaled_head=scaled,
        start_token=next(token for token in starts if token is not None),
    )


def _stack(text: Mapping[str, Any], *, decoder: bool) -> StackConfig:
    heads = text["num_heads"]
    return StackConfig(
        layers=text["num_decoder_layers"] if decoder else text["num_layers"],
        embed=text["d_model"],
        heads=heads,
        head_dim=text["d_kv"],
        mlp=text["d_ff"],
        act=text["dense_act_fn"],
        norm="rms",
        eps=text["layer_norm_epsilon"],
        gated=text["is_gated_act"],
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        causal=decoder,
        scaled=False,
        positions="relative",
        relative_buckets=text["relative_attention_num_buckets"],
        relative_distance=text["relative_attention_max_distance"],
        cross_heads=heads if decoder else 0,
    )


def sized_language(
    sizes: tuple[int, int, int, int, int],
    head_dim: int,
    *,
    vocab: int,
    scaled: bool,
    tied: bool = True,
    act: Act = "gelu_new",
) -> LanguageConfig:
    """Returns the config of a T5 with a gated MLP.

    Args:
        sizes: encoder layers, decoder layers, embed, heads, mlp.
        head_dim: width of a head.
        vocab: size of the token table.
        scaled: whether logits are scaled, as in T5 v1.0.
        tied: whether the head shares the token table.
        act: activation of the MLP.

    Returns:
        Config of the language model.
    """
    encoder = StackConfig(
        layers=sizes[0],
        embed=sizes[2],
        heads=sizes[3],
        mlp=sizes[4],
        head_dim=head_dim,
        act=act,
        norm="rms",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        scaled=False,
        positions="relative",
    )
    decoder = replace(encoder, layers=sizes[1], causal=True, cross_heads=sizes[3])
    return LanguageConfig(encoder=encoder, decoder=decoder, vocab=vocab, tied=tied, scaled_head=scaled)


def text_config(language: LanguageConfig) -> dict[str, Any]:
    """Returns the fields of `text_config` that depend on the model's shape.

    transformers scales T5's logits if `scale_decoder_outputs` is true or, without this field, if `tie_word_embeddings`
    is not false. It ties the head to the token table unless the file holds a different head. So both fields are written
    as "scaled", and the file alone decides whether the head is tied.
    """
    encoder, decoder = language.encoder, language.decoder
    assert encoder is not None
    prefix = "gated-" if decoder.gated else ""
    act = "gelu" if decoder.gated and decoder.act == "gelu_new" else decoder.act
    return {
        "model_type": "t5",
        "d_model": decoder.embed,
        "d_kv": decoder.head_dim,
        "d_ff": decoder.mlp,
        "num_layers": encoder.layers,
        "num_decoder_layers": decoder.layers,
        # Without this legacy field, transformers allocates as many cache layers as the encoder has.
        "decoder_layers": decoder.layers,
        "num_heads": decoder.heads,
        "feed_forward_proj": prefix + act,
        "dense_act_fn": decoder.act,
        "is_gated_act": decoder.gated,
        "layer_norm_epsilon": decoder.eps,
        "relative_attention_num_buckets": decoder.relative_buckets,
        "relative_attention_max_distance": decoder.relative_distance,
        "vocab_size": language.vocab,
        "decoder_start_token_id": language.start_token,
        "scale_decoder_outputs": language.scaled_head,
        "tie_word_embeddings": language.scaled_head,
        "is_encoder_decoder": True,
    }


def text_weights(language: LanguageConfig, model: str, head: str) -> list[Entry]:
    """Returns the conversion table of T5 and, unless tied, its head.

    Args:
        language: config of the language model.
        model: prefix of its tensor names.
        head: tensor name of the head.

    Returns:
        Entries of the table.
    """
    entries = [Entry(f"{model}.shared.weight", ("language/tokens",), "v d -> v d")]
    if not language.tied:
        entries.append(Entry(head, ("language/out",), "v d -> d v"))
    for tower, final in (("encoder", "encoder_norm"), ("decoder", "norm")):
        hf, ours = f"{model}.{tower}", f"language/{tower}"
        layer, block = hf + ".block.{i}.layer", f"{ours}/blocks"
        bias = f"{hf}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        entries += [
            Entry(bias, (f"{ours}/relative/table",), "b h -> b h"),
            *norm(f"{hf}.final_layer_norm", f"language/{final}", rms=True),
            *_attention(f"{layer}.0.SelfAttention", f"{block}/attention", tower),
            *norm(f"{layer}.0.layer_norm", f"{block}/norm1", tower, rms=True),
        ]
        last = 1
        if tower == "decoder":
            cross, last = f"{ours}/cross", 2
            entries += _attention(f"{layer}.1.EncDecAttention", f"{cross}/attention", tower)
            entries += norm(f"{layer}.1.layer_norm", f"{cross}/norm", tower, rms=True)
        mlp = f"{layer}.{last}.DenseReluDense"
        maps = {"wi_0": "gate", "wi_1": "up"} if language.decoder.gated else {"wi": "up"}
        for name, path in maps.items():
            entries += dense(f"{mlp}.{name}", f"{block}/mlp/{path}", None, "m e -> e m", tower=tower)
        entries += dense(f"{mlp}.wo", f"{block}/mlp/down", None, "e m -> m e", tower=tower)
        entries += norm(f"{layer}.{last}.layer_norm", f"{block}/norm2", tower, rms=True)
    return entries


def _attention(hf: str, path: str, tower: str) -> list[Entry]:
    return attention({name: f"{hf}.{name}" for name in "qkvo"}, path, tower, qkv_bias=False, out_bias=False)
