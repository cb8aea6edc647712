"""Frozen configurations of the model that is compressed, and their named sizes."""

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
