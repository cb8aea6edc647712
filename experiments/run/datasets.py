"""From a recipe's data tables to encoded records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from data.maad import source
from data.readers import read_records
from data.source import Source
from experiments.run.prompts import prompt_of
from experiments.run.samples import Samples
from experiments.run.schema import Data, Recipe, Training

Found = TypeVar("Found")
Both = tuple[Found, Found]
"""What is trained on, and what is scored on."""


def load_records(data: Data) -> Source:
    """The records that a data table names; what is wrong with them is found when they are encoded.

    Args:
        data: the table of a recipe.

    Returns:
        `data.samples` records.

    Raises:
        AntgmmError: no such data.
    """
    if data.kind == "maad":
        return source(data.tier, data.split, data.samples)
    return read_records(data.kind, Path(data.path), split=getattr(data, "split", ""), most=data.samples)


def load_both(recipe: Recipe | Training) -> Both[Source]:
    """The records that a recipe trains on, and those that it is scored on.

    Args:
        recipe: the recipe.

    Returns:
        Both.

    Raises:
        AntgmmError: what `load_records` refuses in either.
    """
    return _both(load_records, (recipe.data,), (recipe.evaluate.data,))


def encode_both(
    recipe: Recipe | Training, records: Both[Source], processor: ProcessorMixin, config: LMMConfig
) -> "Both[Samples]":
    """Encodes what `load_both` gave, to the recipe's lengths; only training batches are cut to its buckets or packed.

    Args:
        recipe: the recipe.
        records: from `load_both`.
        processor: the model's.
        config: the model.

    Returns:
        Both.

    Raises:
        AntgmmError: what `Samples` refuses in either.
    """

    def make(found: Source, trained: bool) -> Samples:
        return encoded(recipe, found, processor, config, trained=trained)

    return _both(make, (records[0], True), (records[1], False))


def encoded(
    recipe: Recipe | Training,
    records: Source,
    processor: ProcessorMixin,
    config: LMMConfig,
    *,
    trained: bool = False,
) -> "Samples":
    """Encodes records to a recipe's lengths.

    Args:
        recipe: the recipe.
        records: the records.
        processor: the model's.
        config: the model.
        trained: whether they are trained on: their batches are cut to the recipe's buckets or packed.

    Returns:
        The samples.

    Raises:
        AntgmmError: what `Samples` refuses.
    """
    rows = {"buckets": recipe.buckets, "prompt_buckets": recipe.prompt_buckets, "pack": recipe.pack} if trained else {}
    limits = {"max_length": recipe.max_length, "max_answer": recipe.max_answer}
    return Samples(records, processor, config, prompt=prompt_of(recipe), **limits, **rows)


def _both(make: Callable[..., Found], *arguments: tuple[Any, ...]) -> Both[Found]:
    """The function's results; what it refuses of either is told together."""
    made, faults = [], []
    for each in arguments:
        try:
            made.append(make(*each))
        except AntgmmError as error:
            faults.append(str(error))
    if faults:
        raise AntgmmError("\n".join(faults))
    return made[0], made[1]
