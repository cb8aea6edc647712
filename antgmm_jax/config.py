"""Frozen configurations of the model that is compressed, their named sizes, and presets."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from antgmm_jax.errors import AntgmmError

Remat = Literal["none", "dots", "full"]
"""What a layer keeps for the backward pass, the rest being computed again: all, matrix products, its input alone."""


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of transformer blocks of one width.

    `heads` counts key-value heads; each takes `q_per_kv` query heads along. `cross_heads` of 0 means no
    cross-attention; otherwise the layers i with i % cross_every == 0 read states of width `cross_embed`.
    """

    layers: int
    embed: int
    heads: int
    head_dim: int
    mlp: int
    act: Literal["gelu", "gelu_new", "quick_gelu", "relu", "silu"]
    q_per_kv: int = 1
    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-6
    post_norm: bool = False
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    causal: bool = False
    scaled: bool = True
    positions: Literal["none", "rope", "relative"] = "none"
    rope_theta: float = 10000.0
    relative_buckets: int = 32
    relative_distance: int = 128
    cross_heads: int = 0
    cross_every: int = 1
    cross_embed: int = 0


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """An image encoder: patches, a class token, learnt positions and a stack.

    `final_norm` says whether the norm after the stack is applied (BLIP-2) or only carried along (CLIP in LLaVA,
    whose readers take the stream before it). `keep_cls` says whether the class token is handed on.
    """

    stack: StackConfig
    image: int
    patch: int
    channels: int = 3
    patch_bias: bool = True
    first_norm: bool = False
    final_norm: bool = True
    keep_cls: bool = True

    @property
    def tokens(self) -> int:
        """Patches of an image plus the class token."""
        return (self.image // self.patch) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """Learnt queries that read the image encoder by cross-attention, then a linear map to the text width."""

    stack: StackConfig
    queries: int


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """A two-layer perceptron from the image encoder's width to the text width."""

    mlp: int
    act: Literal["gelu", "gelu_new", "quick_gelu", "relu", "silu"]
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A decoder, with an encoder before it where `encoder` is given (T5) or alone (Llama).

    `tied`: the head is the token table. `scaled_head`: logits are times width ** -0.5 (T5 v1.0).
    """

    decoder: StackConfig
    vocab: int
    tied: bool
    encoder: StackConfig | None = None
    scaled_head: bool = False
    start_token: int = 0


@dataclass(frozen=True, kw_only=True)
class LMMConfig:
    """A large multimodal model: image encoder, bridge, language model."""

    family: Literal["blip2_t5", "llava"]
    vision: VisionConfig
    bridge: QFormerConfig | ProjectorConfig
    language: LanguageConfig
    image_token: int

    @property
    def qformer(self) -> QFormerConfig:
        """The bridge of a BLIP-2 model."""
        assert isinstance(self.bridge, QFormerConfig)
        return self.bridge

    @property
    def projector(self) -> ProjectorConfig:
        """The bridge of a LLaVA model."""
        assert isinstance(self.bridge, ProjectorConfig)
        return self.bridge

    @property
    def image_tokens(self) -> int:
        """Number of text positions that an image takes."""
        if isinstance(self.bridge, QFormerConfig):
            return self.bridge.queries
        return self.vision.tokens if self.vision.keep_cls else self.vision.tokens - 1


def stacks(config: LMMConfig) -> dict[str, StackConfig]:
    """The model's stacks by tower name, in the order data flows."""
    towers = {"vision": config.vision.stack}
    if isinstance(config.bridge, QFormerConfig):
        towers["bridge"] = config.bridge.stack
    if config.language.encoder is not None:
        towers["encoder"] = config.language.encoder
    towers["decoder" if config.language.encoder is not None else "text"] = config.language.decoder
    return towers


def embed_axis(tower: str) -> str:
    """Name of the width axis of a tower: T5's two stacks share `text/embed`."""
    return "text/embed" if tower in ("encoder", "decoder") else f"{tower}/embed"


def sizes(config: LMMConfig) -> dict[str, int]:
    """Every axis that can be cut, with its present size; `resize` is the way back.

    Args:
        config: the model.

    Returns:
        axis name -> number of units; `heads` counts key-value heads.
    """
    found: dict[str, int] = {}
    for tower, stack in stacks(config).items():
        found[f"{tower}/layers"] = stack.layers
        found[embed_axis(tower)] = stack.embed
        found[f"{tower}/heads"] = stack.heads
        if stack.cross_heads:
            found[f"{tower}/cross_heads"] = stack.cross_heads
        found[f"{tower}/mlp"] = stack.mlp
    if isinstance(config.bridge, ProjectorConfig):
        found["bridge/mlp"] = config.bridge.mlp
    return found


def _resized(stack: StackConfig, tower: str, new: Mapping[str, int], memory: str) -> StackConfig:
    fields = {name: new[f"{tower}/{name}"] for name in ("layers", "heads", "mlp")}
    cross = {"cross_heads": new[f"{tower}/cross_heads"], "cross_embed": new[memory]} if stack.cross_heads else {}
    return dataclasses.replace(stack, embed=new[embed_axis(tower)], **fields, **cross)


def resize(config: LMMConfig, new: Mapping[str, int]) -> LMMConfig:
    """The same model with some axes at other sizes; legality is `families.violations`' business.

    Args:
        config: the model.
        new: axis name -> size; axes not named keep theirs.

    Returns:
        A new config.

    Raises:
        AntgmmError: an axis that this model does not have.
    """
    old = sizes(config)
    unknown = sorted(set(new) - set(old))
    if unknown:
        raise AntgmmError(f"unknown axis {', '.join(unknown)}: this model has {', '.join(old)}")
    full = {**old, **new}
    vision = dataclasses.replace(config.vision, stack=_resized(config.vision.stack, "vision", full, "vision/embed"))
    if isinstance(config.bridge, QFormerConfig):
        stack = _resized(config.bridge.stack, "bridge", full, "vision/embed")
        bridge = dataclasses.replace(config.bridge, stack=stack)
    else:
        bridge = dataclasses.replace(config.bridge, mlp=full["bridge/mlp"])
    language = config.language
    tower = "text" if language.encoder is None else "decoder"
    encoder = language.encoder and _resized(language.encoder, "encoder", full, "text/embed")
    decoder = _resized(language.decoder, tower, full, "text/embed")
    language = dataclasses.replace(language, encoder=encoder, decoder=decoder)
    return dataclasses.replace(config, vision=vision, bridge=bridge, language=language)


def with_cross_every(config: LMMConfig, every: int) -> LMMConfig:
    """The same BLIP-2 model whose Q-Former reads the image at every `every`-th layer."""
    stack = dataclasses.replace(config.qformer.stack, cross_every=every)
    return dataclasses.replace(config, bridge=dataclasses.replace(config.qformer, stack=stack))


def to_dict(config: LMMConfig) -> dict[str, Any]:
    """The config as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(fields: Mapping[str, Any]) -> LMMConfig:
    """The config that `to_dict` wrote."""
    vision = VisionConfig(**{**fields["vision"], "stack": StackConfig(**fields["vision"]["stack"])})
    bridge = fields["bridge"]
    if "stack" in bridge:
        bridge = QFormerConfig(stack=StackConfig(**bridge["stack"]), queries=bridge["queries"])
    else:
        bridge = ProjectorConfig(**bridge)
    language = dict(fields["language"])
    language["decoder"] = StackConfig(**language["decoder"])
    if language["encoder"] is not None:
        language["encoder"] = StackConfig(**language["encoder"])
    rest = {"vision": vision, "bridge": bridge, "language": LanguageConfig(**language)}
    return LMMConfig(**{**fields, **rest})


def blip2_t5(
    *,
    vision: tuple[int, int, int, int],
    bridge: tuple[int, int, int, int],
    text: tuple[int, int, int, int, int],
    head_dims: tuple[int, int, int],
    image: int,
    patch: int,
    queries: int,
    vocab: int,
    image_token: int,
    cross_every: int = 2,
) -> LMMConfig:
    """A BLIP-2 + T5 model from its sizes: T5 with gated FFN as in v1.1 and the tied, scaled head of v1.0.

    Args:
        vision: layers, embed, heads, mlp of the ViT.
        bridge: layers, embed, heads, mlp of the Q-Former.
        text: encoder layers, decoder layers, embed, heads, mlp of T5.
        head_dims: width of a head in ViT, Q-Former and T5.
        image: image side in pixels.
        patch: patch side in pixels.
        queries: Q-Former queries, each one text position.
        vocab: size of the token table.
        image_token: id of the placeholder token.
        cross_every: the Q-Former reads the image at every such layer.

    Returns:
        The config.
    """
    vit = StackConfig(
        layers=vision[0], embed=vision[1], heads=vision[2], mlp=vision[3], head_dim=head_dims[0], act="gelu"
    )
    qformer = StackConfig(
        layers=bridge[0],
        embed=bridge[1],
        heads=bridge[2],
        mlp=bridge[3],
        head_dim=head_dims[1],
        act="gelu",
        eps=1e-12,
        post_norm=True,
        cross_heads=bridge[2],
        cross_every=cross_every,
        cross_embed=vision[1],
    )
    encoder = StackConfig(
        layers=text[0],
        embed=text[2],
        heads=text[3],
        mlp=text[4],
        head_dim=head_dims[2],
        act="gelu_new",
        norm="rms",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        scaled=False,
        positions="relative",
    )
    decoder = dataclasses.replace(encoder, layers=text[1], causal=True, cross_heads=text[3], cross_embed=text[2])
    return LMMConfig(
        family="blip2_t5",
        vision=VisionConfig(stack=vit, image=image, patch=patch),
        bridge=QFormerConfig(stack=qformer, queries=queries),
        language=LanguageConfig(encoder=encoder, decoder=decoder, vocab=vocab, tied=True, scaled_head=True),
        image_token=image_token,
    )


def llava(
    *,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    head_dims: tuple[int, int],
    image: int,
    patch: int,
    vocab: int,
    image_token: int,
    q_per_kv: int = 1,
    tied: bool = False,
) -> LMMConfig:
    """A LLaVA model from its sizes, in the form of LLaVA 1.5: CLIP tower, two-layer projector, Llama decoder.

    Args:
        vision: layers, embed, heads, mlp of the CLIP tower; its class token is not handed on.
        text: layers, embed, key-value heads, mlp of Llama.
        head_dims: width of a head in CLIP and Llama; in CLIP, heads times width is the embed.
        image: image side in pixels.
        patch: patch side in pixels; each patch is one text position.
        vocab: size of the token table.
        image_token: id of the placeholder token.
        q_per_kv: query heads of one key-value head.
        tied: whether the head is the token table.

    Returns:
        The config.
    """
    clip = StackConfig(
        layers=vision[0],
        embed=vision[1],
        heads=vision[2],
        mlp=vision[3],
        head_dim=head_dims[0],
        act="quick_gelu",
        eps=1e-5,
    )
    llama = StackConfig(
        layers=text[0],
        embed=text[1],
        heads=text[2],
        mlp=text[3],
        head_dim=head_dims[1],
        q_per_kv=q_per_kv,
        act="silu",
        norm="rms",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        causal=True,
        positions="rope",
    )
    encoder = VisionConfig(
        stack=clip, image=image, patch=patch, patch_bias=False, first_norm=True, final_norm=False, keep_cls=False
    )
    return LMMConfig(
        family="llava",
        vision=encoder,
        bridge=ProjectorConfig(mlp=text[1], act="gelu"),
        language=LanguageConfig(decoder=llama, vocab=vocab, tied=tied),
        image_token=image_token,
    )


def preset(name: str) -> LMMConfig:
    """A named model: BLIP-2 + T5, the paper's form, at several sizes, and a small LLaVA.

    Args:
        name: `antgmm-tiny` (8-11 M), `antgmm-deep` (as many, in 61 narrow layers), `antgmm-small` (20-30 M),
            `antgmm-300m`, `antgmm-5b` or `llava-tiny` (2-4 M).

    Returns:
        The config.

    Raises:
        AntgmmError: no such preset.
    """
    if name not in PRESETS:
        raise AntgmmError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


PRESETS: dict[str, LMMConfig] = {
    "antgmm-tiny": blip2_t5(
        vision=(6, 192, 6, 768),
        bridge=(4, 192, 6, 768),
        text=(3, 3, 192, 6, 512),
        head_dims=(32, 32, 32),
        image=96,
        patch=24,
        queries=16,
        vocab=1024,
        image_token=3,
    ),
    "antgmm-deep": blip2_t5(
        vision=(10, 192, 6, 384),
        bridge=(8, 128, 4, 256),
        text=(6, 37, 128, 3, 128),
        head_dims=(32, 32, 32),
        image=112,
        patch=28,
        queries=16,
        vocab=768,
        image_token=3,
    ),
    "antgmm-small": blip2_t5(
        vision=(7, 320, 10, 1280),
        bridge=(4, 320, 10, 1280),
        text=(4, 4, 320, 10, 896),
        head_dims=(32, 32, 32),
        image=112,
        patch=16,
        queries=16,
        vocab=4096,
        image_token=3,
    ),
    "antgmm-300m": blip2_t5(
        vision=(12, 704, 8, 2816),
        bridge=(6, 512, 8, 2048),
        text=(14, 8, 768, 12, 2048),
        head_dims=(88, 64, 64),
        image=224,
        patch=14,
        queries=32,
        vocab=32128,
        image_token=32100,
    ),
    "antgmm-5b": blip2_t5(
        vision=(39, 1408, 16, 6144),
        bridge=(12, 768, 12, 3072),
        text=(36, 36, 2048, 32, 5376),
        head_dims=(88, 64, 64),
        image=224,
        patch=14,
        queries=32,
        vocab=32128,
        image_token=32100,
    ),
    "llava-tiny": llava(
        vision=(5, 128, 2, 512),
        text=(6, 160, 2, 448),
        head_dims=(64, 32),
        image=112,
        patch=28,
        vocab=1024,
        image_token=3,
        q_per_kv=2,
    ),
}
