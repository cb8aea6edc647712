"""Chat requests of the OpenAI interface, as a model reads them."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.files import decode_image
from data.limits import MOST_PIXELS

_DATA = "base64,"
MOST_TURNS = 1000
"""Messages of a request, and parts of a message."""
DEEPEST = 16
"""Levels of a request; a chat request has seven."""
FORM = "the request is no chat request of the OpenAI interface: see docs/guides/serving.md"
"""Reason for refusing another request."""


def shallow(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a request that has at most `DEEPEST` levels. Raises ValueError for another one."""
    level: list[Any] = [request]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, Mapping | list))
        level = [child for children in inner for child in children]
        if not level:
            return request
    raise ValueError(f"over {DEEPEST} levels")


def conversation(request: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Reads the turns of a chat request.

    Args:
        request: with `messages`; images are data URLs.

    Returns:
        Messages as the chat template takes them, and the images.

    Raises:
        AntgmmError: the request has another form.
        BadRow: an image cannot be read.
    """
    messages, images, pixels = [], [], 0
    try:
        if len(request["messages"]) > MOST_TURNS:
            raise AntgmmError(f"the request has over {MOST_TURNS} messages")
        for turn in request["messages"]:
            content = turn["content"]
            parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
            read: list[dict[str, Any]] = []
            for part in parts:
                if len(read) == MOST_TURNS:
                    raise AntgmmError(f"a message has over {MOST_TURNS} parts")
                if part["type"] == "text":
                    read.append({"type": "text", "text": str(part["text"])})
                else:
                    _, data, coded = part["image_url"]["url"].partition(_DATA)
                    if not data:
                        raise AntgmmError("an image is no data URL: send data:image/png;base64,...")
                    images.append(decode_image(base64.b64decode(coded, validate=True)))
                    pixels += images[-1].shape[0] * images[-1].shape[1]
                    if pixels > MOST_PIXELS:
                        raise AntgmmError(f"the images have over {MOST_PIXELS} pixels together: send smaller ones")
                    read.append({"type": "image"})
            messages.append({"role": str(turn["role"]), "content": read})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AntgmmError(FORM) from error
    if not messages:
        raise AntgmmError("the request has no messages")
    return messages, images
