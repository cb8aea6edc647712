"""Chat requests of the OpenAI interface, as a model reads them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.chat_rows import as_file
from data.files import decode_image
from data.limits import MOST_PIXELS, check_text, quoted
from data.record import ROLES

MOST_TURNS = 1000
"""Messages of a request, and their parts together."""
MOST_IMAGES = 100
"""Images of a request; each is made as large as the model reads it before the length of the request is known."""
DEEPEST = 16
"""Levels of a request; a chat request has seven."""
FORM = "the request is no chat request of the OpenAI interface: see docs/guides/serving.md"
"""Reason for refusing another request."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "n": (1,),
    "stop": ([],),
    "tools": ([],),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "functions": ([],),
    "structured_outputs": ({},),
    "guided_choice": ([],),
    "guided_json": ({},),
    "guided_regex": ("",),
    "guided_grammar": ("",),
    "ignore_eos": (False,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "chat_template": ("",),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "continue_final_message": (False,),
}
"""Fields of a request -> values that the server takes; others are for models that sample, or change nothing."""


def shallow(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a request that has at most `DEEPEST` levels. Raises ValueError for another one."""
    level: list[Any] = [request]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, Mapping | list))
        level = [child for children in inner for child in children]
        if not level:
            return request
    raise ValueError(f"over {DEEPEST} levels")


def check_options(request: Mapping[str, Any], name: str) -> None:
    """Checks that a request asks for nothing that the server does not do.

    Args:
        request: a chat request.
        name: name of the served model.

    Raises:
        AntgmmError: it does.
    """
    if request.get("model") not in (None, name):
        raise AntgmmError(f"the server has no other model than {name!r}")
    if other := next((key for key, value in _ONLY.items() if request.get(key) not in (None, *value)), ""):
        raise AntgmmError(f"the server does not support {other!r} with this value: leave it out")


def most_tokens(request: Mapping[str, Any], most: int) -> int:
    """Returns the maximum length of the answer that a request asks for.

    Args:
        request: a chat request, with `max_tokens` or `max_completion_tokens`.
        most: maximum of the server.

    Raises:
        AntgmmError: it is no number above 0.
    """
    for key in ("max_completion_tokens", "max_tokens"):
        if (wanted := request.get(key)) is not None:
            if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
                raise AntgmmError(f"{key} must be a number above 0")
            return min(wanted, most)
    return most


def conversation(request: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Reads the turns of a chat request.

    Args:
        request: with `messages`; images are data URLs.

    Returns:
        Messages as the chat template takes them, and the images.

    Raises:
        AntgmmError: the request has another form.
        BadRow: an image cannot be read, or a text is too long or no Unicode.
    """
    messages, images, pixels, count = [], [], 0, 0
    try:
        if len(request["messages"]) > MOST_TURNS:
            raise AntgmmError(f"the request has over {MOST_TURNS} messages")
        for turn in request["messages"]:
            if turn["role"] not in ROLES:
                raise AntgmmError(f"a message has another role than {', '.join(ROLES)}")
            content = turn["content"]
            parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
            read: list[dict[str, Any]] = []
            for part in parts:
                count += 1
                if count > MOST_TURNS:
                    raise AntgmmError(f"the messages have over {MOST_TURNS} parts")
                if part["type"] == "text":
                    if not isinstance(part["text"], str):
                        raise AntgmmError(FORM)
                    check_text("a text", part["text"])
                    read.append({"type": "text", "text": part["text"]})
                elif part["type"] != "image_url":
                    raise AntgmmError(f"a part has the type {quoted(part['type'])}: send text or image_url")
                elif len(images) == MOST_IMAGES:
                    raise AntgmmError(f"the request has over {MOST_IMAGES} images")
                else:
                    images.append(decode_image(_decoded(part["image_url"]["url"])))
                    pixels += images[-1].shape[0] * images[-1].shape[1]
                    if pixels > MOST_PIXELS:
                        raise AntgmmError(f"the images have over {MOST_PIXELS} pixels together: send smaller ones")
                    read.append({"type": "image"})
            if turn["role"] != "user" and all(part["type"] == "text" for part in read):
                # Templates read the first part of such a turn alone.
                read = [{"type": "text", "text": "".join(part["text"] for part in read)}]
            messages.append({"role": turn["role"], "content": read})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AntgmmError(FORM) from error
    if not messages:
        raise AntgmmError("the request has no messages")
    if messages[-1]["role"] != "user":
        raise AntgmmError("the last message is not the user's: the server answers questions, and continues no answers")
    return messages, images


def _decoded(url: str) -> bytes:
    """Content of a data URL."""
    image = as_file(url) if url.startswith("data:") else url
    if isinstance(image, str):
        raise AntgmmError("an image is no data URL: send data:image/png;base64,...")
    return image
