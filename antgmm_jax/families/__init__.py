"""One folder a Hugging Face family; here the choice between them."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from antgmm_jax.axes import read_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import blip2_t5, idefics3, llava
from antgmm_jax.families.base import Family, Inputs
from antgmm_jax.families.rules import complete_ties

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import ProcessorMixin

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (blip2_t5, llava, idefics3)}


def family(config: LMMConfig) -> Family:
    """The family of a model."""
    return FAMILIES[config.family]


def family_of(model_type: str) -> Family:
    """The family that reads a `model_type` of config.json.

    Raises:
        AntgmmError: no family does.
    """
    by_type = {name: one for one in FAMILIES.values() for name in one.model_types}
    if model_type not in by_type:
        raise AntgmmError(f"model_type {model_type!r} is not supported: known are {', '.join(by_type)}")
    return by_type[model_type]


def from_dict(values: Mapping[str, Any]) -> LMMConfig:
    """The config that `antgmm_jax.axes.to_dict` wrote.

    Raises:
        AntgmmError: of a family that is not known.
    """
    name = values.get("family")
    if name not in FAMILIES:
        raise AntgmmError(f"a record names the family {name!r}: known are {', '.join(FAMILIES)}")
    return read_dict(FAMILIES[name].config, values)


def complete(config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, int]:
    """Fills in the axes whose count is tied to a stated one; AntgmmError where two statements conflict.

    Args:
        config: the model.
        wanted: axis name -> size, as stated.

    Returns:
        `wanted` and what follows from it.
    """
    return complete_ties(family(config).ties(config), config, wanted)


def violations(config: LMMConfig) -> tuple[str, ...]:
    """What keeps a shape from being served by stock transformers, each as a sentence; empty where nothing does."""
    return family(config).violations(config)


def inputs(config: LMMConfig, processor: "ProcessorMixin") -> Inputs:
    """How a model's records are read.

    Args:
        config: the model.
        processor: of its checkpoint.

    Returns:
        The family's inputs.

    Raises:
        AntgmmError: the processor makes other pictures or tokens than the model reads.
    """
    return _host(config.family).Inputs(config, processor)


def new_processor(config: LMMConfig, tokenizer: "Tokenizer") -> "ProcessorMixin":
    """The processor of a model that is trained from scratch.

    Args:
        config: the model.
        tokenizer: a trained one that has the tokens of `antgmm_jax.families.words`.

    Returns:
        A processor; `save_pretrained` writes what `AutoProcessor` reads back offline.
    """
    return _host(config.family).new_processor(config, tokenizer)


def torch_images(model_type: str, images: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's pictures as the PyTorch model of a `model_type` takes them.

    Args:
        model_type: of config.json.
        images: the batch's tree, leaves [B, M, ...].

    Returns:
        NumPy arrays by the names of the model's arguments; none where no slot is in use.
    """
    return _host(family_of(model_type).name).Inputs.torch(images)


def _host(name: str) -> Any:
    # Imported when it is needed: processors take seconds to import.
    return import_module(f"antgmm_jax.families.{name}.inputs")
