"""Parsing of conversations: chat `messages` (role, content), ShareGPT `conversations` (from, value), and pairs."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from data.limits import BadRow, quoted
from data.record import ROLES, Turn, images_first

TURNS = ("messages", "conversations", "conversation", "texts")
"""Names of the field with the turns; The Cauldron and its kin have questions with their answers in `texts`."""
_PAIRS = tuple((asks, answers) for asks in ("user", "human") for answers in ("assistant", "gpt"))
"""Names of the fields of a question with its answer."""
_ROLES = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant"}
"""Names of roles in rows -> role."""
PLACE = "<image>"
"""Place of an image in a turn that is a string."""
_TAGGED = re.compile(r"<img>.+?</img>")
"""A picture that a text names, as some data sets write it."""
PATHS = ("image", "path", "url", "image_url")
"""Names of the field with the file of an image part."""
_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""Fields of an image part with a size of its own, which some trainers read."""
_LONGEST = 4096
"""Characters of a path."""
Image = str | bytes
_Part = str | tuple[Image | None]
"""A text, or an image: its own file, or None for the next one of the row."""


class Chat(NamedTuple):
    """A parsed conversation.

    Attributes:
        turns: turns before the last answer.
        answer: the last answer.
        images: images in the order of their places.
    """

    turns: tuple[Turn, ...]
    answer: str
    images: tuple[Image, ...]


def parse_chat(value: Any, name: str, images: Sequence[Image]) -> Chat:
    """Parses the turns of a conversation.

    An object with a question and its answer (`user` and `assistant`) is two turns. A turn is a string, in which
    `<image>` is the place of an image, or a list of such strings and of parts
    `{"type": "text", "text": ...}` and `{"type": "image"}`. An image part may name its own file; other places take the
    images of the row in order. A conversation without places has the images of the row before its first question.

    Args:
        value: the turns: a list of objects, or an object of lists.
        name: name of its field, for messages.
        images: images of the row.

    Returns:
        The conversation.

    Raises:
        BadRow: the turns have another form, or there are more places than images or the reverse.
    """
    value = _unpaired(by_turn(value))
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value) or not value:
        raise BadRow(f"{name} is not a list of turns")
    pictured = bool(images)
    turns = [_turn(turn, f"{name}[{place}]", pictured) for place, turn in enumerate(value) if not _is_blank(turn)]
    if not turns:
        raise BadRow(f"{name} is not a list of turns")
    _check_order([role for role, _ in turns], name)
    _check_order_of_images(value, name)
    own = [part for _, parts in turns for part in parts if not isinstance(part, str)]
    placed = tuple(Turn(role, tuple(p if isinstance(p, str) else None for p in parts)) for role, parts in turns)
    *before, last = placed
    if not own:
        return Chat(images_first(tuple(before), len(images)) if images else tuple(before), last.text, tuple(images))
    return Chat(tuple(before), last.text, tuple(_filled(own, images, name)))


def has_turns(raw: Mapping, name: str) -> bool:
    """Whether the field of one of the names of `TURNS` holds turns: under the last two some data sets have texts."""
    value = by_turn(raw.get(name))
    if name in TURNS[2:]:
        return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)
    return value is not None


def _unpaired(value: Any) -> Any:
    """Turns in place of questions with their answers."""
    if not isinstance(value, list):
        return value
    turns: list[Any] = []
    for each in value:
        pair = next((names for names in _PAIRS if isinstance(each, Mapping) and each.keys() >= {*names}), ())
        roles = zip(("user", "assistant"), pair, strict=False)
        turns += [{"role": role, "content": each[name]} for role, name in roles] if pair else [each]
    return turns


def _is_blank(turn: Mapping) -> bool:
    """Whether a turn is a system prompt without a text, which some data sets write into every row."""
    return role_of(turn) == "system" and all(isinstance(text, str) and not text.strip() for text in _texts(turn))


def own_system(turns: Sequence[Any]) -> str | None:
    """Returns the system prompt with which raw turns begin; None if they begin with none, or with a blank one."""
    first = turns[0] if turns else None
    if not isinstance(first, Mapping) or role_of(first) != "system" or _is_blank(first):
        return None
    return "".join(map(str, _texts(first))).strip()


def _texts(turn: Mapping) -> list[Any]:
    """What a turn has in place of texts, one per part, at least one."""
    content = _content(turn)
    parts = content if isinstance(content, list) and content else [content]
    return [part.get("text") if isinstance(part, Mapping) else part for part in parts]


def role_of(turn: Mapping) -> Any:
    """Returns the role of a raw turn as written."""
    return turn.get("role") or turn.get("from")


def _content(turn: Mapping) -> Any:
    return turn.get("content") if turn.get("value") is None else turn["value"]


def _turn(raw: Mapping, where: str, pictured: bool) -> tuple[str, list[_Part]]:
    """Role and parts of a turn. In rows without pictures (`pictured`), answers may write about tags."""
    given = role_of(raw)
    if not isinstance(given, str) or given not in _ROLES:
        raise BadRow(f"{where} has role {quoted(given)}: only system, user (human) and assistant (gpt) are supported")
    role, content = _ROLES[given], _content(raw)
    if role == "assistant" and (raw.get("weight") == 0 or raw.get("loss") is False):
        raise BadRow(
            f"{where} is an answer that is not to be learnt: end the row before it, or write it into a question"
        )
    if raw.get("tool_calls"):
        raise BadRow(f"{where} calls tools, which is not supported: write the call into its content, or remove the row")
    if raw.get("reasoning_content"):
        raise BadRow(f"{where} has reasoning_content, which is not read: write it into its content, or remove it")
    if isinstance(content, str):
        parts = _split(content.strip(), where) if role == "user" or pictured else [content]
    elif isinstance(content, list):
        parts = [each for part in content for each in _parts(part, where)]
    else:
        raise BadRow(f"{where} has {type(content).__name__} content: write a text or a list of parts")
    if role != "user" and not all(isinstance(part, str) for part in parts):
        raise BadRow(f"{where} is a turn of the {role} with an image: only user turns may have images")
    if role != "user":  # templates read the first part of such a turn alone
        parts = ["".join(part for part in parts if isinstance(part, str)).strip()]
    parts = [part for part in parts if part != ""]
    if not parts:
        raise BadRow(f"{where} is empty")
    return role, parts


def _split(text: str, where: str) -> list[_Part]:
    """Splits a string at its places of images; a line break separates a place from the text."""
    if "<video>" in text:
        raise BadRow(f"{where} contains <video>: video is not supported, use images")
    if named := _TAGGED.search(text):
        raise BadRow(f"{where} names a picture as {quoted(named[0])}: write {PLACE}, and the file into images")
    first, *rest = text.split(PLACE)
    parts: list[_Part] = [first]
    for after in rest:
        before = parts[-1]
        parts[-1:] = [
            before.removesuffix("\n") if isinstance(before, str) else before,
            (None,),
            after.removeprefix("\n"),
        ]
    return parts


def _parts(part: Any, where: str) -> list[_Part]:
    """What one part of a list holds: an image, or a text, which may have places of images itself."""
    if isinstance(part, str):
        return _split(part, where)
    if not isinstance(part, Mapping):
        raise BadRow(f"{where} has a part that is a {type(part).__name__}, not an object with a type")
    kind = part.get("type") or next((name for name in ("text", "image", "video") if part.get(name)), None)
    if kind == "text" and isinstance(part.get("text"), str):
        return _split(part["text"], where)
    if kind in ("image", "image_url"):
        return [(own_image(part),)]
    if kind == "text":
        raise BadRow(f"{where} has a part of type 'text' without a text")
    hint = "video is not supported, use images" if kind == "video" else "only text and image are supported"
    raise BadRow(f"{where} has a part of type {quoted(kind)}: {hint}")


def own_image(part: Mapping) -> Image | None:
    """Returns the image that an image part itself holds or names; None if it is one of the row's images."""
    if sized := [name for name in _SIZES if part.get(name)]:
        raise BadRow(f"image has {sized[0]}: resize its file, or limit all pictures in the model's processor")
    given = next((part[name] for name in PATHS if part.get(name) or part.get(name) == b""), None)
    if isinstance(given, Mapping):
        given = file_of(given)
    if given in ("", b""):
        raise BadRow("image is empty")
    if given is not None and not isinstance(given, str | bytes):
        raise BadRow(f"image is a {type(given).__name__}, not a path or the bytes of a file")
    return as_file(given) if isinstance(given, str) else given


def file_of(image: Mapping) -> Any:
    """What an image as Hugging Face datasets stores it holds or names: bytes, which may be empty, before a path."""
    return next((image[name] for name in ("bytes", "path", "url") if image.get(name) is not None), None)


def as_file(text: str) -> Image:
    """Returns the path that a text names, or the bytes that a data URL holds.

    Args:
        text: a path, `file://PATH`, or `data:image/...;base64,...`.

    Raises:
        BadRow: it is another URL, no base64, or too long for a path.
    """
    if text.startswith("data:"):
        about, _, content = text.partition(",")
        try:
            if about.endswith(";base64") and content:
                return base64.b64decode("".join(content.split()), validate=True)  # encoders may break its lines
        except ValueError:  # also for text that is not ASCII
            pass
        raise BadRow(f"image {quoted(about)},... holds no base64")
    if text.startswith(("http://", "https://")):
        raise BadRow(f"image {quoted(text)} is not a file: save it and write its path")
    if len(text) > _LONGEST:
        raise BadRow(
            f"image is a text of {len(text)} characters, not a path: base64 begins with data:image/png;base64,"
        )
    return unquote(text.removeprefix("file://")) if text.startswith("file://") else text


def by_turn(value: Any) -> Any:
    """Returns raw turns as a list where they are an object of lists: `datasets` and TFDS store a sequence so."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(each, list) for each in value.values()):
        return value
    if len({*map(len, value.values())}) > 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]


def own_images(value: Any) -> Iterator[Image]:
    """Yields the images that the parts of raw turns themselves hold or name; nothing for invalid turns."""
    turns = _unpaired(by_turn(value))
    for turn in turns if isinstance(turns, list) else ():
        content = _content(turn) if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") != "text":
                try:
                    image = own_image(part)
                except BadRow:
                    continue
                if image is not None:
                    yield image


def _check_order(roles: Sequence[str], name: str) -> None:
    """Checks that every answer follows a question, and that the last turn is an answer."""
    for place, role in enumerate(roles):
        if role == "assistant" and (place == 0 or roles[place - 1] != "user"):
            raise BadRow(f"{name}[{place}] is an answer (assistant) that does not follow a question (user)")
    if roles[-1] != "assistant":
        raise BadRow(f"{name} end with a turn of the {roles[-1]}: the answer (assistant) is missing")


def _check_order_of_images(turns: Sequence[Mapping], name: str) -> None:
    """Checks that image parts that number images of the row do so in order, in which places take them."""
    contents = (content for turn in turns if isinstance(content := _content(turn), list))
    parts = (part for content in contents for part in content if isinstance(part, Mapping))
    places = (part for part in parts if part.get("type") == "image" and not any(map(part.get, PATHS)))
    numbers = [part["index"] for part in places if type(part.get("index")) is int]
    if numbers != sorted(set(numbers)):
        raise BadRow(f"images in {name} have the index {', '.join(map(str, numbers))}: put them in ascending order")


def _filled(places: Sequence[tuple[Image | None]], images: Sequence[Image], name: str) -> Iterator[Image]:
    """Yields the image of each place."""
    open_places = sum(image is None for (image,) in places)
    if open_places != len(images):
        raise BadRow(f"{len(images)} images, but {open_places} places for them in {name}")
    rest = iter(images)
    for (image,) in places:
        yield next(rest) if image is None else image
