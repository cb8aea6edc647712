"""Parsing of rows of user files, with common alternative column names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.files import BadRow

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
_TURNS = ("conversations", "messages")
_ASKS, _TELLS = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A record with undecoded images: paths inside the data folder, or bytes of files."""

    images: tuple[str | bytes, ...]
    question: str
    answer: str
    text: str = ""
    type: str = ""
    id: str = ""
    slice: str = ""
    latents: Mapping[str, int] = field(default_factory=dict)


def columns(names: Iterator[str] | list[str]) -> list[str]:
    """Selects the columns of a file that rows use."""
    known = {name for group in ALIASES.values() for name in group} | set(_TURNS)
    return [name for name in names if name in known]


def parse(raw: Any) -> list[Row]:
    """Parses an object of a file into one row, or one per question of a conversation.

    Args:
        raw: object with the names of `ALIASES`, or with `conversations`.

    Returns:
        At least one row.

    Raises:
        BadRow: a field is missing, empty, ambiguous or of the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise BadRow(f"is a {type(raw).__name__}, not an object with named fields")
    fields = {name: _pick(raw, name) for name in ALIASES}
    images = _images(fields["image"])
    label = "" if fields["id"] is None else str(fields["id"])
    rest: dict[str, Any] = {name: _string(fields[name], name) for name in ("type", "slice")}
    rest["latents"] = _latents(fields["latents"])
    text = _string(fields["text"], "text")
    turns = [name for name in _TURNS if raw.get(name) is not None]
    if turns:
        pairs = _conversation(raw[turns[0]], turns[0])
        ids = [label] if len(pairs) == 1 else [label and f"{label}#{place}" for place in range(len(pairs))]
        return [
            Row(images=images, question=q, answer=a, text=text, id=i, **rest)
            for (q, a), i in zip(pairs, ids, strict=True)
        ]
    question, answer = _question(fields["question"]), _needed(fields["answer"], "answer")
    return [Row(images=images, question=question, answer=answer, text=text, id=label, **rest)]


def _pick(raw: Mapping, name: str) -> Any:
    present = [alias for alias in ALIASES[name] if raw.get(alias) is not None]
    if len(present) > 1:
        raise BadRow(f"{' and '.join(map(repr, present))} both contain the {name}: remove one")
    return raw[present[0]] if present else None


def _images(value: Any) -> tuple[str | bytes, ...]:
    """One image, or a list of images, which may be empty."""
    return tuple(map(_image, value)) if isinstance(value, list) else (_image(value),)


def _image(value: Any) -> str | bytes:
    # Hugging Face datasets writes images to Parquet as {"bytes": ..., "path": ...}.
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise BadRow("has no image")
    if not isinstance(value, str | bytes):
        raise BadRow(f"image is a {type(value).__name__}, not a path or the bytes of a file")
    if not value:
        raise BadRow("image is empty")
    return value


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


def _question(value: Any) -> str:
    # The processor places the image tokens.
    return _needed(value.replace("<image>", "") if isinstance(value, str) else value, "question")


def _latents(value: Any) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(v, int) for v in value.values() if v is not None):
        raise BadRow("latents are not an object of whole numbers")
    return {str(name): number for name, number in value.items() if number is not None}


def _conversation(turns: Any, name: str) -> list[tuple[str, str]]:
    """Questions and answers of `conversations` (from, value) or chat `messages` (role, content)."""
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow(f"{name} is not a list of at least two turns, a question and its answer")
    if (turns[0].get("from") or turns[0].get("role")) == "system":
        turns = turns[1:]
    pairs = []
    for place in range(0, len(turns), 2):
        pair = turns[place : place + 2]
        speakers = [turn.get("from") or turn.get("role") for turn in pair]
        if len(pair) < 2 or speakers[0] not in _ASKS or speakers[1] not in _TELLS:
            raise BadRow(f"{name} do not alternate between a question (human) and an answer (gpt): {speakers}")
        said = [turn["value"] if "value" in turn else turn.get("content") for turn in pair]
        pairs.append((_question(said[0]), _needed(said[1], "answer")))
    return pairs


def image_names(raw: Any) -> list[str]:
    """Returns the image paths of a raw row as written; invalid rows have none."""
    if not isinstance(raw, Mapping):
        return []
    given = next((raw[alias] for alias in ALIASES["image"] if raw.get(alias) is not None), None)
    return [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]
