"""One file a Hugging Face family; here the choice between them."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import blip2_t5, llava
from antgmm_jax.families.rules import complete_ties

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import ProcessorMixin

    from antgmm_jax.families.base import Inputs

FAMILIES = {"blip2_t5": blip2_t5, "llava": llava}


def family_of(model_type: str):
    """The family that reads a `model_type` of config.json.

    Raises:
        AntgmmError: no family does.
    """
    for family in FAMILIES.values():
        if model_type == family.MODEL_TYPE:
            return family
    known = ", ".join(f.MODEL_TYPE for f in FAMILIES.values())
    raise AntgmmError(f"model_type {model_type!r} is not supported: known are {known}")


def complete(config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, int]:
    """Fills in the axes whose count is tied to a stated one; AntgmmError where two statements conflict.

    Args:
        config: the model.
        wanted: axis name -> size, as stated.

    Returns:
        `wanted` and what follows from it.
    """
    return complete_ties(FAMILIES[config.family].ties(config), config, wanted)


def violations(config: LMMConfig) -> tuple[str, ...]:
    """What keeps a shape from being served by stock transformers, each as a sentence; empty where nothing does."""
    return FAMILIES[config.family].violations(config)


_HOST = {"blip2_t5": ("blip2_inputs", "Blip2Inputs"), "llava": ("llava_inputs", "LlavaInputs")}


def inputs(config: LMMConfig, processor: "ProcessorMixin") -> "Inputs":
    """How a model's records are read.

    Args:
        config: the model.
        processor: of its checkpoint.

    Returns:
        The family's inputs.

    Raises:
        AntgmmError: the processor makes other pictures or tokens than the model reads.
    """
    module, name = _HOST[config.family]
    return getattr(import_module(f"antgmm_jax.families.{module}"), name)(config, processor)


def new_processor(config: LMMConfig, tokenizer: "Tokenizer") -> "ProcessorMixin":
    """The processor of a model that is trained from scratch.

    Args:
        config: the model.
        tokenizer: a trained one that has the tokens of `antgmm_jax.families.words`.

    Returns:
        A processor; `save_pretrained` writes what `AutoProcessor` reads back offline.
    """
    return import_module(f"antgmm_jax.families.{_HOST[config.family][0]}").new_processor(config, tokenizer)
