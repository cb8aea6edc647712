"""LLaVA with CLIP and Llama: config both ways, name table, legal shapes."""

from collections.abc import Mapping
from typing import Any

from antgmm_jax.config import LanguageConfig, LMMConfig, ProjectorConfig, StackConfig, VisionConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.rules import Tie, tie_violations
from antgmm_jax.families.table import Entry, attention, dense, norm

MODEL_TYPE = "llava"
ARCHITECTURE = "LlavaForConditionalGeneration"
TIED_HEAD = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
# transformers 5.x and older releases name the same tensors differently; ours are the names that vLLM needs.
RENAMES = (
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
IGNORED = (r".*position_ids", r".*rotary_emb\.inv_freq")


def from_hf(hf: Mapping[str, Any], raw: Mapping[str, Any], *, tied: bool) -> LMMConfig:
    """Our config of a Hugging Face one.

    The feature layer that the projector reads ends the image encoder: layers after it are never run and are not
    part of the model.

    Args:
        hf: the config with its defaults filled in.
        raw: config.json as it stands.
        tied: whether the file's head is the token table.

    Returns:
        The config.

    Raises:
        AntgmmError: towers other than CLIP and Llama, several feature layers, or scaled rotary positions.
    """
    vision, text = hf["vision_config"], hf["text_config"]
    for got, need in ((vision["model_type"], "clip_vision_model"), (text["model_type"], "llama")):
        if got != need:
            raise AntgmmError(f"LLaVA with {got} is not supported: bring LLaVA with clip_vision_model and llama")
    at = hf["vision_feature_layer"]
    if not isinstance(at, int):
        raise AntgmmError(f"vision_feature_layer = {at} joins several layers: only one layer is supported")
    used = vision["num_hidden_layers"] + 1 + at if at < 0 else at
    if not 1 <= used <= vision["num_hidden_layers"]:
        raise AntgmmError(f"vision_feature_layer = {at} is not a layer of {vision['num_hidden_layers']}")
    rope = text["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise AntgmmError(f"rope_type {rope['rope_type']!r} is not supported: only the default rotary positions are")
    clip = StackConfig(
        layers=used,
        embed=vision["hidden_size"],
        heads=vision["num_attention_heads"],
        head_dim=vision["hidden_size"] // vision["num_attention_heads"],
        mlp=vision["intermediate_size"],
        act=vision["hidden_act"],
        eps=vision["layer_norm_eps"],
    )
    llama = StackConfig(
        layers=text["num_hidden_layers"],
        embed=text["hidden_size"],
        heads=text["num_key_value_heads"],
        q_per_kv=text["num_attention_heads"] // text["num_key_value_heads"],
        head_dim=text["head_dim"],
        mlp=text["intermediate_size"],
        act=text["hidden_act"],
        norm="rms",
        eps=text["rms_norm_eps"],
        gated=True,
        qkv_bias=text["attention_bias"],
        out_bias=text["attention_bias"],
        mlp_bias=text["mlp_bias"],
        causal=True,
        positions="rope",
        rope_theta=float(rope["rope_theta"]),
    )
    if llama.mlp_bias:
        raise AntgmmError("Llama with mlp_bias is not supported: bring a checkpoint without it")
    image = VisionConfig(
        stack=clip,
        image=vision["image_size"],
        patch=vision["patch_size"],
        channels=vision["num_channels"],
        patch_bias=False,
        first_norm=True,
        final_norm=False,
        keep_cls=hf["vision_feature_select_strategy"] == "full",
    )
    return LMMConfig(
        family="llava",
        vision=image,
        bridge=ProjectorConfig(
            mlp=text["hidden_size"], act=hf["projector_hidden_act"], bias=hf["multimodal_projector_bias"]
        ),
        language=LanguageConfig(decoder=llama, vocab=text["vocab_size"], tied=tied),
        image_token=hf["image_token_index"],
    )


def to_hf(config: LMMConfig) -> dict[str, Any]:
    """The fields of config.json that the model's shape decides."""
    clip, llama = config.vision.stack, config.language.decoder
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_index": config.image_token,
        "image_seq_length": config.image_tokens,
        "multimodal_projector_bias": config.projector.bias,
        "projector_hidden_act": config.projector.act,
        "tie_word_embeddings": config.language.tied,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full" if config.vision.keep_cls else "default",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": clip.embed,
            "intermediate_size": clip.mlp,
            "num_hidden_layers": clip.layers,
            "num_attention_heads": clip.heads,
            "num_channels": config.vision.channels,
            "image_size": config.vision.image,
            "patch_size": config.vision.patch,
            "hidden_act": clip.act,
            "layer_norm_eps": clip.eps,
        },
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": llama.embed,
            "intermediate_size": llama.mlp,
            "num_hidden_layers": llama.layers,
            "num_attention_heads": llama.heads * llama.q_per_kv,
            "num_key_value_heads": llama.heads,
            "head_dim": llama.head_dim,
            "hidden_act": llama.act,
            "rms_norm_eps": llama.eps,
            "attention_bias": llama.qkv_bias,
            "mlp_bias": llama.mlp_bias,
            "rope_parameters": {"rope_type": "default", "rope_theta": llama.rope_theta},
            "tie_word_embeddings": config.language.tied,
            "vocab_size": config.language.vocab,
        },
    }


def table(config: LMMConfig) -> list[Entry]:
    """Every tensor of the file and where its numbers live in our tree."""
    hf, ours = "vision_tower.vision_model", "vision/stack/blocks"
    layer = hf + ".encoder.layers.{i}"
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    clip = {k: f"{layer}.self_attn.{v}" for k, v in names.items()}
    up_bias, down_bias = ("bridge/up_bias", "bridge/down_bias") if config.projector.bias else (None, None)
    return [
        Entry(f"{hf}.embeddings.class_embedding", ("vision/cls",), "d -> d"),
        Entry(f"{hf}.embeddings.position_embedding.weight", ("vision/positions",), "p d -> p d"),
        *dense(f"{hf}.embeddings.patch_embedding", "vision/patch", None, "d c y x -> c y x d"),
        *norm(f"{hf}.pre_layrnorm", "vision/first_norm"),
        *attention(clip, f"{ours}/attention", "vision", qkv_bias=True, out_bias=True),
        *norm(f"{layer}.layer_norm1", f"{ours}/norm1", "vision"),
        *norm(f"{layer}.layer_norm2", f"{ours}/norm2", "vision"),
        *dense(f"{layer}.mlp.fc1", f"{ours}/mlp/up", f"{ours}/mlp/up_bias", "m e -> e m", tower="vision"),
        *dense(f"{layer}.mlp.fc2", f"{ours}/mlp/down", f"{ours}/mlp/down_bias", "e m -> m e", tower="vision"),
        *norm(f"{hf}.post_layernorm", "vision/final_norm"),
        *dense("multi_modal_projector.linear_1", "bridge/up", up_bias, "m e -> e m"),
        *dense("multi_modal_projector.linear_2", "bridge/down", down_bias, "e m -> m e"),
        *_language(config.language),
    ]


def _language(language: LanguageConfig) -> list[Entry]:
    hf, ours, bias = "language_model.model", "language/decoder/blocks", language.decoder.qkv_bias
    layer = hf + ".layers.{i}"
    llama = {name: f"{layer}.self_attn.{name}_proj" for name in "qkvo"}
    entries = [
        Entry(f"{hf}.embed_tokens.weight", ("language/tokens",), "v d -> v d"),
        *attention(llama, f"{ours}/attention", "text", qkv_bias=bias, out_bias=bias),
        *norm(f"{layer}.input_layernorm", f"{ours}/norm1", "text", rms=True),
        *norm(f"{layer}.post_attention_layernorm", f"{ours}/norm2", "text", rms=True),
        *dense(f"{layer}.mlp.gate_proj", f"{ours}/mlp/gate", None, "m e -> e m", tower="text"),
        *dense(f"{layer}.mlp.up_proj", f"{ours}/mlp/up", None, "m e -> e m", tower="text"),
        *dense(f"{layer}.mlp.down_proj", f"{ours}/mlp/down", None, "e m -> m e", tower="text"),
        *norm(f"{hf}.norm", "language/norm", rms=True),
    ]
    if not language.tied:
        entries.append(Entry("language_model.lm_head.weight", ("language/out",), "v d -> d v"))
    return entries


def ties(config: LMMConfig) -> tuple[Tie, ...]:
    """Counts that one field of config.json holds for several axes."""
    return (
        Tie("vision/embed", "vision/heads", config.vision.stack.head_dim),
        Tie("bridge/mlp", "text/embed"),
    )


def violations(config: LMMConfig) -> tuple[str, ...]:
    """What keeps a shape from being served, each as a sentence; empty where nothing does."""
    found = list(tie_violations(ties(config), config))
    llama = config.language.decoder
    heads = llama.heads * llama.q_per_kv
    if llama.embed % heads:
        found.append(
            f"text/embed = {llama.embed} must be divisible by the {heads} query heads (text/heads = {llama.heads})"
        )
    return tuple(found)
