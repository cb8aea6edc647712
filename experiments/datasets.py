"""From a recipe's data table to records, and from records to the arrays that a model reads."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int
from transformers import AutoProcessor, ProcessorMixin

from antgmm_jax.config import LMMConfig, QFormerConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import Params, functional
from antgmm_jax.processes import gather
from antgmm_jax.sharding import rows
from data.batches import Batches, answer_lengths, batches, lengths, once
from data.maad import source
from data.maad.source import MaadSource
from data.maad.source import fingerprint as maad_fingerprint
from data.packing import packed_batches
from data.processor import device_batch, encode, encode_prompts, pixel_table, pixel_values, prepare
from data.readers import FileSource, read_records
from data.record import Record
from data.shifting import drawn, shifted
from experiments.console import bar, say
from experiments.schema import Data, Recipe, Training

Found = TypeVar("Found")
Both = tuple[Found, Found]
"""What is trained on, and what is scored on."""
VIEWS = 4
"""Moved views of each picture whose features are computed where that happens once."""


def load_records(data: Data) -> Sequence[Record]:
    """The records that a data table names.

    Args:
        data: the table of a recipe.

    Returns:
        A sequence of `data.samples` records.

    Raises:
        AntgmmError: no such data, fewer records than asked for, or bad rows (all named).
    """
    if data.kind == "maad":
        return source(data.tier, data.split, data.samples, seed=data.seed)
    records = read_records(data.kind, Path(data.path), split=getattr(data, "split", ""))
    if len(records) < data.samples:
        raise AntgmmError(
            f"{data.path} holds {len(records)} records, the recipe asks for {data.samples}: lower samples"
        )
    return records[: data.samples]


def load_both(recipe: Recipe | Training) -> Both[Sequence[Record]]:
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
    recipe: Recipe | Training, records: Both[Sequence[Record]], processor: ProcessorMixin, config: LMMConfig
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
    say(f"reading {recipe.data.samples} samples")

    def make(found: Sequence[Record], trained: bool) -> Samples:
        return encoded(recipe, found, processor, config, trained=trained)

    return _both(make, (records[0], True), (records[1], False))


def encoded(
    recipe: Recipe | Training,
    records: Sequence[Record],
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
    return Samples(records, processor, config, **limits, **rows)


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


def data_fingerprint(records: Sequence[Record], arrays: dict[str, np.ndarray], table: np.ndarray) -> str:
    """A digest of what a model is trained on, data and processor: equal where the same arrays are read.

    Args:
        records: the records; MAAD-synth's latents are part of the digest.
        arrays: from `encode`: the tokenizer's ids, and pictures as the processor resizes them.
        table: from `pixel_table`, how it normalises them.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(maad_fingerprint(records).encode() if isinstance(records, MaadSource) else b"")
    for name, array in sorted({**arrays, "pixel_table": table}.items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def load_processor(directory: str | Path) -> ProcessorMixin:
    """The processor of a checkpoint directory.

    Raises:
        AntgmmError: the directory has none that loads offline.
    """
    try:
        return AutoProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise AntgmmError(
            f"{directory} has no processor that AutoProcessor reads offline: save the model's processor there"
        ) from error


class Samples:
    """Encoded records: pictures once as uint8, normalised when a batch is made.

    Args:
        records: the records.
        processor: the model's.
        config: the model.
        max_length: most tokens of a prompt beside the picture's.
        max_answer: most tokens of an answer.
        buckets: widths that training batches are cut to, beside the full one; empty: the full one alone.
        prompt_buckets: the same for the prompts of a model with an encoder, whose `buckets` are of answers.
        pack: tokens of a row that several samples share in training batches; 0: each has its own.

    Attributes:
        records: the records, with their pictures as the model sees them.
        arrays: what `data.processor.encode` gave.
        table: what the processor makes of each pixel value.
        pack: as given.

    Raises:
        AntgmmError: rows that are too long, all named; a model that does not pack, or has no prompts apart.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: ProcessorMixin,
        config: LMMConfig,
        *,
        max_length: int = 4096,
        max_answer: int = 1024,
        buckets: Sequence[int] = (),
        prompt_buckets: Sequence[int] = (),
        pack: int = 0,
    ):
        if pack and config.language.encoder is not None:
            raise AntgmmError(
                f"pack = {pack}: only models without an encoder read packed rows, T5 has one: use buckets"
            )
        if prompt_buckets and config.language.encoder is None:
            raise AntgmmError("prompt_buckets: a model without an encoder reads prompt and answer in one: use buckets")
        self.records = prepare(processor, records)
        self._processor, self._max_length = processor, max_length
        start = config.language.start_token
        try:
            self.arrays = encode(
                processor, self.records, max_length=max_length, max_answer=max_answer, start_token=start
            )
        except AntgmmError as error:
            raise AntgmmError(f"{records.path}: {error}" if isinstance(records, FileSource) else str(error)) from None
        read = "decoder_input_ids" if "decoder_input_ids" in self.arrays else "input_ids"
        self._widths = _with_widest(buckets, self.arrays[read])
        self._prompt_widths = _with_widest(prompt_buckets, self.arrays["input_ids"])
        self.pack = pack
        self.table = pixel_table(processor)
        self.fingerprint = data_fingerprint(records, self.arrays, self.table)

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def _prompts(self) -> dict[str, np.ndarray]:
        prompts = encode_prompts(self._processor, self.records, max_length=self._max_length)
        return {f"prompt/{name}": prompts[name] for name in ("input_ids", "attention_mask")}

    def rows_of(self, types: Sequence[str]) -> np.ndarray:
        """The rows whose questions are of some types.

        Args:
            types: names of types; empty: all.

        Returns:
            Row numbers, ascending.

        Raises:
            AntgmmError: a type that no row is of.
        """
        known = sorted({record.type for record in self.records})
        if absent := sorted(set(types) - set(known)):
            raise AntgmmError(f"no question is of type {', '.join(absent)}: the data has {', '.join(known)}")
        return np.flatnonzero([not types or record.type in types for record in self.records])

    def repeated(self, times: Mapping[str, int]) -> np.ndarray:
        """Every row, those of some question types several times.

        Args:
            times: type -> how often; the others once.

        Returns:
            Row numbers, ascending.
        """
        return np.repeat(np.arange(len(self)), [times.get(record.type, 1) for record in self.records])

    def check_types(self, wanted: Mapping[str, Sequence[str]]) -> None:
        """Refuses types that no row is of.

        Args:
            wanted: who asks -> names of types.

        Raises:
            AntgmmError: the first such type, and who asks for it.
        """
        for who, types in wanted.items():
            try:
                self.rows_of(types)
            except AntgmmError as error:
                raise AntgmmError(f"{who}: {error}") from None

    def shuffled(
        self,
        size: int,
        seed: int,
        *,
        full: bool = False,
        features: Float[np.ndarray, "N V Q D"] | None = None,
        pictures: bool = False,
        rows: np.ndarray | None = None,
        shift: int = 0,
    ) -> Batches:
        """Endless shuffled training batches, cut to the length buckets or packed; the iterator's position resumes it.

        Args:
            size: rows a batch.
            seed: of the order.
            full: leave all padding and rows of one sample, and an order that does not depend on the buckets.
            features: image features of all rows, from `image_features`, that stand in for the pictures; one of a row's
                views whenever it is seen.
            pictures: keep the pictures beside them, for a teacher that reads them.
            rows: which rows an epoch visits, and each as often as it stands there; None: all once.
            shift: pixels by which pictures are moved at random, at most, each way.

        Returns:
            The iterator; of packed rows, `index` is [size, M] with -1 for none.

        Raises:
            AntgmmError: fewer rows than a batch needs.
        """
        about = {"size": size, "seed": seed, "rows": rows, "shift": shift, "finish": partial(device_batch, self.table)}
        arrays = self.arrays
        if features is not None:
            arrays = {**arrays, "views": features}
            if not pictures:
                del arrays["images"]
        if full:
            return batches(arrays, **about)
        if self.pack:
            return packed_batches(arrays, width=self.pack, **about)
        return batches(arrays, widths=self._widths, prompts=self._prompt_widths, **about)

    def in_order(self, size: int, *, prompts: bool = False, by_length: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """Every row once; the last batch repeats its last row, so that one shape is compiled.

        Args:
            size: rows a batch; under a mesh the next number that its devices divide.
            prompts: add the prompts alone, for generation, under `prompt/`.
            by_length: rows with short answers first, instead of the order of the records.

        Yields:
            Training batches with `index`, the rows' numbers; under a mesh the rows of this process's devices.
        """
        arrays = {**self.arrays, **self._prompts} if prompts else self.arrays
        order = np.argsort(answer_lengths(self.arrays), kind="stable") if by_length else None
        yield from map(partial(device_batch, self.table), once(arrays, size=size, order=order))

    def pixels(self, size: int, moves: Int[np.ndarray, "N 2"]) -> Iterator[Float[np.ndarray, "B 3 H W"]]:
        """Every row's picture once, moved by so many pixels; batches as of `in_order`.

        Args:
            size: rows a batch.
            moves: rows and columns of each picture, as `data.shifting.shifted` takes them.

        Yields:
            Normalised pictures.
        """
        for batch in once({"images": self.arrays["images"]}, size=size):
            yield pixel_values(self.table, shifted(batch["images"], moves[batch["index"]]))

    def by_bucket(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Every row once, the shorter first, cut to `buckets`: for a teacher that reads each row once.

        Args:
            size: rows a batch; under a mesh the next number that its devices divide.

        Yields:
            Training batches as of `in_order`.
        """
        order = np.argsort(lengths(self.arrays), kind="stable")
        yield from map(
            partial(device_batch, self.table), once(self.arrays, size=size, order=order, widths=self._widths)
        )


def _with_widest(buckets: Sequence[int], array: np.ndarray) -> tuple[int, ...]:
    """Bucket widths with the full one for all beyond it; none without buckets."""
    widest = array.shape[1]
    return (*(width for width in buckets if width < widest), widest) if buckets else ()


def freezes_features(config: LMMConfig, frozen: Sequence[str]) -> bool:
    """Whether a phase or stage leaves all that image features depend on as it is, so that they can be computed once.

    Args:
        config: the model.
        frozen: path prefixes of what it does not train.

    Returns:
        Whether they are constant.
    """
    return all(any(f"{part}/".startswith(f"{prefix}/") for prefix in frozen) for part in _feature_parts(config))


def _feature_parts(config: LMMConfig) -> tuple[str, ...]:
    """Paths of the parameters that image features depend on."""
    parts = ("vision", "bridge/queries", "bridge/norm", "bridge/stack")
    return parts if isinstance(config.bridge, QFormerConfig) else parts[:1]


class ImageFeatures:
    """`image_features` of some samples, kept for as long as the image side stays what it is.

    Args:
        samples: encoded records.
        seed: of the moves.
    """

    def __init__(self, samples: "Samples", seed: int):
        self._samples, self._seed = samples, seed
        self._made: tuple[Any, ...] = ()

    def __call__(self, config: LMMConfig, params: Params, shift: int = 0) -> Float[np.ndarray, "N V Q D"]:
        """The features of a model, computed where those kept are another's.

        Args:
            config: the model.
            params: its parameters.
            shift: as in `image_features`.
        """
        of = (shift, [gather(reduce(getitem, path.split("/"), params)) for path in _feature_parts(config)])
        if not (self._made and jax.tree.all(jax.tree.map(np.array_equal, self._made[0], of))):
            self._made = ()  # freed before as much again is made
            self._made = of, image_features(config, params, self._samples, shift=shift, seed=self._seed)
        return self._made[1]


def image_features(
    config: LMMConfig, params: Params, samples: Samples, *, shift: int = 0, seed: int = 0, batch_size: int = 64
) -> Float[np.ndarray, "N V Q D"]:
    """What the image side hands to its last linear map, once for every row: for what does not train it.

    Args:
        config: the model.
        params: its parameters.
        samples: encoded records.
        shift: pixels by which pictures are moved at random, at most, each way; above 0 each has `VIEWS` views.
        seed: of the moves.
        batch_size: rows at a time.

    Returns:
        Features in float32.
    """
    run, rng = jax.jit(functional(config).features), np.random.default_rng(seed)
    views = VIEWS if shift else 1
    found: list[list[np.ndarray]] = [[] for _ in range(views)]
    with bar("image features", views * len(samples)) as update:
        for number, view in enumerate(found):
            moves = drawn(rng, shift, (len(samples),))
            for pixels in samples.pixels(min(batch_size, len(samples)), moves):
                view.append(gather(run(params, rows({"pixels": pixels})["pixels"])))
                update(number * len(samples) + min(sum(map(len, view)), len(samples)), "")
    return np.stack([np.concatenate(view)[: len(samples)] for view in found], axis=1)
