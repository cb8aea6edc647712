"""Frozen configurations of the parts that every model is assembled from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from antgmm_jax.axes import Part, axis, nodes, part, part_by

Remat = Literal["none", "dots", "full"]
"""What a layer keeps for the backward pass, the rest being computed again: all, matrix products, its input alone."""

IMAGE_SIDE = ("vision", "bridge")
"""Parts of a model that read pictures: fields of its config, and roots of their parameters."""

Act = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of transformer blocks of one width.

    `heads` counts key-value heads; each takes `q_per_kv` query heads along. `cross_heads` of 0 means no
    cross-attention; otherwise the layers i with i % cross_every == 0 read the states of another part.
    """

    layers: int = axis()
    embed: int = axis()
    heads: int = axis()
    cross_heads: int = axis(default=0)
    mlp: int = axis()
    head_dim: int
    act: Act
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
    cross_every: int = 1

    @property
    def cross_layers(self) -> int:
        """Layers with cross-attention."""
        return -(-self.layers // self.cross_every) if self.cross_heads else 0


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """An image encoder: patches, perhaps a class token, learnt positions and a stack.

    `final_norm` says whether the norm after the stack is applied or only carried along (where readers take the stream
    before it). `has_cls` says whether there is a class token, `keep_cls` whether it is handed on.
    """

    stack: StackConfig
    image: int
    patch: int
    channels: int = 3
    patch_bias: bool = True
    first_norm: bool = False
    final_norm: bool = True
    has_cls: bool = True
    keep_cls: bool = True

    @property
    def patches(self) -> int:
        """Patches of a square of pixels."""
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Patches of a square of pixels plus the class token."""
        return self.patches + self.has_cls

    @property
    def handed_on(self) -> int:
        """Tokens of a square of pixels that the bridge reads."""
        return self.patches + (self.has_cls and self.keep_cls)


def _decoder(language: "LanguageConfig") -> Part:
    if language.encoder is None:
        return Part("text", "text/embed", "text")
    return Part("decoder", "text/embed", "answers", "text/embed", "encoder")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A decoder, with an encoder before it where `encoder` is given or alone.

    `tied`: the head is the token table. `scaled_head`: logits are times width ** -0.5.
    """

    encoder: StackConfig | None = part("encoder", embed="text/embed", tokens="text", default=None)
    decoder: StackConfig = part_by(_decoder)
    vocab: int
    tied: bool
    scaled_head: bool = False
    start_token: int = 0


@dataclass(frozen=True, kw_only=True)
class LMMConfig:
    """A large multimodal model: image encoder, bridge, language model; each family has a config of its own."""

    family: str
    vision: VisionConfig = part("vision", tokens="images")
    bridge: Any = part("bridge", tokens="images", memory="vision/embed", reads="vision/out")
    language: LanguageConfig
    image_token: int

    @property
    def encoder_decoder(self) -> bool:
        """Whether prompt and answer are read apart."""
        return self.language.encoder is not None

    @property
    def image_tokens(self) -> int:
        """Text positions that a picture slot takes."""
        return self.vision.handed_on

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens of one picture slot that each kind of linear map of the image side reads.

        `vision/patches` is what the first map reads, `vision` the stack, `vision/out` what is handed on to the bridge,
        `bridge` the bridge's own stack and `bridge/out` what its last maps read.
        """
        vision = self.vision
        counts = {"vision/patches": vision.patches, "vision": vision.tokens, "vision/out": vision.handed_on}
        return {**counts, "bridge": self.image_tokens, "bridge/out": self.image_tokens}


class Tower(NamedTuple):
    """A stack of a model with what is known of it.

    Attributes:
        name: first half of its axes' names.
        stack: its config.
        root: path of its parameters.
        embed: name of its width axis.
        tokens: what it processes: "images", "text" or "answers".
        memory: width axis of the states that its cross-attention reads; "" without.
        reads: which tokens those states are, a key of `LMMConfig.tokens` or a tower; "" without.
    """

    name: str
    stack: StackConfig
    root: str
    embed: str
    tokens: str
    memory: str
    reads: str

    def axis(self, local: str) -> str:
        """Name of one of its axes: `mlp` -> "vision/mlp"."""
        return self.embed if local == "embed" else f"{self.name}/{local}"


def towers(config: LMMConfig) -> dict[str, Tower]:
    """The model's stacks by name, in the order data flows.

    A config lies as the parameters do, so that the fields which lead to a stack are the path of its parameters.
    """
    found = [node for node in nodes(config) if isinstance(node.config, StackConfig) and node.part is not None]
    made = (Tower(p.name, n.config, "/".join(n.path), *p[1:]) for n in found if (p := n.part))
    return {tower.name: tower for tower in made}
