"""LLaVA models by name, and from their sizes."""

from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LanguageConfig, StackConfig, VisionConfig
from antgmm_jax.families.llama import sized_decoder
from antgmm_jax.families.llava.config import LlavaConfig


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
) -> LlavaConfig:
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
    llama = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-6, rope_theta=10000.0)
    encoder = VisionConfig(
        stack=clip, image=image, patch=patch, patch_bias=False, first_norm=True, final_norm=False, keep_cls=False
    )
    return LlavaConfig(
        vision=encoder,
        bridge=ProjectorConfig(mlp=text[1], act="gelu"),
        language=LanguageConfig(decoder=llama, vocab=vocab, tied=tied),
        image_token=image_token,
    )


PRESETS: dict[str, LlavaConfig] = {
    "llava-tiny": sized(
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
