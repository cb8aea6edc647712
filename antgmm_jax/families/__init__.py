"""Model families, one folder each, and the functions that choose the family of a model."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from antgmm_jax.axes import read_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import (
    blip2,
    gemma3,
    idefics3,
    instructblip,
    internvl,
    llava,
    llava_onevision,
    mistral3,
    qwen2_5_vl,
    qwen3_vl,
)
from antgmm_jax.families.base import Family, Inputs
from antgmm_jax.families.rules import complete_ties

if TYPE_CHECKING:
    import tokenizers
    import transformers

_FOLDERS = (blip2, llava, llava_onevision, idefics3, internvl, qwen3_vl, qwen2_5_vl, gemma3, mistral3, instructblip)
FAMILIES = {folder.FAMILY.name: folder.FAMILY for folder in _FOLDERS}


def family(config: LMMConfig) -> Family:
    """Returns the family of a model config."""
    return FAMILIES[config.family]


def family_of(model_type: str) -> Family:
    """Returns the family for a `model_type` in config.json.

    Raises:
        AntgmmError: no family supports this type.
    """
    by_type = {name: one for one in FAMILIES.values() for name in one.model_types}
    if model_type not in by_type:
        raise AntgmmError(f"model_type {model_type!r} is not supported: use one of {', '.join(by_type)}")
    return by_type[model_type]


def from_dict(values: Mapping[str, Any]) -> LMMConfig:
    """Builds a model config from the output of `antgmm_jax.axes.to_dict`.

    Raises:
        AntgmmError: unknown family.
    """
    name = values.get("family")
    if name not in FAMILIES:
        raise AntgmmError(f"unknown model family {name!r} in the record: it must be one of {', '.join(FAMILIES)}")
    return read_dict(FAMILIES[name].config, values)


def complete(config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, int]:
    """Adds the sizes of axes that are tied to the given ones.

    Args:
        config: model config.
        wanted: axis name -> size.

    Returns:
        `wanted` with the tied axes added.

    Raises:
        AntgmmError: an unknown axis, or sizes that conflict.
    """
    return complete_ties(family(config).ties(config), config, wanted)


def violations(config: LMMConfig) -> tuple[str, ...]:
    """Returns the reasons why stock transformers cannot load a model of this shape; empty if it can."""
    return family(config).violations(config)


def inputs(config: LMMConfig, processor: "transformers.ProcessorMixin") -> Inputs:
    """Returns the object that turns prompts and images into model inputs.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Returns:
        The family's `Inputs`.

    Raises:
        AntgmmError: the processor does not fit the model.
    """
    return _host(config.family).Inputs(config, processor)


def new_processor(
    config: LMMConfig, tokenizer: "tokenizers.Tokenizer | transformers.PreTrainedTokenizerFast"
) -> "transformers.ProcessorMixin":
    """Creates the processor of a model that is trained from scratch.

    Args:
        config: model config.
        tokenizer: trained tokenizer with the special tokens of `antgmm_jax.families.common.words`, or that of a
            pretrained language model.

    Returns:
        A processor; `AutoProcessor` can load what its `save_pretrained` writes.
    """
    return _host(config.family).new_processor(config, tokenizer)


def torch_images(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Converts the images of a batch to arguments of the PyTorch model.

    Args:
        batch: `images`, leaves [B, M, ...], and `input_ids`.
        config: config of the PyTorch model.

    Returns:
        Argument name -> NumPy array; `Family.without_images` if no slot is used.
    """
    of = family_of(config.model_type)
    used = batch["images"]["valid"].any()
    return _host(of.name).Inputs.torch(batch, config) if used else of.without_images(config)


def _host(name: str) -> Any:
    # Imported on use: importing processors takes seconds.
    return import_module(f"antgmm_jax.families.{name}.inputs")
