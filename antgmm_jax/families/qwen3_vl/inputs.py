"""Inputs of Qwen3-VL; see `antgmm_jax.families.common.qwen_inputs`."""

from transformers import ProcessorMixin, Qwen3VLProcessor, Qwen3VLVideoProcessor

from antgmm_jax.blocks.packed import PackedConfig
from antgmm_jax.families.common.qwen_inputs import QwenInputs, processor_of
from antgmm_jax.families.common.words import AnyTokenizer


class Inputs(QwenInputs):
    """Implements `antgmm_jax.families.base.Inputs`."""

    kind = Qwen3VLProcessor


def new_processor(config: PackedConfig, tokenizer: AnyTokenizer) -> ProcessorMixin:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`."""
    return processor_of(config, tokenizer, Qwen3VLProcessor, Qwen3VLVideoProcessor)
