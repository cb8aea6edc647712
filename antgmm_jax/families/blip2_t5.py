"""BLIP-2 with T5: config both ways, name table, legal shapes."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.config import LanguageConfig, LMMConfig, QFormerConfig, StackConfig, VisionConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.rules import Tie, tie_violations
from antgmm_jax.families.table import Entry, attention, dense, norm

MODEL_TYPE = "blip-2"
ARCHITECTURE = "Blip2ForConditionalGeneration"
TIED_HEAD = ("language_model.lm_head.weight", "language_model.shared.weight")
RENAMES: tuple[tuple[str, str], ...] = ()
# Duplicates of the token table and buffers that older releases wrote.
IGNORED = (r"language_model\.(encoder|decoder)\.embed_tokens\.weight", r".*position_ids")


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> LMMConfig:
    """Our config of a Hugging Face one.

    Args:
        hf: the config with its defaults filled in.
        raw: config.json as it stands: T5's head scale is only there.
        tied: whether the file's head is the token table.

    Returns:
        The config.

    Raises:
        AntgmmError: a language model other than T5, or a Q-Former that reads text.
    """
    vision, qformer, text = hf["vision_config"], hf["qformer_config"], hf["text_config"]
    if text["model_type"] != "t5":
        raise AntgmmError(f"BLIP-2 with {text['model_type']} is not supported: bring BLIP-2 with T5, or LLaVA")
    if qformer["use_qformer_text_input"]:
        raise AntgmmError("a Q-Former that reads text (InstructBLIP) is not supported: bring BLIP-2 with T5, or LLaVA")
    if hf.get("image_token_index") is None:
        raise AntgmmError("config.json has no image_token_index: set it to the id of the <image> token")
    vit = StackConfig(
        layers=vision["num_hidden_layers"],
        embed=vision["hidden_size"],
        heads=vision["num_attention_heads"],
        head_dim=vision["hidden_size"] // vision["num_attention_heads"],
        mlp=vision["intermediate_size"],
        act=vision["hidden_act"],
        eps=vision["layer_norm_eps"],
        qkv_bias=vision["qkv_bias"],
    )
    queries = StackConfig(
        layers=qformer["num_hidden_layers"],
        embed=qformer["hidden_size"],
        heads=qformer["num_attention_heads"],
        head_dim=qformer["hidden_size"] // qformer["num_attention_heads"],
        mlp=qformer["intermediate_size"],
        act=qformer["hidden_act"],
        eps=qformer["layer_norm_eps"],
        post_norm=True,
        cross_heads=qformer["num_attention_heads"],
        cross_every=qformer["cross_attention_frequency"],
        cross_embed=vision["hidden_size"],
    )
    raw_text = raw["text_config"]
    scaled = raw_text.get("scale_decoder_outputs", raw_text.get("tie_word_embeddings") is not False)
    starts = (raw_text.get("decoder_start_token_id"), text["pad_token_id"], 0)
    return LMMConfig(
        family="blip2_t5",
        vision=VisionConfig(stack=vit, image=vision["image_size"], patch=vision["patch_size"]),
        bridge=QFormerConfig(stack=queries, queries=hf["num_query_tokens"]),
        language=LanguageConfig(
            encoder=_t5(text, decoder=False),
            decoder=_t5(text, decoder=True),
            vocab=text["vocab_size"],
            tied=tied,
            scaled_head=scaled,
            start_token=next(token for token in starts if token is not None),
        ),
        image_token=hf["image_token_index"],
    )


def _t5(text: Mapping[str, Any], *, decoder: bool) -> StackConfig:
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
        cross_embed=text["d_model"] if decoder else 0,
    )


def _encoder(config: LMMConfig) -> StackConfig:
    assert config.language.encoder is not None
    return config.language.encoder


def to_hf(config: LMMConfig) -> dict[str, Any]:
    """The fields of config.json that the model's shape decides.

    T5 states two facts in one pair of fields: whether logits are scaled, and whether the head is the token table.
    transformers scales by `scale_decoder_outputs`, or where that is absent unless `tie_word_embeddings` is false; it
    ties unless the file holds a head that differs. So both fields say "scaled", and the file says "tied".
    """
    vit, queries, language = config.vision.stack, config.qformer.stack, config.language
    encoder, decoder = _encoder(config), language.decoder
    prefix = "gated-" if decoder.gated else ""
    act = "gelu" if decoder.gated and decoder.act == "gelu_new" else decoder.act
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_index": config.image_token,
        "is_encoder_decoder": True,
        "num_query_tokens": config.qformer.queries,
        "use_decoder_only_language_model": False,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vit.embed,
            "intermediate_size": vit.mlp,
            "num_hidden_layers": vit.layers,
            "num_attention_heads": vit.heads,
            "image_size": config.vision.image,
            "patch_size": config.vision.patch,
            "hidden_act": vit.act,
            "layer_norm_eps": vit.eps,
            "qkv_bias": vit.qkv_bias,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": queries.embed,
            "num_hidden_layers": queries.layers,
            "num_attention_heads": queries.heads,
            "intermediate_size": queries.mlp,
            "hidden_act": queries.act,
            "layer_norm_eps": queries.eps,
            "cross_attention_frequency": queries.cross_every,
            "encoder_hidden_size": vit.embed,
            "use_qformer_text_input": False,
        },
        "text_config": {
            "model_type": "t5",
            "d_model": decoder.embed,
            "d_kv": decoder.head_dim,
            "d_ff": decoder.mlp,
            "num_layers": encoder.layers,
            "num_decoder_layers": decoder.layers,
            # transformers makes the cache of generate() as deep as the encoder, unless a legacy name says otherwise.
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
        },
    }


def table(config: LMMConfig) -> list[Entry]:
    """Every tensor of the file and where its numbers live in our tree."""
    return _vision(config) + _qformer(config.qformer.stack.cross_every) + _language(config)


def _vision(config: LMMConfig) -> list[Entry]:
    hf, layer, block = "vision_model", "vision_model.encoder.layers.{i}", "vision/stack/blocks"
    fused = tuple(f"{block}/attention/{name}" for name in "qkv")
    entries = [
        Entry(f"{hf}.embeddings.class_embedding", ("vision/cls",), "1 1 d -> d"),
        Entry(f"{hf}.embeddings.position_embedding", ("vision/positions",), "1 p d -> p d"),
        *dense(f"{hf}.embeddings.patch_embedding", "vision/patch", "vision/patch_bias", "d c y x -> c y x d"),
        *norm(f"{layer}.layer_norm1", f"{block}/norm1", "vision"),
        *norm(f"{layer}.layer_norm2", f"{block}/norm2", "vision"),
        Entry(f"{layer}.self_attn.qkv.weight", fused, "(n k d) e -> n e k d", "vision"),
        *dense(
            f"{layer}.self_attn.projection",
            f"{block}/attention/o",
            f"{block}/attention/o_bias",
            "e (k g d) -> k g d e",
            tower="vision",
        ),
        *dense(f"{layer}.mlp.fc1", f"{block}/mlp/up", f"{block}/mlp/up_bias", "m e -> e m", tower="vision"),
        *dense(f"{layer}.mlp.fc2", f"{block}/mlp/down", f"{block}/mlp/down_bias", "e m -> m e", tower="vision"),
        *norm(f"{hf}.post_layernorm", "vision/final_norm"),
    ]
    if config.vision.stack.qkv_bias:
        biases = tuple(f"{path}_bias" for path in fused)
        entries.append(Entry(f"{layer}.self_attn.qkv.bias", biases, "(n k d) -> n k d", "vision"))
    return entries


def _qformer(cross_every: int) -> list[Entry]:
    layer, block, cross = "qformer.encoder.layer.{i}", "bridge/stack/blocks", "bridge/stack/cross"

    def bert(hf: str, path: str, norm_path: str, every: int) -> list[Entry]:
        names = {"q": "query", "k": "key", "v": "value"}
        hf_names = {k: f"{hf}.attention.{v}" for k, v in names.items()} | {"o": f"{hf}.output.dense"}
        return attention(hf_names, path, "bridge", every, qkv_bias=True, out_bias=True) + norm(
            f"{hf}.output.LayerNorm", norm_path, "bridge", every
        )

    return [
        Entry("query_tokens", ("bridge/queries",), "1 q d -> q d"),
        *norm("qformer.layernorm", "bridge/norm"),
        *bert(f"{layer}.attention", f"{block}/attention", f"{block}/norm1", 1),
        *bert(f"{layer}.crossattention", f"{cross}/attention", f"{cross}/norm", cross_every),
        *dense(
            f"{layer}.intermediate_query.dense", f"{block}/mlp/up", f"{block}/mlp/up_bias", "m e -> e m", tower="bridge"
        ),
        *dense(
            f"{layer}.output_query.dense", f"{block}/mlp/down", f"{block}/mlp/down_bias", "e m -> m e", tower="bridge"
        ),
        *norm(f"{layer}.output_query.LayerNorm", f"{block}/norm2", "bridge"),
        *dense("language_projection", "bridge/out", "bridge/out_bias", "e d -> d e"),
    ]


def _language(config: LMMConfig) -> list[Entry]:
    entries = [Entry("language_model.shared.weight", ("language/tokens",), "v d -> v d")]
    if not config.language.tied:
        entries.append(Entry("language_model.lm_head.weight", ("language/out",), "v d -> d v"))
    for tower, final in (("encoder", "encoder_norm"), ("decoder", "norm")):
        hf, ours = f"language_model.{tower}", f"language/{tower}"
        layer, block = hf + ".block.{i}.layer", f"{ours}/blocks"
        bias = f"{hf}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        entries += [
            Entry(bias, (f"{ours}/relative/table",), "b h -> b h"),
            *norm(f"{hf}.final_layer_norm", f"language/{final}", rms=True),
            *_t5_attention(f"{layer}.0.SelfAttention", f"{block}/attention", tower),
            *norm(f"{layer}.0.layer_norm", f"{block}/norm1", tower, rms=True),
        ]
        last = 1
        if tower == "decoder":
            cross, last = f"{ours}/cross", 2
            entries += _t5_attention(f"{layer}.1.EncDecAttention", f"{cross}/attention", tower)
            entries += norm(f"{layer}.1.layer_norm", f"{cross}/norm", tower, rms=True)
        mlp = f"{layer}.{last}.DenseReluDense"
        maps = {"wi_0": "gate", "wi_1": "up"} if config.language.decoder.gated else {"wi": "up"}
        for name, path in maps.items():
            entries += dense(f"{mlp}.{name}", f"{block}/mlp/{path}", None, "m e -> e m", tower=tower)
        entries += dense(f"{mlp}.wo", f"{block}/mlp/down", None, "e m -> m e", tower=tower)
        entries += norm(f"{layer}.{last}.layer_norm", f"{block}/norm2", tower, rms=True)
    return entries


def _t5_attention(hf: str, path: str, tower: str) -> list[Entry]:
    return attention({name: f"{hf}.{name}" for name in "qkvo"}, path, tower, qkv_bias=False, out_bias=False)


def ties(config: LMMConfig) -> tuple[Tie, ...]:
    """Counts that one field of config.json holds for several axes."""
    return (
        Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),
        Tie("bridge/embed", "bridge/heads", config.qformer.stack.head_dim),
        Tie("bridge/cross_heads", "bridge/heads"),
        Tie("decoder/heads", "encoder/heads"),
        Tie("decoder/cross_heads", "encoder/heads"),
        Tie("decoder/mlp", "encoder/mlp"),
    )


def violations(config: LMMConfig) -> tuple[str, ...]:
    """What keeps a shape from being served, each as a sentence; empty where nothing does."""
    return tie_violations(ties(config), config)
