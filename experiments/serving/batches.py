"""Questions of several clients in batches of equal widths, answered in PyTorch."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.families.base import Inputs
from antgmm_jax.families.common.words import Messages, user_turn
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from data.encoding import Encoder, decode, special_tokens
from experiments.run.export.completion import positions
from experiments.run.export.ends import answer_tokens
from experiments.run.export.in_torch import greedy_answers, stop_at, torch_model, without_gpu
from experiments.run.host.console import say

STEP = 16
"""Prompts are padded to multiples of this many tokens, so that those of similar length share a batch."""
CHARACTERS = 64
"""Texts with more characters for each token that may be read are refused before they are tokenized."""
FEW = 4
"""Images of a conversation that are read without counting their tokens first."""


class Question(NamedTuple):
    """A question as the model reads it.

    Attributes:
        ids: token ids int32 [T].
        images: tree of images, leaves [M, ...].
        most: maximum length of the answer.
    """

    ids: np.ndarray
    images: Mapping[str, np.ndarray]
    most: int

    def group(self) -> tuple[Any, ...]:
        """What questions of a batch have in common: width, and shapes of the images."""
        shapes = tuple((name, leaf.shape) for name, leaf in sorted(self.images.items()))
        return -(-len(self.ids) // STEP) * STEP, shapes


class ModelError(AntgmmError):
    """The model failed on a request that it could read."""


class Answer(NamedTuple):
    """An answer.

    Attributes:
        text: the text.
        ended: whether the model ended it, within its maximum length.
        read: tokens of the prompt.
        written: tokens of the answer, with its end.
    """

    text: str
    ended: bool
    read: int
    written: int


class Model(NamedTuple):
    """What answers questions.

    Attributes:
        reads: turns conversations into token ids and images.
        ends: tokens that end an answer.
        pad: token that fills rows.
        answer: batch with `images`, `input_ids` and `attention_mask` -> token ids of answers, int [B, N].
        most: most rows of a batch.
        longest: most tokens of a prompt.
        tokens: maximum length of answers.
        pictured: whether the model needs an image.
        special: what a text must not contain.
        taken: tree of a row's images -> tokens of the prompt that they take.
        opening: words that the model writes before each answer, which are left out.
    """

    reads: Inputs
    ends: tuple[int, ...]
    pad: int
    answer: Callable[[Mapping[str, Any]], np.ndarray]
    most: int
    longest: int
    tokens: int
    pictured: bool
    special: re.Pattern[str]
    taken: Callable[[Mapping[str, np.ndarray]], int]
    opening: str

    @property
    def processor(self) -> ProcessorMixin:
        """Processor of the model."""
        return self.reads.processor

    def question(self, messages: Messages, images: Sequence[np.ndarray], most: int | None = None) -> Question:
        """Reads a conversation.

        Args:
            messages: its turns.
            images: uint8 [H, W, 3] each.
            most: maximum length of the answer; `tokens` if None.

        Raises:
            AntgmmError: the chat template refuses it, a text contains a special token, it is too long, or the model
                needs an image.
        """
        if self.pictured and not images:
            raise AntgmmError("the conversation has no image, and the model answers about images only")
        texts = [part["text"] for turn in messages for part in turn["content"] if part["type"] == "text"]
        if (size := sum(map(len, texts))) > CHARACTERS * self.longest:
            raise AntgmmError(f"the conversation has {size} characters, at most {self.longest} tokens are read")
        for text in texts:
            if special := self.special.search(text):
                raise AntgmmError(f"a text contains {special[0]}: remove it, images are parts of their own")
        if not self.processor.chat_template and [turn["role"] for turn in messages] == ["user"]:
            # Such models read images first, wherever they are.
            messages = user_turn("\n".join(texts), len(images))
        self._check_images(images)
        question = Question(*self.reads(self.reads.chat(messages), images), most or self.tokens)
        if len(question.ids) > self.longest:
            raise AntgmmError(f"the conversation has {len(question.ids)} tokens, at most {self.longest} are read")
        return question

    def answers(self, questions: Sequence[Question]) -> list[Answer | AntgmmError]:
        """Answers questions in batches of those with equal width and images.

        Args:
            questions: questions of any number and length.

        Returns:
            One answer per question, or a `ModelError` for those of a batch on which the model failed.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, question in enumerate(questions):
            groups.setdefault(question.group(), []).append(place)
        results: dict[int, Answer | AntgmmError] = {}
        for (width, _), places in groups.items():
            for begin in range(0, len(places), self.most):
                chosen = places[begin : begin + self.most]
                results |= zip(chosen, self._answered([questions[place] for place in chosen], width), strict=True)
        return [results[place] for place in range(len(questions))]

    def _answered(self, questions: Sequence[Question], width: int) -> Sequence[Answer | AntgmmError]:
        """Answers to a batch; an error of the model is theirs alone, so that other batches go on.

        A batch that fails is answered in halves, down to single questions: it may have been too large for the memory.
        """
        tokens, reason = np.zeros((0, 0)), ""
        try:
            tokens = self.answer(self._batch(questions, width))
        except Exception as error:  # of any model; it holds the memory of the failed batch until it is left
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        if reason and (half := len(questions) // 2):
            return [*self._answered(questions[:half], width), *self._answered(questions[half:], width)]
        if reason:
            say(f"the model failed on a request of width {width}: {reason}")
            return [ModelError(f"the model cannot answer the request: {reason}")]
        for row, question in zip(tokens, questions, strict=True):
            row[question.most :] = self.pad
        answers, texts = [], decode(self.processor, tokens, self.opening)
        for text, row, one in zip(texts, tokens, questions, strict=True):
            ends = np.flatnonzero(np.isin(row[: one.most], self.ends))
            answers.append(Answer(text, bool(len(ends)), len(one.ids), int(ends[0]) + 1 if len(ends) else one.most))
        return answers

    def _check_images(self, images: Sequence[np.ndarray]) -> None:
        """Checks that many images fit into a prompt, one by one: small ones may be enlarged and cut into many tiles.

        Raises:
            AntgmmError: they do not.
        """
        if len(images) <= FEW:
            return
        pair, tokens = self.reads.chat(user_turn("", 2)), 0
        for image in images:
            tokens += self.taken(self.reads(pair, [image, image])[1]) // 2  # some families cut a single image finer
            if tokens > self.longest:
                raise AntgmmError(f"the images take over {self.longest} tokens, more than are read: send fewer")

    def _batch(self, questions: Sequence[Question], width: int) -> dict[str, Any]:
        """Rows padded to a width, on the side where the model was trained with padding."""
        images = {name: np.stack([one.images[name] for one in questions]) for name in questions[0].images}
        images["valid"] = np.ones(images["pixels"].shape[:2], bool)
        ids = np.full((len(questions), width), self.pad, np.int32)
        mask = np.zeros_like(ids)
        for row, question in enumerate(questions):
            length = len(question.ids)
            at = slice(0, length) if self.reads.encoder_decoder else slice(width - length, width)
            ids[row, at], mask[row, at] = question.ids, 1
        return {"images": images, "input_ids": ids, "attention_mask": mask}


def load(directory: Path, *, max_new_tokens: int, most: int) -> Model:
    """Loads an export in stock `transformers`.

    Args:
        directory: Hugging Face directory.
        max_new_tokens: maximum length of answers.
        most: most rows of a batch.

    Returns:
        The model; a message says so if it is on the CPU although there is a GPU.

    Raises:
        AntgmmError: the files cannot be loaded.
    """
    config, _ = open_hf(directory)
    processor, model = load_processor(directory), torch_model(directory)
    if line := without_gpu(model):
        say(line)
    encoder = Encoder(processor, config)
    ends, pad = answer_tokens(directory, encoder)
    stop_at(model, eos=[*ends], pad=pad)
    taken = signature(model.generate).parameters
    return Model(
        encoder.inputs,
        ends,
        pad,
        lambda batch: greedy_answers(model, batch, max_new_tokens, pad),
        most,
        longest_prompt(directory, max_new_tokens),
        max_new_tokens,
        "pixel_values" in taken and taken["pixel_values"].default is Parameter.empty,
        special_tokens(processor.tokenizer, config.image_token),
        partial(family(config).image_tokens, config),
        encoder.opening,
    )


def longest_prompt(directory: Path, max_new_tokens: int) -> int:
    """Returns the number of tokens that a prompt may have.

    Args:
        directory: Hugging Face directory.
        max_new_tokens: maximum length of answers.

    Raises:
        AntgmmError: answers of this length leave no position for a prompt.
    """
    if (longest := positions(directory) - max_new_tokens) < 1:
        raise AntgmmError(
            f"--max-new-tokens {max_new_tokens}: {directory} has {positions(directory)} positions for prompt and"
            " answer: choose fewer"
        )
    return longest
