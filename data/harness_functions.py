"""Functions of a task for lmms-eval. `data.harness` writes a copy beside the task, which runs without this project."""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def images(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Returns the images of a row.

    Args:
        doc: the row, with `images`, names of files in the folder of the task.
    """
    return [Image.open(os.path.join(_FOLDER, name)).convert("RGB") for name in doc["images"]]


def prompt(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Returns the prompt of a row in the words of training, for models that are given one string; of a conversation,
    the text of its last turn.

    Args:
        doc: the row.
        lmms_eval_specific_kwargs: words around a question for other models; not used.
    """
    turn = doc["messages"][-1]["content"]
    return "".join(part["text"] for part in turn if part["type"] == "text")


def messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the turns of a row, for models that read conversations; an image is the `url` of its part.

    Args:
        doc: the row.
    """
    pictures = iter(images(doc))

    def part(one: Mapping[str, Any]) -> dict[str, Any]:
        if one["type"] == "text":
            return {"type": "text", "text": one["text"]}
        return {"type": "image", "url": next(pictures)}

    return [{"role": turn["role"], "content": [part(one) for one in turn["content"]]} for turn in doc["messages"]]


def scored(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Returns whether an answer is right, ignoring letter case and repeated spaces, for each metric of the task.

    Args:
        doc: the row.
        results: the model's answer, alone.
    """
    right = _normal(results[0]) == _normal(doc["answer"])
    return {"exact_match": {"type": doc["type"], "right": right}, "exact_match_micro": float(right)}


def mean_over_types(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the exact match, the mean over question types.

    Args:
        rows: `exact_match` of `scored`, of each row.
    """
    types: dict[str, list[bool]] = {}
    for row in rows:
        types.setdefault(row["type"], []).append(row["right"])
    return sum(sum(right) / len(right) for right in types.values()) / len(types)


def _normal(answer: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", answer).lower().split())
