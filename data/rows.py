"""Parsing of rows of user files, with common alternative column names."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.chat_rows import PLACE, TURNS, as_file, by_turn, file_of, has_turns, own_images, own_system, parse_chat
from data.limits import BadRow, check_text, quoted
from data.record import Turn, prompt

# The first name is ours; the others are common in other data sets.
ALIASES = {
    "image": ("image", "images", "image_path", "file_name", "filename", "img", "jpg", "png"),
    "question": ("question", "prompt", "query", "instruction"),
    "answer": ("answer", "response", "output", "target", "label", "caption"),
    "text": ("text", "context", "description"),
    "type": ("type", "question_type"),
    "id": ("id", "question_id", "sample_id", "uid"),
    "slice": ("slice",),
    "latents": ("latents",),
}
_PICTURES = re.compile(r"(image|img|picture|photo|media)s?(_?(url|path|file|name|\d+)s?)?", re.IGNORECASE)
"""Other names of columns with pictures, which are not read."""
_VIDEO = ("video", "videos")
_ANSWERS = ("completion", "multiple_choice_answer", "answers")
"""Names of the answer where no other one is there; of several answers the most frequent one counts."""
TRL = ("prompt", "completion")
"""Fields with the turns before the answer, and with the answer."""
_BEFORE = ("system", "history", "input")
"""What else belongs to a question: a system prompt, earlier questions with their answers, and the text that an
instruction is about."""
_OF_TEXTS = {"system": str, "history": list}
_OPTIONS = (("options",), ("choices",), ("choice_a", "choice_b"), ("A", "B"))
"""Answers to choose from, in lists or in columns of their own."""
_OBJECTS, _BOXES = "objects", re.compile(r"<(bbox|ref-object)>")
"""Field with names and boxes of what a picture shows, and their places in turns, which some trainers fill."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A record with undecoded images: paths inside the data folder, or bytes of files."""

    images: tuple[str | bytes, ...]
    question: str
    answer: str
    turns: tuple[Turn, ...] = ()
    text: str = ""
    type: str = ""
    id: str = ""
    slice: str = ""
    latents: Mapping[str, int] = field(default_factory=dict)


def texts(row: Row, template: str) -> Iterator[str]:
    """Yields the texts of a row that a model reads or writes.

    Args:
        row: a row.
        template: prompt template, see `data.record.check_template`.

    Yields:
        The prompt of a single question or the texts of the turns, then the answer.
    """
    if row.turns:
        yield from (turn.text for turn in row.turns)
    else:
        yield prompt(row.question, row.text, template)
    yield row.answer


def columns(names: Iterator[str] | list[str]) -> list[str]:
    """Selects the columns of a file that rows use."""
    known = {name for group in ALIASES.values() for name in group} | {*TURNS, *_VIDEO, *_ANSWERS, *_BEFORE}
    known |= {_OBJECTS, *(name for group in _OPTIONS for name in group)}
    return [name for name in names if name in known or _PICTURES.fullmatch(name)]


def parse(raw: Any) -> Row:
    """Parses an object of a file.

    Args:
        raw: object with the names of `ALIASES`, or with a conversation (`data.chat_rows`).

    Returns:
        The row.

    Raises:
        BadRow: a field is missing, empty, ambiguous or of the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise BadRow(f"is a {type(raw).__name__}, not an object with named fields")
    if named := [name for name in _VIDEO if raw.get(name)]:
        raise BadRow(f"has a {named[0]}: video is not supported, use images")
    raw = _as_messages(raw)
    turns = [name for name in TURNS if has_turns(raw, name)]
    row = _chat(raw, turns) if turns else _single(raw)
    for name, text in _all_texts(row):
        check_text(name, text)
    return row


def _all_texts(row: Row) -> Iterator[tuple[str, str]]:
    """Names and values of every text of a row."""
    yield from ((name, getattr(row, name)) for name in ("question", "answer", "text", "type", "id", "slice"))
    yield from ((f"turn {number}", turn.text) for number, turn in enumerate(row.turns, 1))
    yield from (("the name of a latent", name) for name in row.latents)


def _as_messages(raw: Mapping) -> Mapping:
    """A row with messages in place of TRL's prompt and completion, of a system prompt and of a history.

    Raises:
        BadRow: a system prompt or a history has another form.
    """
    rest = {name: value for name, value in raw.items() if name not in ("system", "history")}
    prompt, completion = (raw.get(name) for name in TRL)
    if isinstance(prompt, list) and isinstance(completion, list):
        if raw.get("messages") is not None:
            raise BadRow("has messages beside prompt and completion: remove one")
        rest = {name: value for name, value in rest.items() if name not in TRL}
        rest["messages"] = [*prompt, *completion]
    # Columns of another type are of another meaning.
    system, history = (raw[name] if isinstance(raw.get(name), kind) else kind() for name, kind in _OF_TEXTS.items())
    if not system.strip() and not history:
        return rest
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("history is not a list of pairs of a question and its answer")
    before = [{"role": "system", "content": system}] if system.strip() else []
    for pair in history:
        before += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    for name in TURNS:
        if isinstance(turns := by_turn(rest.get(name)), list) and has_turns(rest, name):
            own = own_system(turns) if system.strip() else None
            if own not in (None, system.strip()):
                raise BadRow(f"has a system prompt beside another one in {name}: remove one")
            # A column with the system prompt of the turns repeats it.
            return {**rest, name: [*before[own is not None :], *turns]}
    question = {"role": "user", "content": _needed(_asked(rest), "question")}
    last = [question, {"role": "assistant", "content": _answer(rest)}]
    used = {*ALIASES["question"], *ALIASES["answer"], *_ANSWERS, "input"}
    return {**{name: value for name, value in rest.items() if name not in used}, "messages": [*before, *last]}


def _single(raw: Mapping) -> Row:
    """Parses an object with a question and an answer."""
    fields = {name: _pick(raw, name) for name in ALIASES if name != "answer"}
    if fields["image"] is None and not {*ALIASES["image"]} & {*raw}:
        raise BadRow("has no image")
    images, text = _images(fields["image"]), _string(fields["text"], "text")
    _check_pictures(raw, images)
    question, answer = _question(_asked(raw), len(images)), _answer(raw)
    _check_options(raw, question)
    return Row(images=images, question=question, answer=answer, text=text, **_about(fields))


def _chat(raw: Mapping, names: list[str]) -> Row:
    """Parses an object with a conversation; of the other fields it has images and what describes the row."""
    if len(names) > 1:
        raise BadRow(f"{' and '.join(map(repr, names))} both contain turns: remove one")
    fields = {name: _pick(raw, name) for name in ("image", "text", "type", "id", "slice", "latents")}
    if fields["text"]:
        raise BadRow(f"has a text beside {names[0]}: write it into a turn, or remove it")
    images = () if fields["image"] is None else _images(fields["image"])
    chat = parse_chat(raw[names[0]], names[0], images)
    _check_pictures(raw, chat.images)
    if raw.get("label") is False:  # rows of pairs of preferred and other answers
        raise BadRow("has label false, so its answer is not to be learnt: remove the row")
    if raw.get(_OBJECTS) and (places := _BOXES.search("\n".join([*(turn.text for turn in chat.turns), chat.answer]))):
        raise BadRow(f"has {places[0]} in place of one of its {_OBJECTS}: write the words and numbers into the turns")
    question = next(turn.text for turn in reversed(chat.turns) if turn.role == "user")
    _check_options(raw, "\n".join(turn.text for turn in chat.turns))
    return Row(images=chat.images, question=question, answer=chat.answer, turns=chat.turns, **_about(fields))


def _check_pictures(raw: Mapping, images: tuple[str | bytes, ...]) -> None:
    """Checks that a row without images has none in a column that is not read."""
    others = [name for name in raw if _PICTURES.fullmatch(name) and name not in ALIASES["image"] and raw[name]]
    if others and not images:
        raise BadRow(f"has no image, but {quoted(others[0])}, which is not read: rename it to images")


def _asked(raw: Mapping) -> Any:
    """The question, with the text that an instruction is about on the next line."""
    question, about = _pick(raw, "question"), raw.get("input")
    if not about or not isinstance(about, str):
        return question
    return f"{question}\n{about}" if isinstance(question, str) else about if question is None else question


def _answer(raw: Mapping) -> str:
    """The answer, or the most frequent of several, the first one of equally frequent ones."""
    value = _pick(raw, "answer")
    if value is None:
        value = next((raw[name] for name in _ANSWERS if raw.get(name) is not None), None)
    if isinstance(value, list) and value:
        each = [one.get("answer") if isinstance(one, Mapping) else one for one in value]
        value = Counter(_needed(one, "answer") for one in each).most_common(1)[0][0]
    return _needed(value, "answer")


def _check_options(raw: Mapping, question: str) -> None:
    """Checks that answers to choose from are in the question.

    Raises:
        BadRow: they are not: the model would choose among answers that it does not see.
    """
    for names in _OPTIONS:
        given = [raw.get(name) for name in names]
        options: Any = given[0] if len(names) == 1 and not isinstance(given[0], str) else given
        options = [*options.values()] if isinstance(options, Mapping) else options
        texts = isinstance(options, list) and all(isinstance(one, str) and one for one in options)
        if texts and not all(one in question for one in options):
            raise BadRow(f"has {', '.join(names)}, which are not read: write the options into the question")


def _about(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Parses the fields that describe a row."""
    about: dict[str, Any] = {name: _string(fields[name], name) for name in ("type", "slice")}
    return {**about, "id": "" if fields["id"] is None else str(fields["id"]), "latents": _latents(fields["latents"])}


def _pick(raw: Mapping, name: str) -> Any:
    present = [alias for alias in ALIASES[name] if raw.get(alias) is not None]
    if len(present) > 1 and name != "id":  # an id only names a row in messages
        raise BadRow(f"{' and '.join(map(repr, present))} both contain the {name}: remove one")
    return raw[present[0]] if present else None


def _images(value: Any) -> tuple[str | bytes, ...]:
    """One image, or a list of images, which may be empty; null, as in a column of images, is none."""
    if isinstance(value, list):
        return tuple(map(_image, value))
    return () if _held(value) is None else (_image(value),)


def _held(value: Any) -> Any:
    """What a raw image holds or names: Hugging Face datasets writes {"bytes": ..., "path": ...} to Parquet."""
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return file_of(value)
    return value


def _image(value: Any) -> str | bytes:
    value = _held(value)
    if value is None:
        raise BadRow("has no image")
    if not isinstance(value, str | bytes):
        raise BadRow(f"image is a {type(value).__name__}, not a path or the bytes of a file")
    if not value:
        raise BadRow("image is empty")
    return as_file(value) if isinstance(value, str) else value


def _string(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{name} is a {type(value).__name__}, not text")
    return value.strip()


def _needed(value: Any, name: str) -> str:
    if value is None:
        raise BadRow(f"has no {name}")
    text = _string(value, name)
    if not text:
        raise BadRow(f"{name} is empty")
    return text


def _question(value: Any, images: int) -> str:
    """A question without its places of images: the processor places the image tokens before it."""
    if not isinstance(value, str) or not (places := value.count(PLACE)):
        return _needed(value, "question")
    text = value.replace(PLACE, "")
    if places != images:
        raise BadRow(f"question has {places} places of images ({PLACE}), the row has {images} images")
    if text.strip() not in value:
        raise BadRow(f"question has {PLACE} between its words: write messages, in which places of images are kept")
    return _needed(text, "question")


def _latents(value: Any) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(v, int) for v in value.values() if v is not None):
        raise BadRow("latents are not an object of whole numbers")
    if any(abs(number) >= 1 << 31 for number in value.values() if number is not None):
        raise BadRow("latents have a number of more than 32 bits")
    return {str(name): number for name, number in value.items() if number is not None}


def image_names(raw: Any) -> list[str]:
    """Returns the image paths of a raw row as written; invalid rows have none."""
    if not isinstance(raw, Mapping):
        return []
    given = next((raw[alias] for alias in ALIASES["image"] if raw.get(alias) is not None), None)
    own = (image for name in (*TURNS, *TRL) for image in own_images(raw.get(name)))
    held = (_named(_held(one)) for one in (given if isinstance(given, list) else [given]))
    return [name for name in (*held, *own) if isinstance(name, str)]


def _named(value: Any) -> Any:
    """The path that a text names, as `as_file` reads it; None for an invalid one."""
    try:
        return as_file(value) if isinstance(value, str) else value
    except BadRow:
        return None
