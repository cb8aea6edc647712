"""Encoded rows in memory with simple, predictable contents."""

import numpy as np

from data.collate import Layout, Needs, needs
from data.index import Index

T5, LLAMA = Layout(True, 0, 0), Layout(False, 0, 0)


class ToyRows:
    """Encoded rows with prompts, answers and pictures of a few pixels."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def tokens(self, index):
        return {name: value for name, value in self[index].items() if name != "images"}

    def images(self, index):
        return self[index]["images"]

    def needs(self, about) -> Needs:
        prompt, answer = (np.array([len(row[name]) for row in self.rows]) for name in ("prompt", "answer"))
        slots = np.array([len(row["images"]["pixels"]) for row in self.rows])
        earlier = np.array([len(row.get("earlier", ())) for row in self.rows])
        return needs(Index(prompt, answer, earlier, slots, slots, (), ""), about.apart)


def toy(prompts, answers, pictures, side=2) -> ToyRows:
    """Rows with the given numbers of tokens and pictures; row r's tokens are 100 r + 1, 100 r + 2, ..."""
    rng, rows = np.random.default_rng(0), []
    for row, (prompt, answer, count) in enumerate(zip(prompts, answers, pictures, strict=True)):
        ids = np.arange(1, prompt + answer + 1, dtype=np.int32) + 100 * row
        pixels = rng.integers(1, 256, (count, side, side, 3), np.uint8)
        scale = np.full((count, 3), row + 1.0, np.float32)
        rows.append({"prompt": ids[:prompt], "answer": ids[prompt:], "images": {"pixels": pixels, "scale": scale}})
    return ToyRows(rows)


class ToyViews:
    """Image features of rows, [V, M, N, D] per row."""

    def __init__(self, features):
        self.features = [*features]
        self.count = len(self.features[0])

    def __getitem__(self, place):
        row, view = place
        return self.features[row][view]
