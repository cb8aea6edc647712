"""Named Qwen2.5-VL models, and models of given sizes."""

from dataclasses import replace

from antgmm_jax.blocks.packed import PackedVisionConfig
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.config import LanguageConfig
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.vit import sized_encoder
from antgmm_jax.families.qwen2_5_vl.config import WINDOWS, Qwen25VLConfig, windowed


def sized(
    *,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int, int],
    head_dims: tuple[int, int],
    full: tuple[int, ...],
    sections: tuple[int, int, int],
    window: int,
    patch: int,
    vocab: int,
    image_token: int,
    q_per_kv: int = 1,
    tied: bool = False,
    rope_theta: float = 1000000.0,
    flat: bool = False,
) -> Qwen25VLConfig:
    """Returns a Qwen2.5-VL config of given sizes.

    Args:
        vision: sizes of the image encoder, see `antgmm_jax.families.common.vit.sized_encoder`.
        text: sizes of Qwen2, see `antgmm_jax.families.common.llama.sized_decoder`; embed = heads x q_per_kv x head_dim.
        head_dims: head widths of image encoder and Qwen2.
        full: layers of the image encoder that attend to whole images.
        sections: number of rotary frequencies for time, row and column.
        window: squares per side of a window; a square has 2 x 2 patches.
        patch: pixels per side of a patch.
        vocab: size of the token table.
        image_token: id of the image token.
        q_per_kv: query heads per key-value head.
        tied: whether the head shares the token table.
        rope_theta: base of the text's rotary positions.
        flat: see `Qwen25VLConfig`.

    Returns:
        Model config.
    """
    encoder = replace(sized_encoder(vision, head_dims[0], act="silu", eps=1e-6), positions="rope")
    local = tuple(layer for layer in range(vision[0]) if layer not in full)
    image = PackedVisionConfig(
        stack=windowed(encoder, local),
        image=WINDOWS * window * 2 * patch,
        patch=patch,
        patch_bias=False,
        merge=2,
        frames=2,
        window=window,
    )
    qwen = sized_decoder(text, head_dims[1], q_per_kv=q_per_kv, eps=1e-6, rope_theta=rope_theta)
    decoder = replace(qwen, qkv_bias=True, rope_sections=sections, rope_interleaved=False)
    return Qwen25VLConfig(
        vision=image,
        bridge=ProjectorConfig(mlp=4 * vision[1], act="gelu"),
        language=LanguageConfig(decoder=decoder, vocab=vocab, tied=tied),
        image_token=image_token,
        flat=flat,
    )


_OFFICIAL = {
    "vision": (32, 1280, 16, 3420),
    "head_dims": (80, 128),
    "full": (7, 15, 23, 31),
    "sections": (16, 24, 24),
    "window": 4,
    "patch": 14,
    "image_token": 151655,
    "flat": True,
}

PRESETS: dict[str, Qwen25VLConfig] = {
    "qwen2.5-vl-tiny": sized(
        vision=(5, 128, 2, 352),
        text=(6, 192, 2, 448),
        head_dims=(64, 32),
        full=(2, 4),
        sections=(4, 6, 6),
        window=2,
        patch=12,
        vocab=1024,
        image_token=3,
        q_per_kv=3,
        tied=True,
        rope_theta=10000.0,
    ),
    "qwen2.5-vl-3b": sized(text=(36, 2048, 2, 11008), q_per_kv=8, vocab=151936, tied=True, **_OFFICIAL),
    "qwen2.5-vl-7b": sized(text=(28, 3584, 4, 18944), q_per_kv=7, vocab=152064, **_OFFICIAL),
}
