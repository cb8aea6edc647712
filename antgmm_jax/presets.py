"""Models by name, and configs of both families from their sizes."""

import dataclasses

from antgmm_jax.config import LanguageConfig, LMMConfig, ProjectorConfig, QFormerConfig, StackConfig, VisionConfig
from antgmm_jax.errors import AntgmmError


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
