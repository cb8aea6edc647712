"""Named InstructBLIP models."""

from dataclasses import replace

from antgmm_jax.config import LanguageConfig
from antgmm_jax.families.blip2.presets import BERT, VIT_G, qformer_sized, vit_sized
from antgmm_jax.families.common import t5
from antgmm_jax.families.common.llama import sized_decoder
from antgmm_jax.families.common.text import TextConfig
from antgmm_jax.families.instructblip.config import InstructBlipConfig, InstructQFormerConfig


def _bridge(
    sizes: tuple[int, int, int, int], head_dim: int, *, queries: int, words: int, positions: int
) -> InstructQFormerConfig:
    stack = qformer_sized(sizes, head_dim)
    return InstructQFormerConfig(
        stack=replace(stack, text_mlp=stack.mlp), queries=queries, words=words, positions=positions
    )


def _official(language: LanguageConfig, image_token: int) -> InstructBlipConfig:
    return InstructBlipConfig(
        vision=vit_sized(VIT_G, 88, image=224, patch=14),
        bridge=_bridge(BERT, 64, queries=32, words=30523, positions=512),
        language=language,
        image_token=image_token,
    )


def _tiny(language: LanguageConfig) -> InstructBlipConfig:
    return InstructBlipConfig(
        vision=vit_sized((4, 128, 4, 512), 32, image=96, patch=24),
        bridge=_bridge((4, 128, 4, 512), 32, queries=16, words=1024, positions=64),
        language=language,
        image_token=3,
    )


def _flan_t5(sizes: tuple[int, int, int, int, int]) -> InstructBlipConfig:
    language = t5.sized_language(sizes, 64, vocab=32128, scaled=False, tied=False, act="gelu")
    return _official(language, 32100)


_LLAMA = sized_decoder((6, 192, 2, 448), 32, q_per_kv=3, eps=1e-6, rope_theta=10000.0)
_VICUNA = sized_decoder((32, 4096, 32, 11008), 128, q_per_kv=1, eps=1e-6, rope_theta=10000.0)

PRESETS: dict[str, InstructBlipConfig] = {
    "instructblip-tiny": _tiny(t5.sized_language((3, 3, 128, 4, 384), 32, vocab=1024, scaled=True)),
    "instructblip-llama-tiny": _tiny(TextConfig(model_type="llama", decoder=_LLAMA, vocab=1024, tied=False)),
    "instructblip-flan-t5-xl": _flan_t5((24, 24, 2048, 32, 5120)),
    "instructblip-vicuna-7b": _official(
        TextConfig(model_type="llama", decoder=_VICUNA, vocab=32064, tied=False), 32001
    ),
}
