"""Encoded records, and the batches that a model reads of them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import AutoProcessor, ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.sharding import own_rows, whole_rows
from data import collate
from data.batches import Batches, batches, visits_once
from data.encoding import Encoder
from data.making import Seen, Views, batch, moved
from data.packing import packed_batches
from data.record import PROMPT, Arrays, Record
from data.source import Held, Source
from data.store import THREADS, open_encoded
from experiments.run.host.console import bar


def load_processor(directory: str | Path) -> ProcessorMixin:
    """The processor of a checkpoint directory.

    Raises:
        AntgmmError: the directory has none that loads offline.
    """
    try:
        return AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise AntgmmError(
            f"{directory} has no processor that AutoProcessor reads offline: save the model's processor there"
        ) from error


class Samples:
    """Encoded records, read a batch at a time: in memory are a few numbers of each.

    Args:
        records: the records.
        processor: the model's.
        config: the model.
        max_length: most tokens of a prompt beside the pictures'.
        max_answer: most tokens of an answer.
        buckets: widths that training batches are cut to, beside the full one; empty: the full one alone.
        prompt_buckets: the same for the prompts of a model with an encoder, whose `buckets` are of answers.
        pack: tokens of a row that several samples share in training batches; 0: each has its own.
        prompt: template of what the model is asked, as `data.record.prompt` takes it.

    Attributes:
        records: the records, by number.
        rows: the encoded records, by number.
        needs: columns and picture slots that each takes in a batch.
        pack: as given.
        fingerprint: digest of all token ids and pixels.

    Raises:
        AntgmmError: bad rows or rows that are too long, all named; a model that does not pack, or has no prompts apart;
            a processor that does not fit the model.
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
        prompt: str = PROMPT,
    ):
        if pack and config.encoder_decoder:
            raise AntgmmError(f"pack = {pack}: only models without an encoder read packed rows: use buckets")
        if prompt_buckets and not config.encoder_decoder:
            raise AntgmmError("prompt_buckets: a model without an encoder reads prompt and answer in one: use buckets")
        self.records = records if isinstance(records, Source) else Held(records)
        encoder = Encoder(processor, config, max_length=max_length, max_answer=max_answer, template=prompt)
        self.rows = open_encoded(self.records, encoder, shown=bar)
        self._layout = collate.layout(encoder, config.language.start_token)
        self.needs, apart = collate.needs(self.rows.index, self._layout.apart), self._layout.apart
        self._whole = collate.widths(self.needs, apart)
        self._cut = collate.widths(self.needs, apart, buckets=buckets, prompt_buckets=prompt_buckets)
        self._prompt_width = collate.bucket(int(self.rows.index.prompt.max()))
        self.pack, self.fingerprint = pack, self.rows.index.fingerprint
        # What is decoded from files takes longer than a step of a small model.
        self._threads = 1 if self.rows.kept else THREADS

    def __len__(self) -> int:
        return len(self.rows)

    def names(self, index: np.ndarray) -> list[Any]:
        """Ids of the records of some numbers, nested as the numbers are; "" for -1, which is none."""
        if index.ndim > 1:
            return [self.names(part) for part in index]
        return [self.records.words(int(row)).id if row >= 0 else "" for row in index]

    def pad_prompts_like(self, other: "Samples") -> None:
        """Pads the prompts of two sets of questions to one width, so that one program answers both.

        Args:
            other: the other set, whose prompts are padded too.
        """
        self._prompt_width = other._prompt_width = max(self._prompt_width, other._prompt_width)

    def rows_of(self, types: Sequence[str]) -> np.ndarray:
        """The rows whose questions are of some types.

        Args:
            types: names of types; empty: all.

        Returns:
            Row numbers, ascending.

        Raises:
            AntgmmError: a type that no row is of.
        """
        known = self.rows.index.names
        if absent := sorted(set(types) - set(known)):
            raise AntgmmError(f"no question is of type {', '.join(absent)}: the data has {', '.join(sorted(known))}")
        wanted = np.array([not types or name in types for name in known])
        return np.flatnonzero(wanted[self.rows.index.types])

    def repeated(self, times: Mapping[str, int]) -> np.ndarray:
        """Every row, those of some question types several times.

        Args:
            times: type -> how often; the others once.

        Returns:
            Row numbers, ascending.
        """
        often = np.array([times.get(name, 1) for name in self.rows.index.names])
        return np.repeat(np.arange(len(self)), often[self.rows.index.types])

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
        features: Views | None = None,
        pictures: bool = False,
        rows: np.ndarray | None = None,
        shift: int = 0,
    ) -> Batches:
        """Endless shuffled training batches, cut to the buckets or packed; the iterator's position resumes it.

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
        seen, own = Seen(shift, features, pictures), own_rows(size)
        about = {"size": size, "seed": seed, "visits": rows, "threads": self._threads}
        if self.pack and not full:
            answer = self._whole.answer[-1]
            return packed_batches(self.rows, self.needs, width=self.pack, answer=answer, own=own, seen=seen, **about)
        widths = self._whole if full else self._cut

        def make(index: np.ndarray, rng: np.random.Generator) -> Arrays:
            shape, choices = widths.holds(self.needs.of(index)), seen.choices(rng, index.shape)[own]
            return batch(self.rows, index[own], self._layout, shape, seen=seen, choices=choices)

        return batches(make, widths.groups(self.needs), **about)

    def facts(self, size: int, seed: int, names: Sequence[str]) -> Batches:
        """Endless shuffled batches of pictures with what they show, for pretraining an image encoder.

        Args:
            size: rows a batch.
            seed: of the order.
            names: facts.

        Returns:
            The iterator of `images`, `cells` and `fact/NAME` int32 [size].
        """
        own = own_rows(size)

        def make(index: np.ndarray, rng: np.random.Generator) -> Arrays:
            found = [self.rows[int(row)] for row in index[own]]
            shown = collate.pictures([[row["images"]] for row in found], self._whole.slots[-1])
            facts = {f"fact/{name}": np.array([row["latents"][name] for row in found]) for name in names}
            cells = np.stack([row["cells"] for row in found])
            return {"images": shown, "cells": cells, **facts, "index": index[own].astype(np.int32)}

        return batches(make, np.zeros(len(self), int), size=size, seed=seed, threads=self._threads)

    def in_order(self, size: int, *, prompts: bool = False, by_length: bool = False) -> Iterator[Arrays]:
        """Every row once; the last batch repeats its last row, so that one shape is compiled.

        Args:
            size: rows a batch; under a mesh the next number that its devices divide.
            prompts: add the prompts alone, for generation, under `prompt/`.
            by_length: rows with short answers first, instead of the order of the records.

        Yields:
            Training batches with `index`, the rows' numbers; under a mesh the rows of this process's devices.
        """
        order = np.argsort(self.needs.answer, kind="stable") if by_length else np.arange(len(self))
        yield from self._once(order, size, self._whole, self._prompt_width if prompts else 0)

    def by_bucket(self, size: int) -> Iterator[Arrays]:
        """Every row once, the shorter first, cut to `buckets`: for a teacher that reads each row once.

        Args:
            size: rows a batch; under a mesh the next number that its devices divide.

        Yields:
            Training batches as of `in_order`.
        """
        apart = self._layout.apart
        order = np.argsort(self.needs.answer if apart else self.needs.text, kind="stable")
        yield from self._once(order, size, self._cut._replace(text=self._whole.text) if apart else self._cut)

    def _once(self, order: np.ndarray, size: int, widths: collate.Widths, prompt: int = 0) -> Iterator[Arrays]:
        size = whole_rows(size)
        own = own_rows(size)
        for index in visits_once(order, size):
            shape = widths.holds(self.needs.of(index))
            yield batch(self.rows, index[own], self._layout, shape, prompt=prompt)

    def pictures(self, size: int, moves: Int[np.ndarray, "V N 2"]) -> Iterator[list[Arrays]]:
        """Every row's pictures once, in order; batches as of `in_order`.

        Args:
            size: rows a batch.
            moves: rows and columns that a row's pictures are moved by in each view.

        Yields:
            `images` [B, M, ...] of each view.
        """
        size = whole_rows(size)
        own, slots = own_rows(size), self._whole.slots[-1]
        for index in visits_once(np.arange(len(self)), size):
            found = [self.rows.images(int(row)) for row in index[own]]
            yield [
                collate.pictures(
                    [[moved(tree, move)] for tree, move in zip(found, view[index[own]], strict=True)], slots
                )
                for view in moves
            ]
