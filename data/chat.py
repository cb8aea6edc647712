"""Token ids of conversations by the chat template of a processor: prompt, answer, and answers of earlier turns."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.families.base import Inputs
from antgmm_jax.families.common.words import Messages
from data.record import Arrays, Turn

_QUESTION, _ANSWER = "question", "answer"
"""Words of the conversation that shows how a template writes an answer."""
_SPACE = "\u0120"
"""Form of a space in tokens of bytes, as GPT-2 and OPT have them; without a space, the same word is another token."""

_LIST = "{'type':"
"""What a template that expects a text writes of a list of parts."""


class _Style(NamedTuple):
    """How a chat template writes an answer.

    Attributes:
        before: text between the generation prompt and the answer, such as a space.
        after: text from the answer's end to the end token; "" if the template writes no end token.
        end: token that ends an answer.
        fault: why answers of earlier turns cannot be trained on; "" if they can.
        prompted, written: white space with which a prompt ends, and what stands there before an earlier answer.
    """

    before: str
    after: str
    end: int
    fault: str
    prompted: str = ""
    written: str = ""


class _Tokens(NamedTuple):
    """Tokens of a text: ids, and the characters that they cover, from `first` to before `last`; int64 [T] each."""

    ids: Int[np.ndarray, " T"]
    first: Int[np.ndarray, " T"]
    last: Int[np.ndarray, " T"]

    def between(self, start: int, end: int) -> range | None:
        """Places of the tokens between two characters; None if a token crosses one of them."""
        a, b = int((self.last <= start).sum()), int((self.first < end).sum())
        crossed = (a < len(self.ids) and self.first[a] < start) or (b > 0 and self.last[b - 1] > end)
        return None if crossed else range(a, b)


class ChatEncoder:
    """Encodes conversations.

    Args:
        inputs: the family's `Inputs`.
        config: model config.

    Attributes:
        end: token that ends an answer: what the chat template writes, else the end token of the tokenizer.
        opening: words that the chat template writes before an answer, such as the end of an empty thought.

    Raises:
        AntgmmError: the chat template refuses a question with its answer, leaves the answer out, or writes lists.
    """

    def __init__(self, inputs: Inputs, config: LMMConfig):
        self._config = config
        self._inputs, self._tokenizer = inputs, inputs.processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._added = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        special = (key for key, token in self._tokenizer.added_tokens_decoder.items() if token.special)
        self._special = {*self._tokenizer.all_special_ids, *special}
        self._style = self._seen() if inputs.processor.chat_template else self._plain()
        self.end, self.opening = self._style.end, self._style.before.strip()

    def __call__(self, turns: Sequence[Turn], answer: str, images: Sequence[np.ndarray]) -> Arrays:
        """Encodes a conversation.

        Args:
            turns: turns before the last answer.
            answer: the last answer.
            images: images in the order of their places in the turns.

        Returns:
            `prompt` int32 [T] including image tokens, `answer` int32 [A] with end token, `images` {leaf: [M, ...]}; and
            `earlier` int32 [E], places in the prompt of the tokens of earlier answers, if there are any.

        Raises:
            AntgmmError: the template refuses the conversation or does not write it as its parts.
        """
        text = self._inputs.chat(messages(turns))
        prompt, tree = self._inputs(text, images)
        wanted = family(self._config).image_tokens(self._config, tree)
        if (written := int((prompt == self._config.image_token).sum())) != wanted:
            raise AntgmmError(f"the chat template writes {written} image tokens, {wanted} are needed")
        row = {"prompt": prompt, "answer": self._answer(text, answer), "images": tree}
        if any(turn.role == "assistant" for turn in turns):
            row["earlier"] = self._earlier(turns, text, prompt)
        return row

    def check(self, turns: Sequence[Turn]) -> None:
        """Raises AntgmmError if the model cannot be trained on a conversation with earlier answers."""
        if self._style.fault and any(turn.role == "assistant" for turn in turns):
            raise AntgmmError(self._style.fault)

    def _plain(self) -> _Style:
        """The style without a chat template. Where words begin with a space in their tokens, so does an answer."""
        bare, spaced = (self._tokenizer.tokenize(text)[0] for text in ("a", " a"))
        begins = spaced.startswith(_SPACE) and not bare.startswith(_SPACE)
        before = " " if begins and not self._inputs.encoder_decoder else ""
        fault = "conversations of several turns need a chat template, and this model has none: write a row per question"
        return _Style(before, "", self._tokenizer.eos_token_id, fault)

    def _seen(self) -> _Style:
        """Renders a question with its answer to see how the template writes answers."""
        question, answer = (messages([turn]) for turn in (Turn("user", (_QUESTION,)), Turn("assistant", (_ANSWER,))))
        text, whole = self._inputs.chat(question), self._inputs.chat([*question, *answer])
        if _LIST in whole:
            raise AntgmmError(
                f"the chat template reads texts where a conversation has lists of parts: it writes {whole!r}; correct"
                " chat_template.jinja"
            )
        place = whole.rfind(_ANSWER)
        if place < 0:
            raise AntgmmError(f"the chat template leaves out answers: it writes {whole!r}; correct chat_template.jinja")
        tail = whole[place + len(_ANSWER) :]
        tokens = self._tokens(tail)
        ends = [at for at, key in enumerate(tokens.ids.tolist()) if key in self._special]
        after, end = "", self._tokenizer.eos_token_id
        if ends:
            after, end = tail[: tokens.last[ends[0]]], int(tokens.ids[ends[0]])
        if whole.startswith(text):
            return _Style(whole[len(text) : place], after, end, "")
        common = next((at for at, pair in enumerate(zip(text, whole, strict=False)) if pair[0] != pair[1]), len(whole))
        prompted, written = text[common:], whole[common:place]
        if not prompted.strip() and not written.strip():
            return _Style("", after, end, "", prompted, written)
        fault = (
            f"the chat template ends a prompt with {prompted!r} but writes {written!r} before an"
            " answer: correct chat_template.jinja to train on conversations of several turns"
        )
        return _Style("", after, end, fault)

    def _tokens(self, text: str) -> _Tokens:
        out = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first, last = np.array(out["offset_mapping"], np.int64).reshape(-1, 2).T
        return _Tokens(np.array(out["input_ids"], np.int64), first, last)

    def _answer(self, text: str, answer: str) -> Int[np.ndarray, " A"]:
        """Ids of an answer behind a prompt, with end token."""
        style, ids = self._style, None
        if not style.fault:
            written = f"{style.before}{answer}{style.after}"
            tokens = self._tokens(text + written)
            span = tokens.between(len(text), len(text) + len(written))
            ids = None if span is None else tokens.ids[span.start : span.stop]
        if ids is None:  # the first token would begin in the prompt, but a served prompt ends before the answer
            before = style.before if style.fault and not text[-1:].isspace() else ""
            ids = self._tokens(before + answer + style.after).ids
        return np.array(ids if style.after else [*ids, self.end], np.int32)

    def _earlier(self, turns: Sequence[Turn], text: str, prompt: Int[np.ndarray, " T"]) -> Int[np.ndarray, " E"]:
        """Places in the prompt of the tokens of earlier answers."""
        style, tokens, spans = self._style, self._tokens(text), []
        answered = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
        for place in answered:
            before = self._inputs.chat(messages(turns[:place])).removesuffix(style.prompted) + style.written
            written = f"{style.before}{turns[place].text}{style.after}"
            if not text.startswith(before + written):
                raise AntgmmError(
                    f"the chat template does not write the answer {turns[place].text[:40]!r} where the prompt before it"
                    " ends: correct chat_template.jinja, or write a row per question"
                )
            start, end = len(before), len(before) + len(written)
            spans.append(tokens.between(start, end) or self._inside(tokens, start, end))
        return self._moved(tokens, spans, [_images(turns[place:]) for place in answered], prompt)

    def _inside(self, tokens: _Tokens, start: int, end: int) -> range:
        """Places of the tokens that lie wholly between two characters."""
        return range(int((tokens.first < start).sum()), int((tokens.last <= end).sum()))

    def _moved(
        self, tokens: _Tokens, spans: Sequence[range], images: Sequence[int], prompt: Int[np.ndarray, " T"]
    ) -> Int[np.ndarray, " E"]:
        """Finds spans of the plain text in the prompt, in which an image takes more tokens than its place in the text.

        Behind the last image, tokens have equal distances to the end. Before an image, the nearest equal tokens count.

        Args:
            tokens: tokens of the plain text.
            spans: places of answers in it.
            images: number of images behind each answer.
            prompt: ids of the prompt.

        Returns:
            Places in the prompt.
        """
        shift, behind, places = len(prompt) - len(tokens.ids), 0, []
        for span, count in zip(reversed(spans), reversed(images), strict=True):
            begin = span.start
            while begin > 0 and tokens.ids[begin - 1] not in self._added:
                begin -= 1
            wanted = tokens.ids[begin : span.stop]
            shifts = range(shift, -1 - begin, -1) if count > behind else (shift,)
            ends = (at for at in shifts if np.array_equal(prompt[begin + at : span.stop + at], wanted))
            if (at := next(ends, None)) is None:
                raise AntgmmError("the processor changes the text of the conversation beside its images")
            shift, behind = at, count
            places.append(np.arange(span.start, span.stop) + shift)
        return np.concatenate(places[::-1]).astype(np.int32)


def messages(turns: Sequence[Turn]) -> Messages:
    """Returns turns in the form that chat templates read."""

    def content(part: str | None) -> Mapping[str, Any]:
        return {"type": "image"} if part is None else {"type": "text", "text": part}

    return [{"role": turn.role, "content": [content(part) for part in turn.parts]} for turn in turns]


def _images(turns: Sequence[Turn]) -> int:
    return sum(part is None for turn in turns for part in turn.parts)
