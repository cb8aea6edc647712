"""Config of BLIP-2 with T5, its conversion from and to Hugging Face, and its legal shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antgmm_jax.axes import part
from antgmm_jax.config import LanguageConfig, LMMConfig, StackConfig, VisionConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.rules import Tie, check_square, tie_violations


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """A stack of learnt queries with cross-attention to the image encoder, then a linear map to the text width."""

    stack: StackConfig
    queries: int


@dataclass(frozen=True, kw_only=True)
class Blip2Config(LMMConfig):
    """ViT, Q-Former and T5."""

    family: str = "blip2"
    bridge: QFormerConfig = part("bridge", tokens="images", memory="vision/embed", reads="vision/out")

    @property
    def image_tokens(self) -> int:
        """Text positions that one image occupies: one per query."""
        return self.bridge.queries


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> Blip2Config:
    """Converts a Hugging Face config.

    Args:
        hf: the Hugging Face config including its defaults.
        raw: config.json as written: only it holds T5's head scale.
        tied: whether the head shares the token table.

    Returns:
        Model config.

    Raises:
        AntgmmError: a language model other than T5, or a Q-Former that reads text.
    """
    vision, qformer, text = hf["vision_config"], hf["qformer_config"], hf["text_config"]
    if text["model_type"] != "t5":
        raise AntgmmError(f"BLIP-2 with {text['model_type']} is not supported: use BLIP-2 with T5, or LLaVA")
    if qformer["use_qformer_text_input"]:
        raise AntgmmError("a Q-Former that reads text (InstructBLIP) is not supported: use BLIP-2 with T5, or LLaVA")
    if hf.get("image_token_index") is None:
        raise AntgmmError("config.json has no image_token_index: set it to the id of the <image> token")
    check_square(vision["image_size"], vision["patch_size"])
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
    )
    raw_text = raw["text_config"]
    scaled = raw_text.get("scale_decoder_outputs", raw_text.get("tie_word_embeddings") is not False)
    starts = (raw_text.get("decoder_start_token_id"), text["pad_token_id"], 0)
    return Blip2Config(
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
    )


def to_hf(config: Blip2Config) -> dict[str, Any]:
    """Returns the fields of config.json that depend on the model's shape.

    transformers scales T5's logits if `scale_decoder_outputs` is true or, without this field, if `tie_word_embeddings`
    is not false. It ties the head to the token table unless the file holds a different head. So both fields are written
    as "scaled", and the file alone decides whether the head is tied.
    """
    vit, queries, language = config.vision.stack, config.bridge.stack, config.language
    encoder, decoder = language.encoder, language.decoder
    assert encoder is not None
    prefix = "gated-" if decoder.gated else ""
    act = "gelu" if decoder.gated and decoder.act == "gelu_new" else decoder.act
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "image_token_index": config.image_token,
        "is_encoder_decoder": True,
        "num_query_tokens": config.bridge.queries,
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
        },
    }


def ties(config: Blip2Config) -> tuple[Tie, ...]:
    """Returns the sizes that share one field of config.json."""
    return (
        Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),
        Tie("bridge/embed", "bridge/heads", config.bridge.stack.head_dim),
        Tie("bridge/cross_heads", "bridge/heads"),
        Tie("decoder/heads", "encoder/heads"),
        Tie("decoder/cross_heads", "encoder/heads"),
        Tie("decoder/mlp", "encoder/mlp"),
    )


def violations(config: Blip2Config) -> tuple[str, ...]:
    """Returns the reasons why transformers cannot load this shape; empty if it can."""
    return tie_violations(ties(config), config)
