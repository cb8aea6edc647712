"""Seeded mutations of texts, bytes and JSON values: what a damaged or hostile file may hold."""

import json
import random
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 1e9, 1e400, float("nan"), 10**30),
    *("", "x", "\ud800", "\x1b[2J", "../../etc/passwd", "</s>", "x" * 5000, [], {}, [[]], {"a": 1}, [None], [1, "a"]),
)


def mutated_text(text: str, rng: random.Random) -> bytes:
    """Returns a text as bytes, with one byte changed, a part removed, repeated or replaced, or its end cut off."""
    return mutated_bytes(text.encode("utf-8", "surrogatepass"), rng)


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns bytes with a small damage."""
    start = rng.randrange(max(1, len(content)))
    end = min(len(content), start + rng.choice((1, 2, 8, 64, 1000)))
    damages: tuple[Callable[[], bytes], ...] = (
        lambda: content[:start] + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :],
        lambda: content[:start] + content[end:],
        lambda: content[:end] + content[start:],
        lambda: content[:start],
        lambda: content[:start] + rng.randbytes(end - start) + content[end:],
        lambda: content[:start] + b"[" * 100_000 + content[start:],
    )
    return rng.choice(damages)() if content else rng.randbytes(16)


def mutated_json(text: str, rng: random.Random) -> bytes:
    """Returns a JSON document with one value replaced, removed or renamed."""
    document = json.loads(text)
    parent, key = rng.choice([*_places(document)])
    how = rng.randrange(4)
    if how == 0 and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    elif how == 1:
        del parent[key]
    else:
        parent[key] = rng.choice(VALUES)
    return json.dumps(document).encode()


def _places(value: Any):
    """Containers and keys of all values at any depth."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
