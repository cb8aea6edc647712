"""What Llama and similar decoders share inside a larger checkpoint: fields of `text_config` and conversion table."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.config import LanguageConfig, StackConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.table import Entry, attention, dense, norm


def stack_of(text: Mapping[str, Any]) -> StackConfig:
    """Returns the stack of a `text_config` from the fields that Llama shares with similar models.

    Raises:
        AntgmmError: the key-value heads do not divide the query heads.
    """
    heads, shared = text["num_attention_heads"], text["num_key_value_heads"]
    if heads % shared:
        raise AntgmmError(f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {shared}")
    return StackConfig(
        layers=text["num_hidden_layers"],
        embed=text["hidden_size"],
        heads=shared,
        q_per_kv=heads // shared,
        head_dim=text["head_dim"],
        mlp=text["intermediate_size"],
        act=text["hidden_act"],
        norm="rms",
        eps=text["rms_norm_eps"],
        gated=True,
        qkv_bias=text["attention_bias"],
        out_bias=text["attention_bias"],
        mlp_bias=False,
        causal=True,
        positions="rope",
        rope_theta=float(text["rope_parameters"]["rope_theta"]),
    )


def sized_decoder(
    sizes: tuple[int, int, int, int], head_dim: int, *, q_per_kv: int, eps: float, rope_theta: float
) -> StackConfig:
    """Returns the config of a Llama decoder of given sizes.

    Args:
        sizes: layers, embed, key-value heads, mlp.
        head_dim: width of a head.
        q_per_kv: query heads per key-value head.
        eps: epsilon of the norms.
        rope_theta: base of the rotary positions.

    Returns:
        Stack config.
    """
    layers, embed, heads, mlp = sizes
    plain = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
    rotary: dict[str, Any] = {"positions": "rope", "rope_theta": rope_theta}
    return StackConfig(
        layers=layers,
        embed=embed,
        heads=heads,
        mlp=mlp,
        head_dim=head_dim,
        q_per_kv=q_per_kv,
        act="silu",
        norm="rms",
        eps=eps,
        gated=True,
        causal=True,
        **plain,
        **rotary,
    )


def text_fields(language: LanguageConfig) -> dict[str, Any]:
    """Returns the fields of `text_config` that Llama shares with similar models and that depend on the shape."""
    llama = language.decoder
    return {
        "hidden_size": llama.embed,
        "intermediate_size": llama.mlp,
        "num_hidden_layers": llama.layers,
        "num_attention_heads": llama.heads * llama.q_per_kv,
        "num_key_value_heads": llama.heads,
        "head_dim": llama.head_dim,
        "hidden_act": llama.act,
        "rms_norm_eps": llama.eps,
        "attention_bias": llama.qkv_bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": llama.rope_theta},
        "tie_word_embeddings": language.tied,
        "vocab_size": language.vocab,
    }


def small_text(
    sizes: tuple[int, int, int, int, int], mlp: int, *, tied: bool, bias: bool = False, model_type: str = "llama"
) -> dict[str, Any]:
    """Returns a small `text_config` for the conformance tests.

    Args:
        sizes: layers, width, query heads, key-value heads, head width.
        mlp: hidden units of an MLP.
        tied: whether the head shares the token table.
        bias: whether attention has biases, for types with a field that says so.
        model_type: type of the text model.

    Returns:
        Fields of `text_config`.
    """
    layers, embed, heads, kv_heads, head_dim = sizes
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": embed,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp,
        "vocab_size": 160,
        **({"attention_bias": True} if bias else {}),
        **({"sliding_window": None} if model_type == "mistral" else {}),
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def text_weights(language: LanguageConfig, model: str, head: str) -> list[Entry]:
    """Returns the conversion table of the decoder and, unless tied, its head.

    Args:
        language: config of the language model.
        model: prefix of the decoder's tensor names.
        head: tensor name of the head.

    Returns:
        Entries of the table.
    """
    ours, stack = "language/decoder/blocks", language.decoder
    layer = model + ".layers.{i}"
    llama = {name: f"{layer}.self_attn.{name}_proj" for name in "qkvo"}
    entries = [
        Entry(f"{model}.embed_tokens.weight", ("language/tokens",), "v d -> v d"),
        *attention(llama, f"{ours}/attention", "text", qkv_bias=stack.qkv_bias, out_bias=stack.out_bias),
        *norm(f"{layer}.input_layernorm", f"{ours}/norm1", "text", rms=True),
        *norm(f"{layer}.post_attention_layernorm", f"{ours}/norm2", "text", rms=True),
        *dense(f"{layer}.mlp.gate_proj", f"{ours}/mlp/gate", None, "m e -> e m", tower="text"),
        *dense(f"{layer}.mlp.up_proj", f"{ours}/mlp/up", None, "m e -> e m", tower="text"),
        *dense(f"{layer}.mlp.down_proj", f"{ours}/mlp/down", None, "e m -> m e", tower="text"),
        *norm(f"{model}.norm", "language/norm", rms=True),
    ]
    if stack.qk_norm:
        for name in "qk":
            heads = f"{ours}/attention/{name}_norm"
            entries += norm(f"{layer}.self_attn.{name}_norm", heads, "text", rms=True)
    if not language.tied:
        entries.append(Entry(head, ("language/out",), "v d -> d v"))
    return entries


def head_violations(stack: StackConfig) -> tuple[str, ...]:
    """Checks that the number of query heads divides the width, which some configs require in spite of `head_dim`."""
    heads = stack.heads * stack.q_per_kv
    if stack.embed % heads == 0:
        return ()
    return (f"text/embed = {stack.embed} must be divisible by the {heads} query heads (text/heads = {stack.heads})",)
