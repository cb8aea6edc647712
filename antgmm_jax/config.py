"""Frozen configs of the parts of every model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from antgmm_jax.axes import Part, axis, nodes, part, part_by

Remat = Literal["none", "dots", "attention", "full"]
"""What a layer saves for the backward pass: everything, matrix products, its input and what a TPU's flash kernel
reads in the backward pass, or only its input; the rest is recomputed."""

IMAGE_SIDE = ("vision", "bridge")
"""Parts of a model that read pictures: fields of its config, and roots of their parameters."""


def on_image_side(axis: str) -> bool:
    """Whether an axis, such as "vision/layers", is one of the image side."""
    return axis.split("/")[0] in (*IMAGE_SIDE, "merger")  # a merger is a part of the bridge


Act = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Rotary positions stretched by `factor` beyond the `original` ones (YaRN, arXiv 2309.00071).

    Frequencies with more than `fast` rotations over the original positions are kept, those with fewer than `slow` are
    divided by `factor`. Queries are multiplied by 1 + query_growth * log(1 + floor(position / original)).
    """

    factor: float
    original: int
    fast: float
    slow: float
    query_growth: float


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Rotary positions for longer texts than the `original` ones, as of Llama 3.1 ("llama3" in transformers).

    Frequencies with more than `high` rotations over the original positions are kept, those with fewer than `low` are
    divided by `factor`; between them both are mixed in proportion.
    """

    factor: float
    original: int
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of transformer blocks of one width.

    `heads` counts key-value heads; each serves `q_per_kv` query heads. `cross_heads` is 0 without cross-attention;
    otherwise layer i has cross-attention to another part if i % cross_every == 0. `qk_norm`: an RMSNorm over each head
    of queries and keys. `rope_sections`: the number of rotary frequencies of each axis, if positions have several axes;
    `rope_interleaved`: whether the frequencies of the axes alternate.
    `local_layers`: indices of the layers with a mask and positions of their own; those beyond the last layer are
    ignored, because `resize` keeps them. In a decoder they see the last `window` positions (0: as many as the others),
    with rotary positions of base `local_theta`. `rope_factor`: the other rotary positions are divided by it.
    `norm`: LayerNorm, RMSNorm, or "rms1", an RMSNorm that multiplies by 1 + scale. `post_norm`: norms after each
    residual sum instead of before each sublayer. `sandwich`: norms before and after each sublayer. `layer_scale`: a
    factor for each channel of what a sublayer adds. `scale_width`: attention logits are divided by its square root;
    None for that of `head_dim`.
    `text_mlp`: hidden units of a second feed-forward layer, for the text behind the queries of a stack that reads both;
    only the queries have cross-attention. 0 without text.
    """

    layers: int = axis()
    embed: int = axis()
    heads: int = axis()
    cross_heads: int = axis(default=0)
    mlp: int = axis()
    text_mlp: int = axis(default=0)
    head_dim: int
    act: Act
    q_per_kv: int = 1
    norm: Literal["layer", "rms", "rms1"] = "layer"
    eps: float = 1e-6
    post_norm: bool = False
    sandwich: bool = False
    layer_scale: bool = False
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    causal: bool = False
    scaled: bool = True
    scale_width: int | None = None
    positions: Literal["none", "rope", "relative"] = "none"
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_sections: tuple[int, ...] = ()
    rope_interleaved: bool = True
    yarn: Yarn | None = None
    llama3: Llama3Rope | None = None
    qk_norm: bool = False
    relative_buckets: int = 32
    relative_distance: int = 128
    cross_every: int = 1
    local_layers: tuple[int, ...] = ()
    local_theta: float = 10000.0
    window: int = 0

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Whether each layer is one of `local_layers`."""
        return tuple(layer in self.local_layers for layer in range(self.layers))

    @property
    def cross_layers(self) -> int:
        """Number of layers with cross-attention."""
        return -(-self.layers // self.cross_every) if self.cross_heads else 0


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """An image encoder: patches, an optional class token, learnt positions and a stack.

    `final_norm` says whether the norm after the stack is applied; if not, its parameters are only stored.
    `has_final_norm` says whether there is such a norm, `has_cls` whether there is a class token, and `keep_cls` whether
    the bridge reads it.
    """

    stack: StackConfig
    image: int
    patch: int
    channels: int = 3
    patch_bias: bool = True
    first_norm: bool = False
    final_norm: bool = True
    has_final_norm: bool = True
    has_cls: bool = True
    keep_cls: bool = True

    @property
    def patches(self) -> int:
        """Patches of one square image."""
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Patches of one square image plus the class token."""
        return self.patches + self.has_cls

    @property
    def reach(self) -> int:
        """Patches that those of the stack's local layers see at most; 0 if as many as in the others."""
        return 0

    @property
    def handed_on(self) -> int:
        """Tokens of one square image that the bridge reads."""
        return self.patches + (self.has_cls and self.keep_cls)


def _decoder(language: "LanguageConfig") -> Part:
    if language.encoder is None:
        return Part("text", "text/embed", "text")
    return Part("decoder", "text/embed", "answers", "text/embed", "encoder")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A decoder, preceded by an encoder if `encoder` is set.

    `tied`: the head shares the token table. `scaled_head`: logits are multiplied by width ** -0.5. `scaled_tokens`:
    embeddings of tokens are multiplied by width ** 0.5. `learned_positions`: number of entries of a position table that
    a decoder-only model adds to its tokens, after `first_position` unused ones; 0 without a table.
    """

    encoder: StackConfig | None = part("encoder", embed="text/embed", tokens="text", default=None)
    decoder: StackConfig = part_by(_decoder)
    vocab: int
    tied: bool
    scaled_head: bool = False
    scaled_tokens: bool = False
    learned_positions: int = 0
    first_position: int = 0
    start_token: int = 0


@dataclass(frozen=True, kw_only=True)
class LMMConfig:
    """A vision-language model: image encoder, bridge and language model. Each family subclasses it."""

    family: str
    vision: VisionConfig = part("vision", tokens="images")
    bridge: Any = part("bridge", tokens="images", memory="vision/embed", reads="vision/out")
    language: LanguageConfig
    image_token: int

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt and a decoder the answer."""
        return self.language.encoder is not None

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of squares, one per slot, that an image of the usual size is cut into.

        None for families that encode each slot alone.
        """
        return None

    @property
    def usual_place(self) -> Any:
        """Leaf `place` of the tree of an image of the usual size, int32 [M, P]; None for families without it."""
        # Imported on use: the command line imports configs, but neither JAX nor NumPy.
        from antgmm_jax.blocks.grids import places

        return None if self.grid is None else places(*self.grid)

    @property
    def slots(self) -> int:
        """Image slots of an image of the usual size."""
        return math.prod(self.grid or (1, 1))

    @property
    def side(self) -> int:
        """Pixels per side of a slot."""
        return self.vision.image // (self.grid or (1, 1))[0]

    @property
    def image_tokens(self) -> int:
        """Text positions that one image slot occupies."""
        return self.vision.handed_on

    @property
    def bridge_tokens(self) -> int:
        """Tokens of the bridge's output for an image slot: its text positions, and what else the bridge makes of it."""
        return self.image_tokens

    @property
    def instruction(self) -> int:
        """Length of the instruction that the image side reads with each image; 0 for families that read none."""
        return 0

    @property
    def usual_tokens(self) -> int:
        """Text positions that an image of the usual size occupies."""
        return self.slots * self.image_tokens

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens per image slot that the linear maps of each stage of the image side read.

        The stages are the patch embedding (`vision/patches`), the encoder stack (`vision`), the bridge's input
        (`vision/out`), the bridge's own stack (`bridge`) and its last maps (`bridge/out`). Where that stack reads text
        too, `bridge/queries` and `bridge/text` are the parts of its tokens.
        """
        vision = self.vision
        counts = {"vision/patches": vision.patches, "vision": vision.tokens, "vision/out": vision.handed_on}
        return {**counts, "bridge": self.image_tokens, "bridge/out": self.image_tokens}


class Tower(NamedTuple):
    """A stack of a model with its axis names and its place in the parameter tree.

    Attributes:
        name: prefix of its axis names.
        stack: its config.
        root: path of its parameters.
        embed: name of its width axis.
        tokens: what it processes: "images", "text" or "answers".
        memory: width axis of the states that its cross-attention reads; "" without cross-attention.
        reads: tokens of those states: a key of `LMMConfig.tokens` or a tower; "" without cross-attention.
    """

    name: str
    stack: StackConfig
    root: str
    embed: str
    tokens: str
    memory: str
    reads: str

    def axis(self, local: str) -> str:
        """Full name of one of its axes: `mlp` -> "vision/mlp"."""
        return self.embed if local == "embed" else f"{self.name}/{local}"


def towers(config: LMMConfig) -> dict[str, Tower]:
    """Returns the model's stacks by name, in the order in which data flows.

    Config and parameters are nested alike, so the field path of a stack is the path of its parameters.
    """
    stacks = [node for node in nodes(config) if isinstance(node.config, StackConfig) and node.part is not None]
    all_towers = (Tower(p.name, n.config, "/".join(n.path), *p[1:]) for n in stacks if (p := n.part))
    return {tower.name: tower for tower in all_towers}
