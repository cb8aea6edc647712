"""Named BLIP-2 + T5 models, and models of given sizes."""

import dataclasses

from antgmm_jax.config import LanguageConfig, StackConfig, VisionConfig
from antgmm_jax.families.blip2.config import Blip2Config
from antgmm_jax.families.blip2.image import QFormerConfig


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
    decoder = dataclasses.replace(encoder, layers=text[1], causal=True, cross_heads=text[3])
    return Blip2Config(
        vision=VisionConfig(stack=vit, image=image, patch=patch),
        bridge=QFormerConfig(stack=qformer, queries=queries),
        language=LanguageConfig(encoder=encoder, decoder=decoder, vocab=vocab, tied=True, scaled_head=True),
        image_token=image_token,
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
}
