"""Named BLIP-2 models, and models of given sizes."""

from antgmm_jax.config import StackConfig, VisionConfig
from antgmm_jax.families.blip2.config import Blip2Config
from antgmm_jax.families.blip2.image import QFormerConfig
from antgmm_jax.families.common import opt, t5


def vit_sized(sizes: tuple[int, int, int, int], head_dim: int, *, image: int, patch: int) -> VisionConfig:
    """Returns the config of a ViT: layers, embed, heads, mlp."""
    layers, embed, heads, mlp = sizes
    stack = StackConfig(layers=layers, embed=embed, heads=heads, mlp=mlp, head_dim=head_dim, act="gelu")
    return VisionConfig(stack=stack, image=image, patch=patch)


def qformer_sized(sizes: tuple[int, int, int, int], head_dim: int, *, cross_every: int = 2) -> StackConfig:
    """Returns the config of a Q-Former's stack: layers, embed, heads, mlp."""
    layers, embed, heads, mlp = sizes
    return StackConfig(
        layers=layers,
        embed=embed,
        heads=heads,
        mlp=mlp,
        head_dim=head_dim,
        act="gelu",
        eps=1e-12,
        post_norm=True,
        cross_heads=heads,
        cross_every=cross_every,
    )


def sized(
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
) -> Blip2Config:
    """Returns a BLIP-2 + T5 config of given sizes, with the gated MLP of T5 v1.1 and the tied, scaled head of v1.0.

    Args:
        vision: layers, embed, heads, mlp of the ViT.
        bridge: layers, embed, heads, mlp of the Q-Former.
        text: encoder layers, decoder layers, embed, heads, mlp of T5.
        head_dims: head widths of ViT, Q-Former and T5.
        image: image side in pixels.
        patch: patch side in pixels.
        queries: number of Q-Former queries; each occupies one text position.
        vocab: size of the token table.
        image_token: id of the image token.
        cross_every: every how many layers the Q-Former has cross-attention.

    Returns:
        The config.
    """
    return Blip2Config(
        vision=vit_sized(vision, head_dims[0], image=image, patch=patch),
        bridge=QFormerConfig(stack=qformer_sized(bridge, head_dims[1], cross_every=cross_every), queries=queries),
        language=t5.sized_language(text, head_dims[2], vocab=vocab, scaled=True),
        image_token=image_token,
    )


VIT_G, BERT = (39, 1408, 16, 6144), (12, 768, 12, 3072)


def _with_opt(sizes: tuple[int, int, int, int], head_dim: int) -> Blip2Config:
    """BLIP-2 as released with OPT: layers, embed, heads, mlp of OPT."""
    return Blip2Config(
        vision=vit_sized(VIT_G, 88, image=224, patch=14),
        bridge=QFormerConfig(stack=qformer_sized(BERT, 64), queries=32),
        language=opt.sized_language(sizes, head_dim, vocab=50304, positions=2048),
        image_token=50265,
    )


PRESETS: dict[str, Blip2Config] = {
    "antgmm-tiny": sized(
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
    "antgmm-deep": sized(
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
    "antgmm-small": sized(
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
    "antgmm-300m": sized(
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
    "antgmm-5b": sized(
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
    "blip2-opt-tiny": Blip2Config(
        vision=vit_sized((4, 128, 4, 512), 32, image=96, patch=24),
        bridge=QFormerConfig(stack=qformer_sized((4, 128, 4, 512), 32), queries=16),
        language=opt.sized_language((4, 192, 6, 768), 32, vocab=1024, positions=512),
        image_token=3,
    ),
    "blip2-opt-2.7b": _with_opt((32, 2560, 32, 10240), 80),
    "blip2-opt-6.7b": _with_opt((32, 4096, 32, 16384), 128),
}
