"""Named Mistral 3 models, and models of given sizes."""

from dataclasses import replace

from antgmm_jax.blocks.packed import PackedVisionConfig
from antgmm_jax.config import LanguageConfig, Yarn
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.vit import sized_encoder
from antgmm_jax.families.mistral3.config import BridgeConfig, MergerConfig, Mistral3Config, pixtral


def sized(
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
    rope_theta: float = 1000000.0,
    yarn: Yarn | None = None,
) -> Mistral3Config:
    """Returns a Mistral 3 config of given sizes.

    Args:
        vision: sizes of the image encoder, see `antgmm_jax.families.common.vit.sized_encoder`.
        text: sizes of Mistral, see `antgmm_jax.families.common.llama.sized_decoder`.
        head_dims: head widths of image encoder and Mistral.
        image: longest side of an image in pixels.
        patch: pixels per side of a patch.
        vocab: size of the token table.
        image_token: id of the image token.
        q_per_kv: query heads per key-value head.
        tied: whether the head shares the token table.
        rope_theta: base of the text's rotary positions.
        yarn: how they are stretched, as in Ministral 3; None for Mistral.

    Returns:
        Model config.
    """
    encoder = PackedVisionConfig(
        stack=pixtral(sized_encoder(vision, head_dims[0], act="silu", eps=1e-5)),
        image=image,
        patch=patch,
        patch_bias=False,
        first_norm=True,
        merge=2,
        frames=1,
        alternating=True,
    )
    mistral = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-5, rope_theta=rope_theta)
    return Mistral3Config(
        vision=encoder,
        bridge=BridgeConfig(mlp=text[1], act="gelu", bias=False, merger=MergerConfig(mlp=vision[1])),
        language=LanguageConfig(decoder=replace(mistral, yarn=yarn), vocab=vocab, tied=tied),
        image_token=image_token,
    )


_OFFICIAL = {
    "vision": (24, 1024, 16, 4096),
    "head_dims": (64, 128),
    "image": 1540,
    "patch": 14,
    "vocab": 131072,
    "image_token": 10,
    "q_per_kv": 4,
}

PRESETS: dict[str, Mistral3Config] = {
    "ministral-3-tiny": sized(
        vision=(5, 128, 2, 352),
        text=(6, 192, 2, 448),
        head_dims=(64, 32),
        image=96,
        patch=12,
        vocab=1024,
        image_token=3,
        q_per_kv=3,
        tied=True,
        yarn=Yarn(factor=16.0, original=256, fast=32.0, slow=1.0, query_growth=0.1),
    ),
    "ministral-3-3b": sized(
        text=(26, 3072, 8, 9216),
        tied=True,
        yarn=Yarn(factor=16.0, original=16384, fast=32.0, slow=1.0, query_growth=0.1),
        **_OFFICIAL,
    ),
    "mistral-small-3.1-24b": sized(text=(40, 5120, 8, 32768), rope_theta=1e9, **_OFFICIAL),
}
