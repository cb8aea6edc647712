"""Named LLaVA models, and models of given sizes."""

from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import VisionConfig
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.text import TextConfig, TextType, decoder_of_type
from antgmm_jax.families.common.vit import sized_encoder
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
    eps: float = 1e-6,
    siglip: bool = False,
    kind: TextType = "llama",
) -> LlavaConfig:
    """Returns a config of given sizes, by default of the parts of LLaVA 1.5.

    Args:
        vision: sizes of the image encoder, see `antgmm_jax.families.common.vit.sized_encoder`.
        text: sizes of the text model, see `antgmm_jax.families.common.llama.sized_decoder`.
        head_dims: head widths of image encoder and text model.
        image: side of an image in pixels.
        patch: side of a patch in pixels; each patch occupies one text position.
        vocab: size of the token table.
        image_token: id of the image token.
        q_per_kv: query heads per key-value head.
        tied: whether the head shares the token table.
        eps: epsilon of the text model's norms.
        siglip: whether the image encoder is SigLIP; otherwise it is CLIP, and the projector skips its class token.
        kind: type of the text model.

    Returns:
        Model config.
    """
    act, vision_eps = ("gelu_pytorch_tanh", 1e-6) if siglip else ("quick_gelu", 1e-5)
    encoder = VisionConfig(
        stack=sized_encoder(vision, head_dims[0], act=act, eps=vision_eps),
        image=image,
        patch=patch,
        patch_bias=siglip,
        first_norm=not siglip,
        final_norm=False,
        has_cls=not siglip,
        keep_cls=siglip,
    )
    decoder = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=eps, rope_theta=10000.0)
    return LlavaConfig(
        vision=encoder,
        bridge=ProjectorConfig(mlp=text[1], act="gelu"),
        language=TextConfig(model_type=kind, decoder=decoder_of_type(decoder, kind), vocab=vocab, tied=tied),
        image_token=image_token,
    )


_PAIRS: tuple[tuple[bool, TextType], ...] = (
    (False, "mistral"),
    (False, "qwen2"),
    (False, "qwen3"),
    (True, "llama"),
    (True, "mistral"),
    (True, "qwen2"),
    (True, "qwen3"),
)
"""Pairs of parts that LLaVA 1.5 does not have: whether the image encoder is SigLIP, and the type of the text model."""


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
    # LLaVA-1.5's images, tokens per image and vocabulary in a model that a CPU can train.
    "llava-290m": sized(
        vision=(11, 768, 12, 3072),
        text=(11, 1024, 8, 2816),
        head_dims=(64, 128),
        image=336,
        patch=14,
        vocab=32064,
        image_token=3,
        eps=1e-5,
    ),
    # Without the last layer of CLIP, which LLaVA-1.5 never runs.
    "llava-1.5-7b": sized(
        vision=(23, 1024, 16, 4096),
        text=(32, 4096, 32, 11008),
        head_dims=(64, 128),
        image=336,
        patch=14,
        vocab=32064,
        image_token=32000,
        eps=1e-5,
    ),
    **{
        f"llava-{'siglip' if siglip else 'clip'}-{kind}-tiny": sized(
            vision=(5, 128, 2, 512),
            text=(6, 192, 2, 448),
            head_dims=(64, 32),
            image=112,
            patch=28,
            vocab=1024,
            image_token=3,
            q_per_kv=3,
            siglip=siglip,
            kind=kind,
        )
        for siglip, kind in _PAIRS
    },
}
